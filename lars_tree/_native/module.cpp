// The binding of kernel.hpp and walk.hpp: buffers in, errors out, no arithmetic.
//
// `update` steps all arrays of a nest in one call, or none: where an array or an option is not of
// the plain kind that the kernel takes, it returns None and has written nothing. The caller then
// takes the way through Python, which gives the same bits, and whose checks give every error its
// message.

#include <deque>
#include <new>
#include <vector>

#include "memory.hpp"
#include "step.hpp"
#include "walk.hpp"

namespace {

using namespace lars;

// The fields of lars_tree._rule.Rule, by their places, as far as the kernel does them all.
bool read_rule(PyObject* fields, Rule& rule) {
    const struct {
        int place;
        double& number;
    } numbers[] = {{0, rule.lr},    {1, rule.decay_lambda}, {2, rule.trust_coefficient},
                   {3, rule.eps},   {4, rule.grad_scale},   {10, rule.momentum},
                   {11, rule.rate}, {15, rule.dampening}};
    for (const auto& to : numbers) {
        PyObject* number = PyTuple_GetItem(fields, to.place);
        if (!number || !PyFloat_Check(number)) return false;
        to.number = PyFloat_AsDouble(number);
    }
    rule.nesterov = PyTuple_GetItem(fields, 12) == Py_True;
    rule.maximize = PyTuple_GetItem(fields, 13) == Py_True;
    rule.joint_norm = PyTuple_GetItem(fields, 14) == Py_True;
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
    ~Buffer() {
        if (view.obj) call_python(PyBuffer_Release, &view);
    }
    Buffer(const Buffer&) = delete;
    Py_buffer view;
};

// The arrays of a leaf; without an `out` the results are new arrays, without a velocity there is
// no momentum: it is null where no leaf has one, and None where this one does not.
struct Arrays {
    PyObject *w, *dcdw, *out, *velocity;
};

// How new arrays come about: make(w), copy(velocity).
struct Makers {
    PyObject *make, *copy;
};

// What they made for a leaf.
struct Made {
    Owned out, velocity;
};

// All leaves of one call, read and checked.
class Leaves {
public:
    explicit Leaves(const Reader& reader) : reader(reader) {}

    // Adds a leaf, without touching its memory; false if it is not plain, or with an exception set.
    // Where there is no `out`, new arrays are made: `made` then owns them, also when it fails.
    bool add(const Arrays& given, const Makers& makers, PyObject* fields, Made& made) {
        Memory weights, gradients, results, moving = {};
        Buffer of_w, of_dcdw, of_out, of_velocity, of_copy;
        Arrays to = given;
        if (!read_rule_of(fields)) return false;
        if (to.velocity == Py_None) {
            if (rules.back().momentum != 0) return false;
            to.velocity = nullptr;
        }
        if (!reader.read(given.w, given.out == given.w, weights, of_w.view)) return false;
        if (!reader.read(given.dcdw, false, gradients, of_dcdw.view)) return false;
        if (!fit(weights, gradients) || !is_dense(weights)) return false;
        // Also before it is copied: copy(velocity) may take what is no such array, or was freed.
        if (to.velocity &&
            !read_velocity(to.velocity, given.out != nullptr, weights, moving, of_velocity.view)) {
            return false;
        }
        if (!given.out) {
            made.out.reset(
                call_python(PyObject_CallFunctionObjArgs, makers.make, given.w, nullptr));
            if (!made.out) return false;
            to.out = made.out;
            if (to.velocity) {
                made.velocity.reset(
                    call_python(PyObject_CallFunctionObjArgs, makers.copy, to.velocity, nullptr));
                if (!made.velocity) return false;
                if (!read_velocity(made.velocity, true, weights, moving, of_copy.view)) {
                    return false;
                }
            }
        }
        if (to.out == given.w) {
            results = weights;
        } else if (!reader.read(to.out, true, results, of_out.view)) {
            return false;
        }
        if (!fit(weights, results) || results.format != weights.format) return false;
        if (weights.size == 0) return true;
        layers.push_back({weights.data, gradients.data, results.data, moving.data, weights.size,
                          weights.format, gradients.format, &rules.back()});
        if (given.out) {
            note(results, written);
            if (to.velocity) note(moving, written);
            if (weights.data != results.data) note(weights, read);
            // A gradient may be the very memory of its own result: it is read first.
            if (gradients.data != results.data || gradients.format != results.format) {
                note(gradients, read);
            }
        }
        return true;
    }

    // Adds weights that stay as they are, as does their velocity, but that no other array may
    // overlap; false as above.
    bool keep(const Arrays& given) {
        Memory weights, moving;
        Buffer of_w, of_velocity;
        const bool moves = given.velocity && given.velocity != Py_None;
        if (!reader.read(given.w, true, weights, of_w.view) || !is_dense(weights)) return false;
        if (moves && !read_velocity(given.velocity, true, weights, moving, of_velocity.view)) {
            return false;
        }
        if (weights.size == 0) return true;
        note(weights, written);
        if (moves) note(moving, written);
        return true;
    }

    // Adds a number that is written, and that no array may overlap.
    void write_number(std::int64_t* x) {
        const char* start = reinterpret_cast<char*>(x);
        written.push_back({start, start + sizeof *x});
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
        return call_python([&] { return read_rule(fields, rules.back()); });
    }

    bool read_velocity(PyObject* x, bool writable, const Memory& weights, Memory& to,
                       Py_buffer& buffer) const {
        return reader.read(x, writable, to, buffer) && fit(weights, to) &&
               to.format == velocity_format(weights.format);
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

// A list of one item for each leaf, or None.
bool is_column(PyObject* list, Py_ssize_t count) {
    if (list == Py_None || (PyList_Check(list) && PyList_Size(list) == count)) return true;
    call_python(PyErr_SetString, PyExc_ValueError, "expected lists of one length");
    return false;
}

// The item, borrowed; null where there is no list.
PyObject* item(PyObject* list, Py_ssize_t i) {
    return list == Py_None ? nullptr : PyList_GetItem(list, i);
}

bool append(PyObject* list, PyObject* x) { return call_python(PyList_Append, list, x) == 0; }

const char update_doc[] =
    "update(ws, dcdws, outs, rules, velocities, counter, make, copy, begin, types, tensors,\n"
    "       as_bits, threads, instruction_set)\n--\n\n"
    "Step all arrays, and return the lists of new weights and of velocities; None if one array is\n"
    "not plain.\n\n"
    "outs are the arrays to write to, or None for new ones that make(w) and copy(velocity) give.\n"
    "velocities are stepped in place; None, for all or in the place of one, for no momentum.\n"
    "counter is None or an array of one int64, to which one is added. begin(written) is called\n"
    "when all is checked, with those of outs and velocities that are written to. See Reader in\n"
    "memory.hpp for types, tensors and as_bits.";

PyObject* update(PyObject*, PyObject* args) {
    PyObject *ws, *dcdws, *outs, *rules, *velocities, *counter, *begin, *types, *tensors, *as_bits;
    Makers makers;
    Py_ssize_t threads;
    int set;
    if (!PyArg_ParseTuple(args, "O!O!OO!OOOOOO!OOni", &PyList_Type, &ws, &PyList_Type, &dcdws,
                          &outs, &PyList_Type, &rules, &velocities, &counter, &makers.make,
                          &makers.copy, &begin, &PyTuple_Type, &types, &tensors, &as_bits, &threads,
                          &set)) {
        return nullptr;
    }
    try {
        Reader reader;
        if (!reader.open(types, tensors, as_bits)) return nullptr;
        const Py_ssize_t count = PyList_Size(ws);
        const bool in_place = outs != Py_None;
        for (PyObject* list : {dcdws, outs, rules, velocities}) {
            if (!is_column(list, count)) return nullptr;
        }
        // New arrays are put into lists of their own, which own them.
        const bool new_moves = !in_place && velocities != Py_None;
        Owned new_ws(in_place ? Py_NewRef(outs) : call_python(PyList_New, 0));
        Owned new_velocities(new_moves ? call_python(PyList_New, 0) : Py_NewRef(velocities));
        Owned written(call_python(PyList_New, 0));
        if (!new_ws || !new_velocities || !written) return nullptr;
        Buffer of_counter;
        std::int64_t* counted = nullptr;
        if (counter != Py_None) {
            counted = reader.read_counter(counter, of_counter.view);
            if (PyErr_Occurred()) return nullptr;
            if (!counted) Py_RETURN_NONE;
        }
        Leaves leaves(reader);
        if (counted) leaves.write_number(counted);
        for (Py_ssize_t i = 0; i < count; ++i) {
            if (i + ahead < count) {  // the arrays of a large tree are in no cache
                prefetch(PyList_GetItem(ws, i + ahead));
                prefetch(PyList_GetItem(dcdws, i + ahead));
                if (velocities != Py_None) prefetch(PyList_GetItem(velocities, i + ahead));
            }
            const Arrays given = {PyList_GetItem(ws, i), PyList_GetItem(dcdws, i), item(outs, i),
                                  item(velocities, i)};
            PyObject* rule = PyList_GetItem(rules, i);
            if (PyErr_Occurred()) return nullptr;  // a list has become shorter
            const bool is_kept = given.dcdw == Py_None && given.w != Py_None;
            const bool moves = given.velocity && given.velocity != Py_None;
            if (given.w == Py_None && given.dcdw == Py_None && !moves &&
                (!in_place || given.out == Py_None)) {  // nothing there
                if (!in_place && !append(new_ws, Py_None)) return nullptr;
                if (new_moves && !append(new_velocities, Py_None)) return nullptr;
                continue;
            }
            if (is_kept && in_place && given.out == given.w) {
                if (!leaves.keep(given)) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
                continue;
            }
            if (given.w == Py_None || is_kept) Py_RETURN_NONE;
            Made made;
            const bool plain = leaves.add(given, makers, rule, made);
            if (!plain) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
            if (in_place) {
                if (!append(written, given.out)) return nullptr;
                if (moves && !append(written, given.velocity)) return nullptr;
            } else {
                if (!append(new_ws, made.out)) return nullptr;
                if (new_moves && !append(new_velocities, moves ? made.velocity : Py_None)) {
                    return nullptr;
                }
            }
        }
        if (leaves.overlap()) Py_RETURN_NONE;
        if (begin != Py_None) {
            PyObject* list = written;
            Owned begun(call_python(PyObject_CallFunctionObjArgs, begin, list, nullptr));
            if (!begun) return nullptr;
        }
        // From the step on, nothing can fail, and no signal is handled.
        PyObject *of_ws = new_ws, *of_velocities = new_velocities;
        Owned results(call_python(PyTuple_Pack, 2, of_ws, of_velocities));
        if (!results) return nullptr;
        {
            Unlocked others_run;
            leaves.step(threads > 0 ? threads : 1, static_cast<InstructionSet>(set));
        }
        if (counted) ++*counted;
        return Py_NewRef(results);
    } catch (const std::bad_alloc&) {
        return call_python(PyErr_NoMemory);
    }
}

const char collect_doc[] =
    "collect(tree, found, kinds, kind_of, others)\n--\n\n"
    "Append the leaves of a nest to a list; others(node, found) does so for the nodes of kinds\n"
    "that are not walked here.";

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

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_kernel",
                          "The native kernel of lars_tree.",
                          0,
                          methods,
                          slots,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernel() { return PyModuleDef_Init(&definition); }
