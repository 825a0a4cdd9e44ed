// The binding of the native engine: the Python types Reader and Plan. _kernel.pyi documents them.
//
// A plan collects layers (`prepare`), with references to the arrays, and then updates them without
// the GIL. Everything that can fail happens before the first write.
#pragma once

#include "leaves.hpp"
#include "step.hpp"

namespace {

using namespace lars;

const Py_ssize_t prefetch_distance = 8;

// Prefetches the first bytes of an object that is used soon.
inline void prefetch(const void* object) {
#if defined(__GNUC__)
    __builtin_prefetch(object);
    __builtin_prefetch(static_cast<const char*>(object) + 64);
#else
    (void)object;
#endif
}

bool is_reader(PyObject* x) {
    return PyType_GetSlot(Py_TYPE(x), Py_tp_dealloc) ==
           reinterpret_cast<void*>(&free_object<Reader>);
}

struct Plan {
    bool open(PyObject* arguments, PyObject* keywords) {
        static const char* names[] = {"threads", "instruction_set", nullptr};
        Py_ssize_t max_threads = 1;
        int number = 0;
        if (!owned || !written || !call_python([&] {
                return PyArg_ParseTupleAndKeywords(
                    arguments, keywords, "ni", const_cast<char**>(names), &max_threads, &number);
            })) {
            return false;
        }
        threads = max_threads > 0 ? max_threads : 1;
        set = static_cast<InstructionSet>(number);
        return true;
    }

    // Makes one or both passes without the GIL; false with an exception set.
    bool run(Passes passes, Norms* norms = nullptr, bool bounds = false) {
        try {
            GilReleased gil_released;
            step(leaves.layers.data(), leaves.layers.size(), threads, set, passes, norms, bounds);
        } catch (const std::bad_alloc&) {
            call_python(PyErr_NoMemory);
            return false;
        }
        return true;
    }

    // Whether the layers may be written to; false with an exception set.
    bool can_write() const {
        if (!only_measures) return true;
        call_python(PyErr_SetString, PyExc_ValueError, "this plan can only be measured");
        return false;
    }

    void count_step() {
        if (counter) ++*counter;
    }

    Leaves leaves;
    bool only_measures = false;
    Buffer counter_buffer;
    std::int64_t* counter = nullptr;
    std::size_t threads = 1;
    InstructionSet set = baseline_set;
    OwnedList owned;    // the lists that `prepare` was given
    OwnedList written;  // the given arrays that are written to
};

Plan& plan_of(PyObject* self) { return content_of<Plan>(self); }

// The arguments of one call of `prepare`.
struct Columns {
    PyObject *ws, *dcdws, *outs, *rules, *velocities = Py_None, *new_ws = Py_None,
                                         *new_velocities = Py_None, *indices = Py_None;
    Results results;

    // False with an exception set.
    bool check() {
        const Py_ssize_t count = PyList_Size(ws);
        for (PyObject* list : {dcdws, outs, rules, velocities, new_ws, new_velocities}) {
            if (!is_column(list, count)) return false;
        }
        results = outs != Py_None     ? Results::in_place
                  : new_ws != Py_None ? Results::new_arrays
                                      : Results::none;
        if (results != Results::new_arrays || velocities == Py_None || new_velocities != Py_None) {
            return true;
        }
        call_python(PyErr_SetString, PyExc_ValueError, "expected new_velocities");
        return false;
    }
};

// Adds leaf i to the plan. Returns 1 if it is added, 0 if it is not supported, and -1 with an
// exception set.
int add_leaf(Plan& plan, const Reader& reader, const Columns& columns, Py_ssize_t i) {
    const Results results = columns.results;
    const bool in_place = results == Results::in_place;
    const Arrays given = {PyList_GetItem(columns.ws, i), PyList_GetItem(columns.dcdws, i),
                          item(columns.outs, i), item(columns.velocities, i)};
    PyObject* rule = PyList_GetItem(columns.rules, i);
    if (PyErr_Occurred()) return -1;  // a callback has made a list shorter
    if (given.w == Py_None && given.dcdw == Py_None && !given.has_velocity() &&
        (!in_place || given.out == Py_None)) {
        return 1;  // a leaf without arrays
    }
    if (given.w == Py_None) return 0;
    if (given.dcdw == Py_None) {
        const bool added =
            in_place && given.out == given.w && plan.leaves.add_unchanged(reader, given);
        return PyErr_Occurred() ? -1 : added;
    }
    NewArrays made;
    if (!plan.leaves.add(reader, given, rule, results, i, made)) return PyErr_Occurred() ? -1 : 0;
    if (in_place) {
        if (!plan.written.append(given.out)) return -1;
        return !given.has_velocity() || plan.written.append(given.velocity) ? 1 : -1;
    }
    if (results == Results::none) return 1;
    if (!put(columns.new_ws, i, made.out)) return -1;
    return !given.has_velocity() || put(columns.new_velocities, i, made.velocity) ? 1 : -1;
}

PyObject* prepare(PyObject* self, PyObject* arguments, PyObject* keywords) {
    static const char* names[] = {"reader",     "ws",     "dcdws",          "outs",    "rules",
                                  "velocities", "new_ws", "new_velocities", "indices", nullptr};
    PyObject* reader_object;
    Columns columns;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO!O!OO!|OOOO",
                                     const_cast<char**>(names), &reader_object, &PyList_Type,
                                     &columns.ws, &PyList_Type, &columns.dcdws, &columns.outs,
                                     &PyList_Type, &columns.rules, &columns.velocities,
                                     &columns.new_ws, &columns.new_velocities, &columns.indices)) {
        return nullptr;
    }
    if (!is_reader(reader_object)) {
        return call_python(PyErr_Format, PyExc_TypeError, "expected a Reader, got %R",
                           Py_TYPE(reader_object));
    }
    if (!columns.check()) return nullptr;
    const CriticalSection lock(self);  // another thread may ask for the spans
    Plan& plan = plan_of(self);
    if (columns.indices != Py_None && !PyList_Check(columns.indices)) {
        return call_python(PyErr_Format, PyExc_TypeError, "expected a list of indices, got %R",
                           Py_TYPE(columns.indices));
    }
    plan.only_measures |= columns.results == Results::none;
    const Reader& reader = content_of<Reader>(reader_object);
    for (PyObject* list : {columns.ws, columns.dcdws, columns.outs, columns.rules,
                           columns.velocities, columns.new_ws, columns.new_velocities}) {
        if (!plan.owned.append(list)) return nullptr;
    }
    try {
        OwnedList rest;
        if (!rest) return nullptr;
        const bool all = columns.indices == Py_None;
        const Py_ssize_t count = PyList_Size(all ? columns.ws : columns.indices);
        plan.leaves.reserve(static_cast<std::size_t>(count), columns.velocities != Py_None);
        for (Py_ssize_t k = 0; k < count; ++k) {
            Py_ssize_t i = k;
            if (!all) {
                PyObject* index = PyList_GetItem(columns.indices, k);
                i = index ? call_python(PyLong_AsSsize_t, index) : -1;
                if (PyErr_Occurred()) return nullptr;
            } else {  // a large tree does not fit into the cache
                for (PyObject* list : {columns.ws, columns.dcdws, columns.velocities}) {
                    if (list == Py_None) continue;
                    if (i + 2 * prefetch_distance < count) {
                        prefetch(PyList_GetItem(list, i + 2 * prefetch_distance));
                    }
                    if (i + prefetch_distance < count) {
                        prefetch(reader.next_read(PyList_GetItem(list, i + prefetch_distance)));
                    }
                }
            }
            const int added = add_leaf(plan, reader, columns, i);
            if (added < 0) return nullptr;
            if (added) continue;
            Owned index(call_python(PyLong_FromSsize_t, i));
            if (!index || !rest.append(index)) return nullptr;
        }
        return Py_NewRef(rest);
    } catch (const std::bad_alloc&) {
        return call_python(PyErr_NoMemory);
    }
}

PyObject* count(PyObject* self, PyObject* counter) {
    const CriticalSection lock(self);
    Plan& plan = plan_of(self);
    if (plan.counter) return Py_NewRef(Py_False);  // a plan has at most one counter
    if (!Reader::read_counter(counter, plan.counter_buffer.view)) {
        plan.counter_buffer.release();
        return Py_NewRef(Py_False);
    }
    auto* number = static_cast<std::int64_t*>(plan.counter_buffer.view.buf);
    try {
        plan.leaves.add_counter(number);
    } catch (const std::bad_alloc&) {
        plan.counter_buffer.release();
        return call_python(PyErr_NoMemory);
    }
    plan.counter = number;
    return Py_NewRef(Py_True);
}

// Appends pairs of addresses to the spans; false with an exception set.
bool append_spans(PyObject* pairs, std::vector<Span>& spans) {
    for (Py_ssize_t i = 0; pairs && i < PyList_Size(pairs); ++i) {
        unsigned long long start, end;
        PyObject* pair = PyList_GetItem(pairs, i);
        if (!PyTuple_Check(pair)) {
            call_python(PyErr_SetString, PyExc_TypeError, "expected pairs of addresses");
            return false;
        }
        if (!PyArg_ParseTuple(pair, "KK", &start, &end)) return false;
        spans.push_back({reinterpret_cast<const char*>(static_cast<std::uintptr_t>(start)),
                         reinterpret_cast<const char*>(static_cast<std::uintptr_t>(end))});
    }
    return true;
}

PyObject* overlaps(PyObject* self, PyObject* arguments) {
    PyObject *written = nullptr, *read = nullptr;
    if (!PyArg_ParseTuple(arguments, "|O!O!", &PyList_Type, &written, &PyList_Type, &read)) {
        return nullptr;
    }
    const CriticalSection lock(self);
    Leaves& leaves = plan_of(self).leaves;
    if (!written && !read) return PyBool_FromLong(overlap(leaves.written, leaves.read));
    try {
        std::vector<Span> all_written = leaves.written, all_read = leaves.read;
        if (!append_spans(written, all_written) || !append_spans(read, all_read)) return nullptr;
        return PyBool_FromLong(overlap(all_written, all_read));
    } catch (const std::bad_alloc&) {
        return call_python(PyErr_NoMemory);
    }
}

PyObject* spans(PyObject* self, PyObject*) {
    const CriticalSection lock(self);
    OwnedList found;
    for (const Span& x : plan_of(self).leaves.written) {
        const auto start =
            static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(x.start));
        const auto end = static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(x.end));
        Owned pair(call_python([=] { return Py_BuildValue("KK", start, end); }));
        if (!found || !pair || !found.append(pair)) return nullptr;
    }
    return Py_NewRef(found);
}

// The norms in a bytearray; null with an exception set if its size does not match this plan.
Norms* norms_in(PyObject* bytes, const Plan& plan) {
    const auto size = static_cast<Py_ssize_t>(plan.leaves.layers.size() * sizeof(Norms));
    if (PyByteArray_Check(bytes) && PyByteArray_Size(bytes) == size) {
        return reinterpret_cast<Norms*>(PyByteArray_AsString(bytes));
    }
    call_python(PyErr_SetString, PyExc_ValueError, "expected the norms of this plan");
    return nullptr;
}

PyObject* norms(PyObject* self, PyObject* arguments, PyObject* keywords) {
    static const char* names[] = {"bounds", nullptr};
    int bounds = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|p", const_cast<char**>(names),
                                     &bounds)) {
        return nullptr;
    }
    Plan& plan = plan_of(self);
    const std::size_t size = plan.leaves.layers.size() * sizeof(Norms);
    Owned bytes(call_python(PyByteArray_FromStringAndSize, nullptr, static_cast<Py_ssize_t>(size)));
    if (!bytes) return nullptr;
    if (!plan.run(Passes::norms, norms_in(bytes, plan), bounds != 0)) return nullptr;
    return Py_NewRef(bytes);
}

PyObject* measure(PyObject* self, PyObject* bytes) {
    const Plan& plan = plan_of(self);
    const std::vector<Layer>& layers = plan.leaves.layers;
    const Norms* known = norms_in(bytes, plan);
    if (!known) return nullptr;
    const std::size_t size = layers.size() * sizeof(Measured);
    Owned found(call_python(PyByteArray_FromStringAndSize, nullptr, static_cast<Py_ssize_t>(size)));
    if (!found) return nullptr;
    auto* rows = reinterpret_cast<Measured*>(PyByteArray_AsString(found));
    DefaultFloats guard;
    for (std::size_t i = 0; i < layers.size(); ++i) rows[i] = measured(layers[i], known[i]);
    return Py_NewRef(found);
}

PyObject* nonfinite(PyObject* self, PyObject* bytes) {
    Plan& plan = plan_of(self);
    const Norms* known = norms_in(bytes, plan);
    if (!known) return nullptr;
    try {
        std::vector<Py_ssize_t> bad;
        {
            GilReleased gil_released;
            for (std::size_t i = 0; i < plan.leaves.layers.size(); ++i) {
                const Layer& layer = plan.leaves.layers[i];
                if (!layer.rule->must_be_finite || prove_finite(layer, known[i])) continue;
                if (is_finite(layer, known[i], plan.set)) continue;
                bad.push_back(static_cast<Py_ssize_t>(i));
            }
        }
        return list_of(bad);
    } catch (const std::bad_alloc&) {
        return call_python(PyErr_NoMemory);
    }
}

PyObject* apply(PyObject* self, PyObject* bytes) {
    Plan& plan = plan_of(self);
    Norms* known = norms_in(bytes, plan);
    if (!known || !plan.can_write() || !plan.run(Passes::apply, known)) return nullptr;
    plan.count_step();
    return Py_NewRef(Py_None);
}

PyObject* step(PyObject* self, PyObject*) {
    Plan& plan = plan_of(self);
    if (!plan.can_write() || !plan.run(Passes::both)) return nullptr;
    plan.count_step();
    return Py_NewRef(Py_None);
}

PyObject* indices(PyObject* self, void*) { return list_of(plan_of(self).leaves.indices); }
PyObject* written(PyObject* self, void*) { return Py_NewRef(plan_of(self).written); }

PyMethodDef plan_methods[] = {
    {"prepare", method(prepare), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"count", count, METH_O, nullptr},
    {"overlaps", overlaps, METH_VARARGS, nullptr},
    {"spans", spans, METH_NOARGS, nullptr},
    {"norms", method(norms), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"measure", measure, METH_O, nullptr},
    {"nonfinite", nonfinite, METH_O, nullptr},
    {"apply", apply, METH_O, nullptr},
    {"step", step, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyObject* must_be_finite(PyObject* self, void*) {
    const Leaves& leaves = plan_of(self).leaves;
    return PyBool_FromLong(std::any_of(leaves.layers.begin(), leaves.layers.end(),
                                       [](const Layer& x) { return x.rule->must_be_finite; }));
}

PyGetSetDef plan_attributes[] = {
    {"must_be_finite", must_be_finite, nullptr, nullptr, nullptr},
    {"indices", indices, nullptr, nullptr, nullptr},
    {"written", written, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot reader_slots[] = {
    {Py_tp_new, slot(make_object<Reader>)},
    {Py_tp_dealloc, slot(free_object<Reader>)},
    {0, nullptr},
};

PyType_Slot plan_slots[] = {
    {Py_tp_new, slot(make_object<Plan>)},
    {Py_tp_dealloc, slot(free_object<Plan>)},
    {Py_tp_methods, plan_methods},
    {Py_tp_getset, plan_attributes},
    {0, nullptr},
};

PyType_Spec specs[] = {
    {"lars_tree._native._kernel.Reader", sizeof(Object<Reader>), 0, Py_TPFLAGS_DEFAULT,
     reader_slots},
    {"lars_tree._native._kernel.Plan", sizeof(Object<Plan>), 0, Py_TPFLAGS_DEFAULT, plan_slots},
};

int add_types(PyObject* module) {
    for (PyType_Spec& spec : specs) {
        Owned type(call_python(PyType_FromModuleAndSpec, module, &spec, nullptr));
        PyObject* made = type;
        if (!made || call_python(PyModule_AddType, module, reinterpret_cast<PyTypeObject*>(made))) {
            return -1;
        }
    }
    return 0;
}

}  // namespace
