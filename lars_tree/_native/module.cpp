// The binding of kernel.hpp and walk.hpp: buffers in, errors out, no arithmetic.
//
// `update` steps all arrays of a nest in one call, or none: where an array or an option is not of the
// plain kind that the kernel takes, it returns None and has written nothing. The caller then takes
// the way through Python, which gives the same bits, and whose checks give every error its message.

#include <deque>
#include <new>
#include <vector>

#include "memory.hpp"
#include "walk.hpp"

namespace {

using namespace lars;

// The fields of lars_tree._rule.Rule, in their order, as far as the kernel does them all.
bool read_rule(PyObject* fields, Rule& rule) {
    double* numbers[] = {&rule.lr, &rule.decay_lambda, &rule.trust_coefficient, &rule.eps,
                         &rule.grad_scale};
    for (int i = 0; i < 5; ++i) {
        PyObject* number = PyTuple_GetItem(fields, i);
        if (!number || !PyFloat_Check(number)) return false;
        *numbers[i] = PyFloat_AsDouble(number);
    }
    rule.adapt = PyTuple_GetItem(fields, 5) == Py_True;
    rule.trust_clip = PyTuple_GetItem(fields, 6) == Py_True;
    PyObject* nonfinite = PyTuple_GetItem(fields, 7);
    return PyUnicode_CompareWithASCIIString(nonfinite, "propagate") == 0 &&
           PyTuple_GetItem(fields, 8) == Py_None &&  // layer_axis
           PyTuple_GetItem(fields, 9) == Py_True;    // stop_gradients
}

const Py_ssize_t ahead = 8;

// Has the first bytes of an object fetched, to be looked at a little later.
inline void prefetch(const void* object) {
#if defined(__GNUC__)
    __builtin_prefetch(object);
    __builtin_prefetch(static_cast<const char*>(object) + 64);
#else
    (void)object;
#endif
}

class Buffer {
public:
    Buffer() { view.obj = nullptr; }
    ~Buffer() { PyBuffer_Release(&view); }
    Buffer(const Buffer&) = delete;
    Py_buffer view;
};

// All leaves of one call, read and checked.
class Leaves {
public:
    explicit Leaves(const Reader& reader) : reader(reader) {}

    // Adds a leaf, without touching its memory; false if it is not plain, or with an exception set.
    // Without an array to write to, make(w) gives one.
    bool add(PyObject* w, PyObject* dcdw, PyObject*& out, PyObject* make, PyObject* fields) {
        Memory weights, gradients, results;
        Buffer of_w, of_dcdw, of_out;
        const bool in_place = out == w, made = !out;
        if (!read_rule_of(fields)) return false;
        if (!reader.read(w, in_place, weights, of_w.view)) return false;
        if (!reader.read(dcdw, false, gradients, of_dcdw.view)) return false;
        if (!fit(weights, gradients) || !is_dense(weights)) return false;
        if (made) {
            out = PyObject_CallFunctionObjArgs(make, w, nullptr);
            if (!out) return false;
        }
        if (in_place) {
            results = weights;
        } else if (!reader.read(out, true, results, of_out.view)) {
            return false;
        }
        if (!fit(weights, results) || results.format != weights.format) return false;
        if (weights.size == 0) return true;
        layers.push_back({weights.data, gradients.data, results.data, weights.size, weights.format,
                          gradients.format, &rules.back()});
        if (!made) {
            note(results, written);
            if (weights.data != results.data) note(weights, read);
            // A gradient may be the very memory of its own result: it is read first.
            if (gradients.data != results.data || gradients.format != results.format) {
                note(gradients, read);
            }
        }
        return true;
    }

    // Adds weights that stay as they are; false as above.
    bool keep(PyObject* w) {
        Memory weights;
        Buffer of_w;
        if (!reader.read(w, true, weights, of_w.view) || !is_dense(weights)) return false;
        if (weights.size) note(weights, written);
        return true;
    }

    bool overlap() { return lars::overlap(written, read); }

    void step(std::size_t threads, InstructionSet set) const {
        lars::step(layers.data(), layers.size(), threads, set);
    }

private:
    bool read_rule_of(PyObject* fields) {
        if (fields == last) return true;  // most often one for all leaves
        rules.emplace_back();
        last = fields;
        return read_rule(fields, rules.back());
    }

    static bool fit(const Memory& a, const Memory& b) {
        return a.is_complex == b.is_complex && same_shape(a, b) && same_order(a, b);
    }

    static void note(const Memory& x, std::vector<Stretch>& among) {
        among.push_back({x.data, x.data + x.bytes()});
    }

    const Reader& reader;
    PyObject* last = nullptr;
    std::deque<Rule> rules;
    std::vector<Layer> layers;
    std::vector<Stretch> written, read;  // of arrays that are given, not made
};

const char update_doc[] =
    "update(ws, dcdws, outs, rules, make, begin, types, tensors, as_bits, threads,\n"
    "       instruction_set)\n--\n\n"
    "Step all arrays, and return the list of their results; None if one of them is not plain.\n\n"
    "outs are the arrays to write to, or None for new ones that make(w) gives. begin(written) is\n"
    "called when all is checked, with those of outs that are written to. See Reader in\n"
    "memory.hpp for types, tensors and as_bits.";

PyObject* update(PyObject*, PyObject* args) {
    PyObject *ws, *dcdws, *outs, *rules, *make, *begin, *types, *tensors, *as_bits;
    Py_ssize_t threads;
    int set;
    if (!PyArg_ParseTuple(args, "O!O!OO!OOO!OOni", &PyList_Type, &ws, &PyList_Type, &dcdws, &outs,
                          &PyList_Type, &rules, &make, &begin, &PyTuple_Type, &types, &tensors,
                          &as_bits, &threads, &set)) {
        return nullptr;
    }
    try {
        Reader reader;
        if (!reader.open(types, tensors, as_bits)) return nullptr;
        const Py_ssize_t count = PyList_Size(ws);
        const bool made = outs == Py_None;
        if (PyList_Size(dcdws) != count || PyList_Size(rules) != count ||
            (!made && PyList_Size(outs) != count)) {
            PyErr_SetString(PyExc_ValueError, "expected lists of one length");
            return nullptr;
        }
        Owned results(made ? PyList_New(count) : Py_NewRef(outs));
        if (!results) return nullptr;
        Owned written(PyList_New(0));
        if (!written) return nullptr;
        Leaves leaves(reader);
        for (Py_ssize_t i = 0; i < count; ++i) {
            if (i + ahead < count) {  // the arrays of a large tree are in no cache
                prefetch(PyList_GetItem(ws, i + ahead));
                prefetch(PyList_GetItem(dcdws, i + ahead));
            }
            PyObject *w = PyList_GetItem(ws, i), *dcdw = PyList_GetItem(dcdws, i);
            PyObject* out = made ? nullptr : PyList_GetItem(outs, i);
            if (dcdw == Py_None && out == (made ? nullptr : w)) {  // nothing to do
                if (w != Py_None && (made || !leaves.keep(w))) {
                    return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
                }
                if (made) PyList_SetItem(results, i, Py_NewRef(w));
                continue;
            }
            if (w == Py_None || dcdw == Py_None) Py_RETURN_NONE;
            const bool plain = leaves.add(w, dcdw, out, make, PyList_GetItem(rules, i));
            if (made && out) PyList_SetItem(results, i, out);
            if (PyErr_Occurred()) return nullptr;
            if (!plain) Py_RETURN_NONE;
            if (!made && PyList_Append(written, out) != 0) return nullptr;
        }
        if (leaves.overlap()) Py_RETURN_NONE;
        if (begin != Py_None) {
            PyObject* list = written;
            if (!Owned(PyObject_CallFunctionObjArgs(begin, list, nullptr))) return nullptr;
        }
        bool failed = false;
        Py_BEGIN_ALLOW_THREADS
        try {
            leaves.step(threads > 0 ? threads : 1, static_cast<InstructionSet>(set));
        } catch (const std::bad_alloc&) {
            failed = true;
        }
        Py_END_ALLOW_THREADS
        return failed ? PyErr_NoMemory() : Py_NewRef(results);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

const char collect_doc[] =
    "collect(tree, found, kinds, kind_of, others)\n--\n\n"
    "Append the leaves of a nest to a list; others(node, found) does so for the nodes of kinds that\n"
    "are not walked here.";

PyObject* collect(PyObject*, PyObject* args) {
    PyObject *tree, *found, *kinds, *kind_of, *others;
    if (!PyArg_ParseTuple(args, "OO!O!OO", &tree, &PyList_Type, &found, &PyDict_Type, &kinds,
                          &kind_of, &others)) {
        return nullptr;
    }
    if (!Walk(kinds, kind_of, others, found).collect(tree)) return nullptr;
    Py_RETURN_NONE;
}

const char match_doc[] =
    "match(tree, prefix, found, exact, kinds, kind_of, others)\n--\n\n"
    "Append the value that a prefix has for each leaf of a nest; whether it is a prefix.\n"
    "others(node, prefix, found, exact) does so for the nodes of kinds that are not walked here.";

PyObject* match(PyObject*, PyObject* args) {
    PyObject *tree, *prefix, *found, *kinds, *kind_of, *others;
    int exact;
    if (!PyArg_ParseTuple(args, "OOO!pO!OO", &tree, &prefix, &PyList_Type, &found, &exact,
                          &PyDict_Type, &kinds, &kind_of, &others)) {
        return nullptr;
    }
    const int matched = Walk(kinds, kind_of, others, found).match(tree, prefix, exact != 0);
    return matched < 0 ? nullptr : PyBool_FromLong(matched);
}

const char best_set_doc[] =
    "best_instruction_set()\n--\n\n"
    "The number of the best instruction set here: 0 none in particular, 1 AVX2, 2 AVX-512.";

PyObject* best_instruction_set(PyObject*, PyObject*) { return PyLong_FromLong(best_set()); }

PyMethodDef methods[] = {
    {"update", update, METH_VARARGS, update_doc},
    {"collect", collect, METH_VARARGS, collect_doc},
    {"match", match, METH_VARARGS, match_doc},
    {"best_instruction_set", best_instruction_set, METH_NOARGS, best_set_doc},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {
#ifdef Py_GIL_DISABLED
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernel", "The native kernel of lars_tree.", 0, methods, slots,
    nullptr,               nullptr,   nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernel() { return PyModuleDef_Init(&definition); }
