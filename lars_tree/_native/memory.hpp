// The memory of numpy arrays, by the buffer protocol, and of torch tensors, by DLPack.
//
// What is not plain (of another type, layout or dtype, read-only, freed) is not read: the caller
// then leaves it to Python, which has the checks and their messages.
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

// How the arrays of one library are read.
class Reader {
public:
    // `types` are those of plain arrays. `tensors` is None for what has the buffer protocol, or the
    // capsule of DLPack's exchange table and the torch methods untyped_storage, nbytes and
    // resizable (of that), storage_offset and is_neg. `as_bits` views a bfloat16 array, which has
    // no buffer, as uint16; it is True where arrays of uint16 are such views already, and None for
    // neither.
    bool open(PyObject* types_given, PyObject* tensors, PyObject* as_bits_given) {
        types = types_given;
        as_bits = as_bits_given;
        if (tensors == Py_None) return true;
        PyObject* capsule;
        if (!PyArg_ParseTuple(tensors, "OOOOOO", &capsule, &untyped_storage, &nbytes, &resizable,
                              &storage_offset, &is_neg)) {
            return false;
        }
        api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        while (api && api->major > 1) api = api->previous;
        return !PyErr_Occurred();
    }

    // Reads an array; false if it is not plain, or with an exception set that has nothing to do
    // with that. `buffer` is to be released when the memory is no longer looked at.
    bool read(PyObject* x, bool writable, Memory& to, Py_buffer& buffer) const {
        const bool done =
            has_plain_type(x) &&
            (untyped_storage ? read_tensor(x, writable, to) : read_buffer(x, writable, to, buffer));
        if (!done) {
            for (PyObject* expected : {PyExc_BufferError, PyExc_TypeError, PyExc_ValueError,
                                       PyExc_RuntimeError, PyExc_AttributeError}) {
                if (PyErr_Occurred() && PyErr_ExceptionMatches(expected)) call_python(PyErr_Clear);
            }
            return false;
        }
        return reinterpret_cast<std::uintptr_t>(to.data) % Vector::item_size(to.format) == 0;
    }

    // Where an array of one int64 has its number, to be written to; null if that is not plain.
    std::int64_t* read_counter(PyObject* x, Py_buffer& buffer) const {
        if (call_python(PyObject_GetBuffer, x, &buffer, PyBUF_WRITABLE | PyBUF_FORMAT) != 0) {
            call_python(PyErr_Clear);
            return nullptr;
        }
        const char* format = buffer.format ? buffer.format : "B";
        const bool is_int64 = buffer.itemsize == 8 && (format[0] == 'l' || format[0] == 'q');
        if (!is_int64 || format[1] != '\0' || buffer.len != 8) return nullptr;
        return static_cast<std::int64_t*>(buffer.buf);
    }

private:
    bool has_plain_type(PyObject* x) const {
        for (Py_ssize_t i = 0; i < PyTuple_Size(types); ++i) {
            if (reinterpret_cast<PyObject*>(Py_TYPE(x)) == PyTuple_GetItem(types, i)) return true;
        }
        return false;
    }

    bool read_buffer(PyObject* x, bool writable, Memory& to, Py_buffer& buffer) const {
        const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        bool are_bits = as_bits == Py_True;
        if (call_python(PyObject_GetBuffer, x, &buffer, flags) != 0) {
            if (as_bits == Py_None || are_bits || !PyErr_ExceptionMatches(PyExc_ValueError)) {
                return false;
            }
            call_python(PyErr_Clear);
            Owned bits(call_python(PyObject_CallFunctionObjArgs, as_bits, x, nullptr));
            PyObject* viewed = bits;
            if (!viewed || viewed == Py_None ||
                call_python(PyObject_GetBuffer, viewed, &buffer, flags) != 0) {
                return false;
            }
            are_bits = true;
        }
        const char* format = buffer.format ? buffer.format : "B";
        to.is_complex = format[0] == 'Z';
        if (to.is_complex) ++format;
        if (format[0] == '\0' || format[1] != '\0') return false;
        switch (format[0]) {
            case 'e':
                to.format = float16;
                break;
            case 'f':
                to.format = float32;
                break;
            case 'd':
                to.format = float64;
                break;
            case 'H':
                to.format = bfloat16;
                break;
            default:
                return false;
        }
        if (to.format == bfloat16 && !are_bits) return false;  // numbers, not bits
        if (buffer.ndim > 64) return false;
        to.data = static_cast<char*>(buffer.buf);
        to.item_size = buffer.itemsize;
        to.size = buffer.len / Vector::item_size(to.format);
        to.ndim = buffer.ndim;
        to.shape = buffer.shape;
        std::copy(buffer.strides, buffer.strides + buffer.ndim, to.strides);
        return !writable || !buffer.len || is_own(x, buffer) || is_writable(to.data, buffer.len);
    }

    // Whether numpy allocated the memory of an array, or of the array that it is a view of. Other
    // owners may have mapped theirs for reading alone without numpy knowing.
    bool is_own(PyObject* x, const Py_buffer& buffer) const {
        const int owns_data = 4;  // NPY_ARRAY_OWNDATA
        const auto* fields = reinterpret_cast<const ArrayFields*>(x);
        if (fields->data != buffer.buf || fields->ndim != buffer.ndim) return false;
        while (fields->base) {
            if (!has_plain_type(fields->base)) return false;
            fields = reinterpret_cast<const ArrayFields*>(fields->base);
        }
        return fields->flags & owns_data;
    }

    bool read_tensor(PyObject* x, bool writable, Memory& to) const {
        static_assert(sizeof(Py_ssize_t) == sizeof(std::int64_t) || sizeof(void*) < 8, "64 bits");
        DLTensor tensor;
        const int cpu = 1, real = 2, brain = 4;
        if (!api || sizeof(Py_ssize_t) != sizeof(std::int64_t)) return false;
        if (call_python(api->tensor_from_object, x, &tensor) != 0) return false;
        if (tensor.device_type != cpu || tensor.vector_lanes != 1 || tensor.ndim > 64) return false;
        if (tensor.code == brain && tensor.bits == 16) {
            to.format = bfloat16;
        } else if (tensor.code == real && tensor.bits >= 16 && tensor.bits <= 64) {
            to.format = tensor.bits == 16 ? float16 : tensor.bits == 32 ? float32 : float64;
        } else {
            return false;
        }
        to.is_complex = false;
        to.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
        to.item_size = tensor.bits / 8;
        to.ndim = tensor.ndim;
        to.shape = reinterpret_cast<const Py_ssize_t*>(tensor.shape);
        to.size = 1;
        for (int axis = tensor.ndim; axis-- > 0; to.size *= tensor.shape[axis]) {
            const std::int64_t stride = tensor.strides ? tensor.strides[axis] : to.size;
            to.strides[axis] = stride * to.item_size;
        }
        return to.size == 0 || (gives(Py_False, is_neg, x) && is_held(x, writable, to));
    }

    // Whether the storage of a tensor without gaps has all of its memory, as it may have been freed
    // or cut short, and whether it can be written to, if it is memory that is not torch's own.
    bool is_held(PyObject* x, bool writable, const Memory& memory) const {
        Owned storage(call_python(PyObject_CallFunctionObjArgs, untyped_storage, x, nullptr));
        if (!storage) return false;
        const long long offset = number(storage_offset, x);
        if (!memory.data || offset < 0) return false;
        const long long room = number(nbytes, storage);
        const long long needed = (offset + static_cast<long long>(memory.size)) * memory.item_size;
        if (room < needed) return false;
        if (!writable || gives(Py_True, resizable, storage)) return true;
        return !PyErr_Occurred() && is_writable(memory.data, memory.bytes());
    }

    static long long number(PyObject* method, PyObject* x) {
        Owned result(call_python(PyObject_CallFunctionObjArgs, method, x, nullptr));
        PyObject* found = result;
        return found ? call_python(PyLong_AsLongLong, found) : -1;
    }

    // Whether the method gives this bool; false too with an exception set.
    static bool gives(PyObject* expected, PyObject* method, PyObject* x) {
        Owned result(call_python(PyObject_CallFunctionObjArgs, method, x, nullptr));
        return result == expected;
    }

    PyObject *types = nullptr, *as_bits = nullptr;
    PyObject *untyped_storage = nullptr, *nbytes = nullptr, *resizable = nullptr,
             *storage_offset = nullptr, *is_neg = nullptr;
    DLPackExchangeAPI* api = nullptr;
};

// A stretch of memory.
struct Stretch {
    const char *start, *end;
};

inline void sort(std::vector<Stretch>& stretches) {
    const auto before = [](const Stretch& a, const Stretch& b) { return a.start < b.start; };
    // As the allocator hands it out, memory is most often in order.
    if (!std::is_sorted(stretches.begin(), stretches.end(), before)) {
        std::sort(stretches.begin(), stretches.end(), before);
    }
}

// Whether some memory that is written is written twice, or read too. Sorts the stretches.
inline bool overlap(std::vector<Stretch>& written, std::vector<Stretch>& read) {
    sort(written);
    sort(read);
    const char *written_to = nullptr, *read_to = nullptr;
    std::size_t next = 0;
    for (const Stretch& x : written) {
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
