// Helpers for Python's C API: calls, references, locks, and types that wrap a C++ class.
//
// Only the stable ABI is used, so one build serves all versions of Python. Free-threaded builds do
// not have it; they can be compiled for, but are not supported (see docs/design.md). The macros
// Py_RETURN_NONE, _TRUE and _FALSE are not used: in the headers of Python 3.12 and 3.13 they return
// no new reference, which Python 3.11 needs.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000  // 3.11: the first limited API with PyObject_GetBuffer
#endif
#include <Python.h>

#include <chrono>
#include <new>
#include <thread>
#include <vector>

namespace lars {

// Calls a function of the C API. All functions that may run Python code or release the GIL must be
// called in this way.
//
// Before Python 3.14, a daemon thread that requests the GIL while the interpreter exits is ended by
// pthread_exit, which may unwind C++ frames like an exception. Destructors would then use Python
// objects without the GIL. So unwinding is stopped here, in the innermost frame: the thread sleeps
// until the process ends (a process does not wait for daemon threads). Python 3.14 itself does so.
template <class Function, class... Arguments>
#if defined(__GNUC__)
__attribute__((always_inline)) inline  // otherwise the call would go through a pointer
#endif
    auto
    call_python(Function function, Arguments... arguments) -> decltype(function(arguments...)) {
    try {
        return function(arguments...);
    } catch (...) {  // only unwinding: C functions throw no exceptions
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

// The result of function(argument): a new reference, or null with an exception set.
inline PyObject* call_with(PyObject* function, PyObject* argument) {
    return call_python(PyObject_CallFunctionObjArgs, function, argument, nullptr);
}

// An owned reference, released at the end of its scope.
class Owned {
public:
    explicit Owned(PyObject* object = nullptr) : object(object) {}
    ~Owned() { release(); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    operator PyObject*() const { return object; }

    void reset(PyObject* other) {
        release();
        object = other;
    }

private:
    void release() {
        if (object) call_python([this] { Py_DECREF(object); });
    }

    PyObject* object;
};

// A new list. If `append` returns false, an exception is set.
class OwnedList : public Owned {
public:
    OwnedList() : Owned(call_python(PyList_New, 0)) {}

    bool append(PyObject* x) const {
        PyObject* list = *this;
        return list && call_python(PyList_Append, list, x) == 0;
    }
};

// Whether the object is None or a list with one item for each leaf; otherwise sets an exception.
inline bool is_column(PyObject* list, Py_ssize_t count) {
    if (list == Py_None || (PyList_Check(list) && PyList_Size(list) == count)) return true;
    call_python(PyErr_SetString, PyExc_ValueError, "expected lists of one length");
    return false;
}

// Item i as a borrowed reference; null if the list is None.
inline PyObject* item(PyObject* list, Py_ssize_t i) {
    return list == Py_None ? nullptr : PyList_GetItem(list, i);
}

// Sets item i of a list to a new reference to x.
inline bool put(PyObject* list, Py_ssize_t i, PyObject* x) {
    return call_python(PyList_SetItem, list, i, Py_NewRef(x)) == 0;
}

inline PyObject* list_of(const std::vector<Py_ssize_t>& numbers) {
    OwnedList found;
    for (Py_ssize_t number : numbers) {
        Owned x(call_python(PyLong_FromSsize_t, number));
        if (!found || !x || !found.append(x)) return nullptr;
    }
    return Py_NewRef(found);
}

// Locks one or two objects in free-threaded builds; does nothing where there is a GIL.
//
// Only the innermost section is sure to hold its locks: while a thread waits, it releases those of
// all its sections, and takes back those of the innermost one. So two objects that are read
// together need one section.
class CriticalSection {
public:
#if defined(Py_GIL_DISABLED)
    explicit CriticalSection(PyObject* object) : CriticalSection(object, object) {}
    CriticalSection(PyObject* one, PyObject* other) {
        call_python(PyCriticalSection2_Begin, &section, one, other);
    }
    ~CriticalSection() { call_python(PyCriticalSection2_End, &section); }

private:
    PyCriticalSection2 section;
#else
    explicit CriticalSection(PyObject*, PyObject* = nullptr) {}
#endif
    CriticalSection(const CriticalSection&) = delete;
    CriticalSection& operator=(const CriticalSection&) = delete;
};

// Releases the GIL until the end of its scope.
class GilReleased {
public:
    GilReleased() : state(PyEval_SaveThread()) {}
    ~GilReleased() { call_python(PyEval_RestoreThread, state); }
    GilReleased(const GilReleased&) = delete;
    GilReleased& operator=(const GilReleased&) = delete;

private:
    PyThreadState* state;
};

// A Python object that owns an object of a C++ class.
template <class Content>
struct Object {
    PyObject_HEAD Content* content;
};

template <class Content>
Content& content_of(PyObject* self) {
    return *reinterpret_cast<Object<Content>*>(self)->content;
}

template <class Content>
PyObject* make_object(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    Owned self(call_python(allocate, type, Py_ssize_t{0}));
    if (!self) return nullptr;
    try {
        PyObject* object = self;
        reinterpret_cast<Object<Content>*>(object)->content = new Content;
        if (!content_of<Content>(self).open(arguments, keywords)) return nullptr;
    } catch (const std::bad_alloc&) {
        return call_python(PyErr_NoMemory);
    }
    return Py_NewRef(self);
}

template <class Content>
void free_object(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    delete reinterpret_cast<Object<Content>*>(self)->content;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Owned released(reinterpret_cast<PyObject*>(type));
}

inline PyCFunction method(PyCFunctionWithKeywords function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

template <class Function>
void* slot(Function* function) {
    return reinterpret_cast<void*>(function);
}

}  // namespace lars
