// Work on several threads at once.
//
// In a process with an OpenMP runtime (torch brings one), the work runs on its team. The idle
// threads of a team spin for milliseconds after each parallel region, so threads of our own would
// compete with them for the cores. Everywhere else, threads are started for one call and joined
// before it returns. The same holds in a forked child, where the threads of a team do not exist.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// glibc allocates other thread-local data at their first use, and aborts if there is no memory.
#ifdef __GLIBC__
#define LARS_STATIC_TLS __attribute__((tls_model("initial-exec")))
#else
#define LARS_STATIC_TLS
#endif

namespace lars {

// Called in each thread with its index. Must not throw. The system may start fewer threads, so the
// threads that exist must do all of the work.
using Work = std::function<void(std::size_t)>;

// Whether the system could start all threads.
inline bool run_on_own_threads(std::size_t threads, const Work& work) {
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (std::size_t i = 1; i < threads; ++i) others.emplace_back([&work, i] { work(i); });
    } catch (const std::exception&) {
        // The system cannot start more threads; the threads that were started do the work.
    }
    work(0);
    for (std::thread& other : others) other.join();
    return others.size() + 1 == threads;
}

#ifdef _WIN32
inline void run_on_threads(std::size_t threads, std::size_t, const Work& work) {
    run_on_own_threads(threads, work);
}
#else
inline std::atomic<bool> is_forked_child{false};
inline const int at_fork = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

// The OpenMP runtime whose symbols are global, as they are for torch. libgomp and LLVM's runtime
// both export these functions. It may be loaded later than this module.
struct OpenMP {
    OpenMP() {
        if (is_forked_child) return;
        find(parallel, "GOMP_parallel");
        find(max_threads, "omp_get_max_threads");
    }

    template <class Function>
    static void find(Function*& function, const char* name) {
        function = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
    }

    void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
    int (*max_threads)() = nullptr;
};

// ThreadSanitizer does not know how an OpenMP runtime orders memory accesses.
inline void release(void* address) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(address);
#endif
    (void)address;
}

inline void acquire(void* address) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(address);
#endif
    (void)address;
}

// Runs `work` on the whole team of the calling thread.
inline void run_on_team(const OpenMP& openmp, const Work& work) {
    struct Job {
        const Work& work;
        std::atomic<std::size_t> next{0};
    } job = {work};
    release(&job);
    openmp.parallel(
        [](void* data) {
            acquire(data);
            Job& job = *static_cast<Job*>(data);
            job.work(job.next.fetch_add(1));
            release(data);
        },
        &job, 0, 0);
    acquire(&job);
}

// Runs `work` on `threads` threads, if at most `max_threads` may be used: on the team if it is that
// large. A larger team would use more cores than the caller allows, and a smaller one fewer.
inline void run_on_threads(std::size_t threads, std::size_t max_threads, const Work& work) {
    static thread_local std::size_t started LARS_STATIC_TLS = 0;
    const OpenMP openmp;
    if (!openmp.parallel || !openmp.max_threads ||
        static_cast<std::size_t>(openmp.max_threads()) != max_threads) {
        run_on_own_threads(threads, work);
        return;
    }
    // The whole team takes part. If a part of it were requested, the runtime would end the other
    // threads, and start them again for the next operation of torch.
    const Work of_team = [&](std::size_t thread) {
        if (thread < threads) work(thread);
    };
    // A runtime that cannot start its threads ends the process. So the first call in each thread
    // tries whether the system can start as many. The trial cannot see limits that change later, or
    // an OMP_STACKSIZE that the system does not have; operations of torch end the process then too.
    if (started >= max_threads) {
        run_on_team(openmp, of_team);
    } else if (run_on_own_threads(max_threads, of_team)) {
        started = max_threads;
    }
}
#endif

}  // namespace lars
