// The extension module: the functions of walk.hpp and the types of plan.hpp. _kernel.pyi documents
// them.
//
// The kernel adds only the leaves that it supports to a plan. The caller passes all other leaves to
// the engines in Python, which give the same bits and raise the errors for invalid arrays.

#include <exception>

#include "plan.hpp"
#include "walk.hpp"

namespace {

using namespace lars;

const char collect_doc[] =
    "collect(tree, found, kinds, kind_of, others)\n--\n\n"
    "Append the leaves of a tree to a list. others(node, found) does so for the kinds of nodes\n"
    "that are not walked natively.";

PyObject* collect(PyObject*, PyObject* args) {
    PyObject *tree, *found, *kinds, *kind_of, *others;
    if (!PyArg_ParseTuple(args, "OO!O!OO", &tree, &PyList_Type, &found, &PyDict_Type, &kinds,
                          &kind_of, &others)) {
        return nullptr;
    }
    if (!Walk(kinds, kind_of, others, found).collect(tree)) return nullptr;
    return Py_NewRef(Py_None);
}

const char match_doc[] =
    "match(tree, prefix, found, exact, kinds, kind_of, others)\n--\n\n"
    "Append the value of a prefix for each leaf of a tree; return whether it is a prefix.\n"
    "others(node, prefix, found, exact) does so for the kinds of nodes not walked natively.";

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

const char rebuild_doc[] =
    "rebuild(tree, leaves, kinds, kind_of, others, keys)\n--\n\n"
    "A tree with the same nodes and the leaves of an iterator. others(node, leaves) rebuilds the\n"
    "kinds of nodes that are not rebuilt natively. If it raises, `keys` gets the path of the node.";

PyObject* rebuild(PyObject*, PyObject* args) {
    PyObject *tree, *leaves, *kinds, *kind_of, *others, *keys;
    if (!PyArg_ParseTuple(args, "OOO!OOO!", &tree, &leaves, &PyDict_Type, &kinds, &kind_of, &others,
                          &PyList_Type, &keys)) {
        return nullptr;
    }
    if (PyIter_Check(leaves)) return Walk(kinds, kind_of, others, leaves).rebuild(tree, keys);
    return call_python(PyErr_Format, PyExc_TypeError, "expected an iterator, got %R",
                       Py_TYPE(leaves));
}

const char best_set_doc[] =
    "best_instruction_set()\n--\n\n"
    "The best supported instruction set: 0 baseline, 1 AVX2, 2 AVX-512.";

PyObject* best_instruction_set(PyObject*, PyObject*) { return PyLong_FromLong(best_set()); }

PyMethodDef methods[] = {
    {"collect", collect, METH_VARARGS, collect_doc},
    {"match", match, METH_VARARGS, match_doc},
    {"rebuild", rebuild, METH_VARARGS, rebuild_doc},
    {"best_instruction_set", best_instruction_set, METH_NOARGS, best_set_doc},
    {nullptr, nullptr, 0, nullptr},
};

// The C++ runtime allocates memory at the first exception of a thread, and where there is none, the
// process is aborted. So this memory is allocated here, for the thread that imports the module.
int prepare_exceptions(PyObject*) {
    const volatile int active = std::uncaught_exceptions();
    (void)active;
    return 0;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, slot(add_types)},
    {Py_mod_exec, slot(prepare_exceptions)},
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
