// What is known of the memory of an array, and which arrays overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernel.hpp"
#include "python.hpp"

namespace lars {

// Strides and the size of an item are in bytes.
struct Memory {
    char* data;
    std::size_t size;  // of real numbers: a complex one has two
    Format format;
    bool is_complex;
    Py_ssize_t item_size;
    int ndim;
    const Py_ssize_t* shape;
    Py_ssize_t strides[64];

    std::size_t bytes() const { return size * Vector::item_size(format); }
};

inline bool same_shape(const Memory& a, const Memory& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Whether the items of x fill its memory without gaps, in any order of the axes.
inline bool is_dense(const Memory& x) {
    Py_ssize_t expected = x.item_size;
    int axis = x.ndim;
    while (axis > 0 && (x.shape[axis - 1] == 1 || x.strides[axis - 1] == expected)) {
        expected *= x.shape[--axis];
    }
    if (axis == 0) return true;  // the usual order
    int axes[64], count = 0;
    for (axis = 0; axis < x.ndim; ++axis) {
        if (x.shape[axis] == 0) return true;
        if (x.shape[axis] > 1) axes[count++] = axis;
    }
    std::sort(axes, axes + count, [&x](int a, int b) { return x.strides[a] < x.strides[b]; });
    expected = x.item_size;
    for (int i = 0; i < count; ++i) {
        if (x.strides[axes[i]] != expected) return false;
        expected *= x.shape[axes[i]];
    }
    return true;
}

// Whether equal places in the memory of two arrays of one shape hold items of equal indices.
inline bool same_order(const Memory& a, const Memory& b) {
    for (int axis = 0; axis < a.ndim; ++axis) {
        if (a.shape[axis] == 0) return true;
        if (a.shape[axis] > 1 && a.strides[axis] * b.item_size != b.strides[axis] * a.item_size) {
            return false;
        }
    }
    return true;
}

// What DLPack fixes (https://dmlc.github.io/dlpack/latest/c_api.html), as far as it is used here.
struct DLTensor {
    void* data;
    std::int32_t device_type, device_id, ndim;
    std::uint8_t code, bits;
    std::uint16_t vector_lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    std::uint32_t major, minor;
    DLPackExchangeAPI* previous;
    void *allocator, *managed_tensor_from_object, *managed_tensor_to_object;
    int (*tensor_from_object)(void* object, DLTensor* out);
    void* current_work_stream;
};

// Whether memory may be written to, where the system tells without a try that could end the process
// (Linux 5.14 and later). Elsewhere it is taken to be so, as lars_tree/_memory.py does.
inline bool is_writable(char* data, std::size_t bytes) {
#ifdef __linux__
    const int populate_write = 23;  // MADV_POPULATE_WRITE, which older headers lack
    const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start_of_page = [page](char* place) {
        return place - reinterpret_cast<std::uintptr_t>(place) % page;
    };
    char *first = start_of_page(data), *last = start_of_page(data + bytes - 1);
    if (madvise(first, page, populate_write) != 0) return false;
    if (last != first && madvise(last, page, populate_write) != 0) return false;
#else
    (void)data, (void)bytes;
#endif
    return true;
}

// How every numpy array begins: part of numpy's binary interface (ndarraytypes.h), by which each
// extension module reads arrays.
struct ArrayFields {
    PyObject head;
    char* data;
    int ndim;
    Py_ssize_t *shape, *strides;
    PyObject *base, *dtype;
    int flags;
};

// A memory range.
struct Span {
    const char *start, *end;
};

inline void sort(std::vector<Span>& spans) {
    const auto before = [](const Span& a, const Span& b) { return a.start < b.start; };
    // As the allocator hands it out, memory is most often in order.
    if (!std::is_sorted(spans.begin(), spans.end(), before)) {
        std::sort(spans.begin(), spans.end(), before);
    }
}

// Whether some memory that is written is written twice, or read too. Sorts the spans.
inline bool overlap(std::vector<Span>& written, std::vector<Span>& read) {
    sort(written);
    sort(read);
    const char *written_to = nullptr, *read_to = nullptr;
    std::size_t next = 0;
    for (const Span& x : written) {
        for (; next < read.size() && read[next].start < x.start; ++next) {
            if (read[next].start < written_to) return true;
            read_to = std::max(read_to, read[next].end);
        }
        if (x.start < written_to || x.start < read_to) return true;
        written_to = x.end;
    }
    return next < read.size() && read[next].start < written_to;
}

}  // namespace lars
