// The memory layout of arrays, and the overlap of memory ranges.
//
// The kernel reads an array as one run of elements. So the arrays of a layer must be dense and have
// the same order of axes in memory; this order may be any.
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

const int max_axes = 64;

// An array in memory. Strides and the item size are in bytes. The shape and the strides are copies,
// because callbacks may run Python code that changes the array.
struct Memory {
    char* data;
    std::size_t size;  // the number of real elements: a complex element counts twice
    Format format;
    bool is_complex;
    Py_ssize_t item_bytes;
    int ndim;
    Py_ssize_t shape[max_axes], strides[max_axes];

    std::size_t bytes() const { return size * item_size(format); }

    // Sets the shape, the strides (given in multiples of `unit` bytes) and the size.
    template <class Integer>
    bool set_axes(int count, const Integer* lengths, const Integer* steps, Py_ssize_t unit) {
        if (count > max_axes) return false;
        ndim = count;
        size = is_complex ? 2 : 1;
        for (int axis = 0; axis < count; ++axis) {
            shape[axis] = lengths[axis];
            strides[axis] = steps[axis] * unit;
            size *= static_cast<std::size_t>(lengths[axis]);
        }
        return true;
    }
};

inline bool same_shape(const Memory& a, const Memory& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Whether the items fill the memory without gaps; the axes may have any order.
inline bool is_dense(const Memory& x) {
    Py_ssize_t expected = x.item_bytes;
    int axis = x.ndim;
    while (axis > 0 && (x.shape[axis - 1] == 1 || x.strides[axis - 1] == expected)) {
        expected *= x.shape[--axis];
    }
    if (axis == 0) return true;  // C order, the most frequent one
    int axes[max_axes], count = 0;
    for (axis = 0; axis < x.ndim; ++axis) {
        if (x.shape[axis] == 0) return true;
        if (x.shape[axis] > 1) axes[count++] = axis;
    }
    std::sort(axes, axes + count, [&x](int a, int b) { return x.strides[a] < x.strides[b]; });
    expected = x.item_bytes;
    for (int i = 0; i < count; ++i) {
        if (x.strides[axes[i]] != expected) return false;
        expected *= x.shape[axes[i]];
    }
    return true;
}

// Whether two arrays of the same shape have their items in the same order in memory.
inline bool same_order(const Memory& a, const Memory& b) {
    for (int axis = 0; axis < a.ndim; ++axis) {
        if (a.shape[axis] == 0) return true;
        if (a.shape[axis] > 1 && a.strides[axis] * b.item_bytes != b.strides[axis] * a.item_bytes) {
            return false;
        }
    }
    return true;
}

// The parts of DLPack's ABI that are used here (https://dmlc.github.io/dlpack/latest/c_api.html).
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

// Whether memory is writable, tested without a write: a write to read-only memory would crash. The
// result is false on Linux before 5.14, where this test does not exist, and true on other systems.
inline bool is_writable(char* data, std::size_t bytes) {
#ifdef __linux__
    const int populate_write = 23;  // MADV_POPULATE_WRITE, which older headers lack
    const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start_of_page = [page](char* address) {
        return address - reinterpret_cast<std::uintptr_t>(address) % page;
    };
    char *first = start_of_page(data), *last = start_of_page(data + bytes - 1);
    if (madvise(first, page, populate_write) != 0) return false;
    if (last != first && madvise(last, page, populate_write) != 0) return false;
#else
    (void)data, (void)bytes;
#endif
    return true;
}

// The first fields of every numpy dtype: part of the ABI of numpy 2 (ndarraytypes.h); the kernel is
// not loaded with another major version.
struct DtypeFields {
    PyObject head;
    PyTypeObject* scalar_type;
    char kind, character, byte_order, unused;
    int number;
};

// The first fields of every numpy array.
struct ArrayFields {
    PyObject head;
    char* data;
    int ndim;
    Py_ssize_t *shape, *strides;
    PyObject* base;
    DtypeFields* dtype;
    int flags;
};

// A memory range: [start, end).
struct Span {
    const char *start, *end;
};

inline void sort(std::vector<Span>& spans) {
    const auto before = [](const Span& a, const Span& b) { return a.start < b.start; };
    // The arrays of most trees were allocated in order, so their memory is sorted already, or
    // consists of a few sorted runs, which a merge sort needs fewer comparisons for.
    if (!std::is_sorted(spans.begin(), spans.end(), before)) {
        std::stable_sort(spans.begin(), spans.end(), before);
    }
}

// Whether memory is written twice, or both written and read. Sorts the spans.
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
