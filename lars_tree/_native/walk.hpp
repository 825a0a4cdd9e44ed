// Walks over trees, equivalent to _collect_in_python, _match_in_python and _fill in
// _tree/structure.py; _tree/kinds.py defines which objects are nodes.
//
// Dicts (also Containers), lists and tuples are walked here. All other nodes, and nodes that are
// too deep for the stack of a thread, are passed to the Python function. Python code may run during
// a walk and change the tree, so each item is owned while it is used, and the length of each node
// is checked again after each child.
#pragma once

#include "python.hpp"

namespace lars {

// Kinds of nodes, with their numbers in _tree/kinds.py.
enum Kind { leaf_kind = 0, plain_dict_kind = 1 };

// The number of levels that are walked here. They need 10 KB of the stack of a thread, which may be
// small (threading.stack_size). Deeper levels are walked in Python, which does not use the C stack.
const int max_depth = 32;

class Walk {
public:
    Walk(PyObject* kinds, PyObject* kind_of, PyObject* other_nodes, PyObject* found)
        : kinds(kinds), kind_of(kind_of), other_nodes(other_nodes), found(found) {}

    // Appends the leaves of the node; false with an exception set.
    bool collect(PyObject* node, int depth = 0) {
        const long kind = kind_of_node(node);
        if (kind == leaf_kind) return append(node);
        return kind >= 0 && collect_children(node, kind, depth);
    }

    // Appends the value of the prefix for each leaf of the node. Returns 1 if the prefix matches
    // the node, 0 if not, and -1 with an exception set.
    int match(PyObject* node, PyObject* prefix, bool exact, int depth = 0) {
        const long kind = kind_of_node(node), prefix_kind = kind_of_node(prefix);
        if (kind < 0 || prefix_kind < 0) return -1;
        if (kind == leaf_kind && prefix_kind == leaf_kind) {
            return append(prefix) ? 1 : -1;
        }
        if (kind == leaf_kind) return 0;
        return match_children(node, kind, prefix, prefix_kind, exact, depth);
    }

    // A new tree with the nodes of the given one, and with the values of the iterator `found` as
    // leaves: a new reference, or null with an exception set. Then the path of the node that raised
    // it is appended to the list `keys`, the innermost key first.
    PyObject* rebuild(PyObject* node, PyObject* keys, int depth = 0) {
        const long kind = kind_of_node(node);
        if (kind < 0) return nullptr;
        if (kind == leaf_kind) {
            PyObject* leaf = call_python(PyIter_Next, found);
            if (!leaf && !PyErr_Occurred()) call_python(PyErr_SetNone, PyExc_StopIteration);
            return leaf;
        }
        if (kind == plain_dict_kind && depth < max_depth && is_trusted(Py_TYPE(node))) {
            return rebuild_dict(node, keys, depth);
        }
        if (is_sequence(node) && depth < max_depth) return rebuild_sequence(node, keys, depth);
        return rebuild_in_python(node);
    }

private:
    PyObject* rebuild_in_python(PyObject* node) {
        return call_python(PyObject_CallFunctionObjArgs, other_nodes, node, found, nullptr);
    }

    long kind_of_node(PyObject* node) {
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(node));
        if (type == last_leaf_type) return leaf_kind;  // most nodes are leaves of one type
        const long kind = look_up(node, type);
        if (kind == leaf_kind) last_leaf_type.reset(Py_NewRef(type));
        return kind;
    }

    long look_up(PyObject* node, PyObject* type) {
        PyObject* known = call_python(PyDict_GetItemWithError, kinds, type);
        if (known) return call_python(PyLong_AsLong, known);
        if (PyErr_Occurred()) return -1;
        Owned kind(call_with(kind_of, node));
        PyObject* number = kind;
        return kind ? call_python(PyLong_AsLong, number) : -1;
    }

    bool append(PyObject* x) { return call_python(PyList_Append, found, x) == 0; }

    bool collect_children(PyObject* node, long kind, int depth) {
        if (kind == plain_dict_kind && depth < max_depth) {
            const CriticalSection lock(node);
            PyObject *key, *child;
            Py_ssize_t position = 0, seen = 0;
            const Py_ssize_t size = PyDict_Size(node);
            while (PyDict_Next(node, &position, &key, &child)) {
                if (seen++ == size) return raise_changed();
                Owned held(Py_NewRef(child));
                if (!collect(child, depth + 1)) return false;
                if (PyDict_Size(node) != size) return raise_changed();
            }
            return seen == size || raise_changed();
        }
        if (is_sequence(node) && depth < max_depth) {
            const CriticalSection lock(node);
            const Py_ssize_t size = PySequence_Size(node);
            for (Py_ssize_t i = 0; i < size; ++i) {
                Owned child(call_python(PySequence_GetItem, node, i));
                if (!child || !collect(child, depth + 1)) return false;
                if (PySequence_Size(node) != size) return raise_changed();
            }
            return true;
        }
        return Owned(call_python(PyObject_CallFunctionObjArgs, other_nodes, node, found, nullptr));
    }

    // Whether this is dict or a class of Containers, as in nodes.is_trusted.
    bool is_trusted(PyTypeObject* type) {
        auto* object = reinterpret_cast<PyObject*>(type);
        if (type == &PyDict_Type || object == last_container_type) return true;
        if (!call_python(PyObject_HasAttrString, object, "_lars_tree_make")) return false;
        last_container_type.reset(Py_NewRef(object));
        return true;
    }

    PyObject* rebuild_dict(PyObject* node, PyObject* keys, int depth) {
        const CriticalSection lock(node);
        PyTypeObject* type = Py_TYPE(node);
        const auto make = reinterpret_cast<newfunc>(PyType_GetSlot(type, Py_tp_new));
        Owned no_arguments(call_python(PyTuple_New, 0));
        PyObject* arguments = no_arguments;
        Owned made(arguments ? call_python(make, type, arguments, nullptr) : nullptr);
        PyObject *filled = made, *key, *child;
        if (filled && !PyDict_Check(filled)) return rebuild_in_python(node);
        Py_ssize_t position = 0, seen = 0;
        const Py_ssize_t size = PyDict_Size(node);
        while (filled && PyDict_Next(node, &position, &key, &child)) {
            if (seen++ == size) return raise_changed(), nullptr;
            Owned held_key(Py_NewRef(key)), held(Py_NewRef(child));
            Owned value(rebuild(child, keys, depth + 1));
            PyObject* new_child = value;
            if (!new_child) return call_python(PyList_Append, keys, key), nullptr;
            if (call_python(PyDict_SetItem, filled, key, new_child) != 0) return nullptr;
            if (PyDict_Size(node) != size) return raise_changed(), nullptr;
        }
        return Py_XNewRef(filled);
    }

    PyObject* rebuild_sequence(PyObject* node, PyObject* keys, int depth) {
        const CriticalSection lock(node);
        OwnedList values;
        const Py_ssize_t size = PySequence_Size(node);
        for (Py_ssize_t i = 0; i < size; ++i) {
            Owned child(call_python(PySequence_GetItem, node, i));
            Owned value(child ? rebuild(child, keys, depth + 1) : nullptr);
            if (!value) {
                Owned index(call_python(PyLong_FromSsize_t, i));
                PyObject* key = index;
                if (key) call_python(PyList_Append, keys, key);
                return nullptr;
            }
            if (!values.append(value)) return nullptr;
            if (PySequence_Size(node) != size) return raise_changed(), nullptr;
        }
        PyObject* list = values;
        return list && PyTuple_CheckExact(node) ? call_python(PyList_AsTuple, list)
                                                : Py_XNewRef(list);
    }

    int match_children(PyObject* node, long kind, PyObject* prefix, long prefix_kind, bool exact,
                       int depth) {
        if (kind == plain_dict_kind && prefix_kind == plain_dict_kind && depth < max_depth) {
            const CriticalSection lock(node, prefix);
            const Py_ssize_t size = PyDict_Size(node);
            if (PyDict_Size(prefix) != size) return 0;
            PyObject *key, *child, *other_key, *other;
            Py_ssize_t position = 0, other_position = 0, seen = 0;
            while (PyDict_Next(node, &position, &key, &child)) {
                if (seen++ == size) return raise_changed(), -1;
                Owned held_key(Py_NewRef(key)), held(Py_NewRef(child));
                // Most trees that match have their keys in the same order.
                if (!PyDict_Next(prefix, &other_position, &other_key, &other) || other_key != key) {
                    other = call_python(PyDict_GetItemWithError, prefix, key);
                    if (!other && PyErr_Occurred()) return -1;
                    if (!other) return PyDict_Size(prefix) == size ? 0 : (raise_changed(), -1);
                }
                Owned held_other(Py_NewRef(other));
                const int matched = match(child, other, exact, depth + 1);
                if (matched != 1) return matched;
                if (PyDict_Size(node) != size) return raise_changed(), -1;
            }
            return (seen == size && PyDict_Size(prefix) == size) || raise_changed() ? 1 : -1;
        }
        if (is_sequence(node) && is_sequence(prefix) && depth < max_depth) {
            const CriticalSection lock(node, prefix);
            const Py_ssize_t size = PySequence_Size(node);
            if (PySequence_Size(prefix) != size) return 0;
            for (Py_ssize_t i = 0; i < size; ++i) {
                Owned child(call_python(PySequence_GetItem, node, i));
                Owned other(call_python(PySequence_GetItem, prefix, i));
                const int matched = child && other ? match(child, other, exact, depth + 1) : -1;
                if (matched != 1) return matched;
                if (PySequence_Size(node) != size || PySequence_Size(prefix) != size) {
                    return raise_changed(), -1;
                }
            }
            return 1;
        }
        Owned matched(call_python(PyObject_CallFunctionObjArgs, other_nodes, node, prefix, found,
                                  exact ? Py_True : Py_False, nullptr));
        return matched ? matched == Py_True : -1;
    }

    static bool is_sequence(PyObject* node) {
        return PyList_CheckExact(node) || PyTuple_CheckExact(node);
    }

    static bool raise_changed() {
        call_python(PyErr_SetString, PyExc_RuntimeError, "a tree was changed while it was read");
        return false;
    }

    PyObject *kinds, *kind_of, *other_nodes, *found;
    Owned last_leaf_type, last_container_type;
};

}  // namespace lars
