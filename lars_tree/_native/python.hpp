// Python's C API: the stable part of it, so that one build serves all versions, where it has one.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000  // 3.11, the first with PyObject_GetBuffer in it
#endif
#include <Python.h>

namespace lars {

// A reference that is given back at the end of its scope.
class Owned {
public:
    explicit Owned(PyObject* object) : object(object) {}
    ~Owned() { Py_XDECREF(object); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    operator PyObject*() const { return object; }

private:
    PyObject* object;
};

// Holds other threads off an object while it is walked, where no global lock does.
class Locked {
public:
#if defined(Py_GIL_DISABLED)
    explicit Locked(PyObject* object) { PyCriticalSection_Begin(&section, object); }
    ~Locked() { PyCriticalSection_End(&section); }

private:
    PyCriticalSection section;
#else
    explicit Locked(PyObject*) {}
#endif
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;
};

}  // namespace lars
