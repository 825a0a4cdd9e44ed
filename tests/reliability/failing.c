// Makes allocations fail, in a process that preloads this library: see no_memory.py.
//
// While `failing_armed` is set, allocations are counted from 0, in all threads, and those from
// `failing_first` to `failing_last` fail. The start of a thread counts as an allocation too.
//
// If the process crashes, the file `failing_report` gets a line that says whether all regions of
// memory are as before or as after the step, and the stack.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

long failing_armed, failing_first, failing_last, failing_count, failing_report;

struct {
    const void *now, *before, *after;
    size_t size;
} failing_regions[64];
long failing_region_count;

// glibc's own names of its allocator.
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static int fails(void) {
    if (!__atomic_load_n(&failing_armed, __ATOMIC_RELAXED)) return 0;
    long number = __atomic_fetch_add(&failing_count, 1, __ATOMIC_RELAXED);
    if (number < failing_first || number > failing_last) return 0;
    errno = ENOMEM;
    return 1;
}

void* malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails() ? NULL : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return fails() ? NULL : __libc_realloc(old, size); }
void* memalign(size_t unit, size_t size) { return fails() ? NULL : __libc_memalign(unit, size); }
void* aligned_alloc(size_t unit, size_t size) { return memalign(unit, size); }

int posix_memalign(void** to, size_t unit, size_t size) {
    void* found = memalign(unit, size);
    if (!found) return ENOMEM;
    *to = found;
    return 0;
}

void* mmap(void* at, size_t size, int protection, int flags, int file, off_t offset) {
    if (fails()) return MAP_FAILED;
    return (void*)syscall(SYS_mmap, at, size, protection, flags, file, offset);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*), void* with) {
    static int (*create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
    if (!create) *(void**)&create = dlsym(RTLD_NEXT, "pthread_create");
    return fails() ? EAGAIN : create(thread, how, run, with);
}

static void report(int signal) {
    failing_armed = 0;
    int before = 1, after = 1;
    for (long i = 0; i < failing_region_count; ++i) {
        before &=
            !memcmp(failing_regions[i].now, failing_regions[i].before, failing_regions[i].size);
        after &= !memcmp(failing_regions[i].now, failing_regions[i].after, failing_regions[i].size);
    }
    dprintf((int)failing_report, before || after ? "whole\n" : "torn\n");
    void* stack[64];
    backtrace_symbols_fd(stack, backtrace(stack, 64), (int)failing_report);
    _exit(128 + signal);
}

void failing_watch(void) {
    void* stack[1];
    backtrace(stack, 1);  // loads what it needs
    for (int i = 0; i < 3; ++i) signal((int[]){SIGSEGV, SIGABRT, SIGBUS}[i], report);
}
