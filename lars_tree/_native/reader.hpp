// Reads numpy arrays by the fields of numpy's ABI, torch tensors through DLPack, and rules by their
// fields.
//
// An array or rule that the kernel does not support (another type, memory layout or dtype,
// read-only or freed memory, an option that is an array) is not an error here: reading it returns
// false, and the leaf goes to an engine in Python.
#pragma once

#include "memory.hpp"
#include "python.hpp"
#include "rule.hpp"

namespace lars {

// Reads the arrays of one library, and rules.
class Reader {
public:
    // Takes the arguments of Reader in _kernel.pyi; returns false with an exception set. `tensors`
    // is None for numpy arrays. For torch it is a tuple of the capsule of DLPack's exchange table
    // and the methods untyped_storage, UntypedStorage.nbytes and .resizable, storage_offset and
    // is_neg. `as_bits` views a bfloat16 array as uint16, and is called with arrays of types that
    // numpy does not define itself. It is True if all uint16 arrays contain bfloat16 bits, and None
    // if bfloat16 is not supported.
    bool open(PyObject* arguments, PyObject* keywords) {
        static const char* names[] = {"types",   "fields",  "make", "copy",
                                      "tensors", "as_bits", nullptr};
        PyObject *fields, *tensors = Py_None;
        make_new = copy_of = as_bits = Py_None;
        if (!PyArg_ParseTupleAndKeywords(
                arguments, keywords, "O!O!|OOOO", const_cast<char**>(names), &PyTuple_Type, &types,
                &PyTuple_Type, &fields, &make_new, &copy_of, &tensors, &as_bits)) {
            return false;
        }
        for (PyObject* x : {types, make_new, copy_of, tensors, as_bits}) {
            if (!owned.append(x)) return false;
        }
        if (!find_fields(fields)) return false;
        if (tensors == Py_None) return true;
        PyObject* capsule;
        if (!PyTuple_Check(tensors)) {
            call_python(PyErr_SetString, PyExc_TypeError, "expected a tuple or None as tensors");
            return false;
        }
        if (!PyArg_ParseTuple(tensors, "OOOOOO", &capsule, &untyped_storage, &nbytes, &resizable,
                              &storage_offset, &is_neg)) {
            return false;
        }
        api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        while (api && api->major > 1) api = api->previous;
        return !PyErr_Occurred();
    }

    // Makes a new array for the result of w; false with an exception set.
    bool make(PyObject* w, Owned& to) const {
        to.reset(call_with(make_new, w));
        return to;
    }

    // Copies a velocity; false with an exception set.
    bool copy(PyObject* velocity, Owned& to) const {
        to.reset(call_with(copy_of, velocity));
        return to;
    }

    // Reads a rule; false if the kernel does not support it, or with an exception set.
    bool read_rule(PyObject* fields, Rule& rule) const {
        if (!PyTuple_Check(fields) || PyTuple_Size(fields) != field_count) {
            call_python(PyErr_SetString, PyExc_TypeError, "expected a rule, a tuple of its fields");
            return false;
        }
        for (const auto& number : numbers) {
            PyObject* x = PyTuple_GetItem(fields, number.index);
            if (!PyFloat_Check(x)) return false;
            rule.*number.field = PyFloat_AsDouble(x);
        }
        for (const auto& flag : flags) {
            rule.*flag.field = PyTuple_GetItem(fields, flag.index) == Py_True;
        }
        rule.must_be_finite = !is_text(PyTuple_GetItem(fields, nonfinite), "propagate");
        return PyTuple_GetItem(fields, layer_axis) == Py_None &&
               PyTuple_GetItem(fields, axis_name) == Py_None &&
               PyTuple_GetItem(fields, stop_gradients) == Py_True;
    }

    // Reads an array; false if the kernel does not support it, or with an exception set if reading
    // raised one.
    bool read(PyObject* x, bool writable, Memory& to) const {
        const bool is_read =
            has_supported_type(x) &&
            (untyped_storage ? read_tensor(x, writable, to) : read_array(x, writable, to));
        if (!is_read) {
            for (PyObject* expected : {PyExc_BufferError, PyExc_TypeError, PyExc_ValueError,
                                       PyExc_RuntimeError, PyExc_AttributeError}) {
                if (PyErr_Occurred() && PyErr_ExceptionMatches(expected)) call_python(PyErr_Clear);
            }
            return false;
        }
        return reinterpret_cast<std::uintptr_t>(to.data) % item_size(to.format) == 0;
    }

    // The memory outside of the object that `read` needs first, to prefetch it.
    const void* next_read(PyObject* x) const {
        if (!x || !has_supported_type(x)) return x;
        // A tensor object begins with a pointer to the tensor.
        if (untyped_storage) return *reinterpret_cast<void* const*>(x + 1);
        return reinterpret_cast<const ArrayFields*>(x)->shape;  // the strides follow it
    }

    // Reads a writable array of one int64; false if it is not such an array.
    static bool read_counter(PyObject* x, Py_buffer& buffer) {
        if (call_python(PyObject_GetBuffer, x, &buffer, PyBUF_WRITABLE | PyBUF_FORMAT) != 0) {
            call_python(PyErr_Clear);
            return false;
        }
        const char* format = buffer.format ? buffer.format : "B";
        const bool is_int64 = buffer.itemsize == 8 && (format[0] == 'l' || format[0] == 'q');
        return is_int64 && format[1] == '\0' && buffer.len == 8;
    }

private:
    bool has_supported_type(PyObject* x) const {
        for (Py_ssize_t i = 0; i < PyTuple_Size(types); ++i) {
            if (reinterpret_cast<PyObject*>(Py_TYPE(x)) == PyTuple_GetItem(types, i)) return true;
        }
        return false;
    }

    bool read_array(PyObject* x, bool writable, Memory& to) const {
        const auto* fields = reinterpret_cast<const ArrayFields*>(x);
        if (!find_format(x, fields->dtype, to)) return false;
        to.data = fields->data;
        to.item_bytes = static_cast<Py_ssize_t>(item_size(to.format) * (to.is_complex ? 2 : 1));
        if (!to.set_axes(fields->ndim, fields->shape, fields->strides, 1)) return false;
        if (!writable) return true;
        const int writeable = 0x400, warns = static_cast<int>(1u << 31);  // NPY_ARRAY_WRITEABLE...
        if ((fields->flags & (writeable | warns)) != writeable) return false;
        return !to.size || owns_memory(fields) || is_writable(to.data, to.bytes());
    }

    // Sets the format of an array; false if the kernel does not support it.
    bool find_format(PyObject* x, const DtypeFields* dtype, Memory& to) const {
        to.is_complex = false;
        if (dtype->byte_order != '=') return false;
        switch (dtype->number) {
            case 23:  // NPY_HALF
                to.format = float16;
                return true;
            case 14:  // NPY_CFLOAT
                to.is_complex = true;
                [[fallthrough]];
            case 11:  // NPY_FLOAT
                to.format = float32;
                return true;
            case 15:  // NPY_CDOUBLE
                to.is_complex = true;
                [[fallthrough]];
            case 12:  // NPY_DOUBLE
                to.format = float64;
                return true;
        }
        to.format = bfloat16;
        const int uint16 = 4, first_user_type = 256;  // NPY_USHORT, NPY_USERDEF
        if (as_bits == Py_True) return dtype->number == uint16;
        if (as_bits == Py_None || dtype->number < first_user_type) return false;
        Owned bits(call_with(as_bits, x));
        PyObject* viewed = bits;
        if (!viewed || !has_supported_type(viewed)) return false;
        return reinterpret_cast<const ArrayFields*>(viewed)->dtype->number == uint16;
    }

    // Whether numpy allocated the memory of the array, or of its base if it is a view. Other memory
    // may be mapped read-only although numpy reports it as writable.
    bool owns_memory(const ArrayFields* fields) const {
        const int owns_data = 4;  // NPY_ARRAY_OWNDATA
        while (fields->base) {
            if (!has_supported_type(fields->base)) return false;
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
        if (tensor.device_type != cpu || tensor.vector_lanes != 1) return false;
        if (tensor.code == brain && tensor.bits == 16) {
            to.format = bfloat16;
        } else if (tensor.code == real && tensor.bits >= 16 && tensor.bits <= 64) {
            to.format = tensor.bits == 16 ? float16 : tensor.bits == 32 ? float32 : float64;
        } else {
            return false;
        }
        to.is_complex = false;
        to.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
        to.item_bytes = tensor.bits / 8;
        if (tensor.ndim && !tensor.strides) return false;
        if (!to.set_axes(tensor.ndim, tensor.shape, tensor.strides, to.item_bytes)) return false;
        return to.size == 0 || (returns(Py_False, is_neg, x) && storage_holds(x, writable, to));
    }

    // Whether the storage of a dense tensor contains all its elements (a storage can be freed or
    // resized). If `writable`, memory that torch did not allocate is tested for being writable.
    bool storage_holds(PyObject* x, bool writable, const Memory& memory) const {
        Owned storage(call_with(untyped_storage, x));
        if (!storage) return false;
        const long long offset = number(storage_offset, x);
        if (!memory.data || offset < 0) return false;
        const long long available = number(nbytes, storage);
        const long long needed = (offset + static_cast<long long>(memory.size)) * memory.item_bytes;
        if (available < needed) return false;
        if (!writable || returns(Py_True, resizable, storage)) return true;
        return !PyErr_Occurred() && is_writable(memory.data, memory.bytes());
    }

    // The int that the method returns; -1 with an exception set.
    static long long number(PyObject* method, PyObject* x) {
        Owned result(call_with(method, x));
        PyObject* found = result;
        return found ? call_python(PyLong_AsLongLong, found) : -1;
    }

    // Whether the method returns the expected bool; also false if the method raises.
    static bool returns(PyObject* expected, PyObject* method, PyObject* x) {
        Owned result(call_with(method, x));
        return result == expected;
    }

    // Looks up the indices of the fields of a rule; false with an exception set if one is missing.
    bool find_fields(PyObject* names) {
        for (auto& number : numbers) number.index = index_of(number.name, names);
        for (auto& flag : flags) flag.index = index_of(flag.name, names);
        nonfinite = index_of("nonfinite", names);
        layer_axis = index_of("layer_axis", names);
        axis_name = index_of("axis_name", names);
        stop_gradients = index_of("stop_gradients", names);
        field_count = PyTuple_Size(names);
        return !PyErr_Occurred();
    }

    static Py_ssize_t index_of(const char* name, PyObject* names) {
        for (Py_ssize_t i = 0; i < PyTuple_Size(names); ++i) {
            if (is_text(PyTuple_GetItem(names, i), name)) return i;
        }
        call_python([name] { PyErr_Format(PyExc_ValueError, "a rule has no field %s", name); });
        return -1;
    }

    static bool is_text(PyObject* x, const char* text) {
        return PyUnicode_Check(x) && PyUnicode_CompareWithASCIIString(x, text) == 0;
    }

    template <class Type>
    struct Field {
        const char* name;
        Type Rule::* field;
        Py_ssize_t index;
    };

    Field<double> numbers[8] = {{"lr_before_momentum", &Rule::lr_before_momentum, 0},
                                {"decay_lambda", &Rule::decay_lambda, 0},
                                {"trust_coefficient", &Rule::trust_coefficient, 0},
                                {"eps", &Rule::eps, 0},
                                {"grad_scale", &Rule::grad_scale, 0},
                                {"momentum", &Rule::momentum, 0},
                                {"lr_after_momentum", &Rule::lr_after_momentum, 0},
                                {"dampening", &Rule::dampening, 0}};
    Field<bool> flags[5] = {{"adapt", &Rule::adapt, 0},
                            {"trust_clip", &Rule::trust_clip, 0},
                            {"joint_norm", &Rule::joint_norm, 0},
                            {"nesterov", &Rule::nesterov, 0},
                            {"maximize", &Rule::maximize, 0}};
    Py_ssize_t nonfinite = 0, layer_axis = 0, axis_name = 0, stop_gradients = 0, field_count = 0;

    OwnedList owned;  // the references that the pointers below borrow
    PyObject *types = nullptr, *make_new = nullptr, *copy_of = nullptr, *as_bits = nullptr;
    PyObject *untyped_storage = nullptr, *nbytes = nullptr, *resizable = nullptr,
             *storage_offset = nullptr, *is_neg = nullptr;
    DLPackExchangeAPI* api = nullptr;
};

}  // namespace lars
