// The leaves of one update that the native engine supports. They are read and checked here, and
// updated by step.hpp.
//
// The layers point into the memory of Python arrays. Leaves does not own these arrays: the plan
// (plan.hpp) keeps them alive.
#pragma once

#include <deque>
#include <vector>

#include "reader.hpp"

namespace lars {

// A buffer of a Python object, released at the end of its scope.
class Buffer {
public:
    Buffer() { view.obj = nullptr; }
    ~Buffer() { release(); }
    void release() {
        if (view.obj) call_python(PyBuffer_Release, &view);
    }
    Buffer(const Buffer&) = delete;
    Py_buffer view;
};

// Where the results of a call are written; `none` if the leaves are only measured.
enum class Results { in_place, new_arrays, none };

// The arrays of a leaf; `out` is used with Results::in_place only. `velocity` is null if no leaf
// has a velocity, and None if only this leaf has none.
struct Arrays {
    PyObject *w, *dcdw, *out, *velocity;

    bool has_velocity() const { return velocity && velocity != Py_None; }
};

// New arrays for the results of a leaf.
struct NewArrays {
    Owned out, velocity;
};

class Leaves {
public:
    // Adds a leaf, without reading or writing its elements. Returns false if the kernel does not
    // support the leaf, or with an exception set. `made` may own new arrays even then.
    bool add(const Reader& reader, const Arrays& given, PyObject* fields, Results results,
             Py_ssize_t index, NewArrays& made) {
        Memory weights, gradients, new_result, velocity;
        velocity.data = nullptr;
        const bool in_place = results == Results::in_place;
        if (!read_rule(reader, fields)) return false;
        if (!given.has_velocity() && given.velocity && rules.back().momentum != 0) return false;
        const bool overwrites_w = in_place && given.out == given.w;
        if (!reader.read(given.w, overwrites_w, weights)) return false;
        if (!reader.read(given.dcdw, false, gradients)) return false;
        if (!same_layout(weights, gradients) || !is_dense(weights)) return false;
        // The velocity is checked before it is copied, too: copy() may accept unsupported types,
        // and would read memory that was freed.
        if (given.has_velocity() &&
            !read_velocity(reader, given.velocity, in_place, weights, velocity)) {
            return false;
        }
        PyObject* out = given.out;
        if (results == Results::new_arrays) {
            if (!reader.make(given.w, made.out)) return false;
            out = made.out;
            if (given.has_velocity() &&
                (!reader.copy(given.velocity, made.velocity) ||
                 !read_velocity(reader, made.velocity, true, weights, velocity))) {
                return false;
            }
        }
        const bool is_w = overwrites_w || results == Results::none;
        if (!is_w && !reader.read(out, true, new_result)) return false;
        const Memory& result = is_w ? weights : new_result;
        if (!same_layout(weights, result) || result.format != weights.format) return false;
        layers.push_back({weights.data, gradients.data, result.data, velocity.data, weights.size,
                          weights.format, gradients.format, &rules.back()});
        indices.push_back(index);
        if (in_place) {
            add_span(result, written);
            if (given.has_velocity()) add_span(velocity, written);
            if (weights.data != result.data) add_span(weights, read);
            // `out` may be the gradient itself: each element is read before it is written.
            if (gradients.data != result.data || gradients.format != result.format) {
                add_span(gradients, read);
            }
        }
        return true;
    }

    // Registers a leaf that is not updated: no other array may overlap its weights and velocity.
    // Returns false in the same cases as `add`.
    bool add_unchanged(const Reader& reader, const Arrays& given) {
        Memory weights, velocity;
        if (!reader.read(given.w, true, weights) || !is_dense(weights)) return false;
        if (given.has_velocity() &&
            !read_velocity(reader, given.velocity, true, weights, velocity)) {
            return false;
        }
        add_span(weights, written);
        if (given.has_velocity()) add_span(velocity, written);
        return true;
    }

    void reserve(std::size_t count, bool have_velocities) {
        layers.reserve(layers.size() + count);
        indices.reserve(indices.size() + count);
        written.reserve(written.size() + (have_velocities ? 2 : 1) * count);
        read.reserve(read.size() + count);
    }

    // Registers a counter: the step writes to it, so it must not overlap any array.
    void add_counter(std::int64_t* x) {
        const char* start = reinterpret_cast<char*>(x);
        written.push_back({start, start + sizeof *x});
    }

    std::vector<Layer> layers;
    std::vector<Py_ssize_t> indices;  // for each layer, the index of its leaf
    std::vector<Span> written, read;  // memory of the given arrays, not of new ones

private:
    bool read_rule(const Reader& reader, PyObject* fields) {
        if (fields == last_rule) return is_last_supported;  // most trees have a single rule
        rules.emplace_back();
        is_last_supported = call_python([&] { return reader.read_rule(fields, rules.back()); });
        last_rule = fields;
        return is_last_supported;
    }

    static bool read_velocity(const Reader& reader, PyObject* x, bool writable,
                              const Memory& weights, Memory& to) {
        return reader.read(x, writable, to) && same_layout(weights, to) &&
               to.format == velocity_format(weights.format);
    }

    static bool same_layout(const Memory& a, const Memory& b) {
        return a.is_complex == b.is_complex && same_shape(a, b) && same_order(a, b);
    }

    static void add_span(const Memory& x, std::vector<Span>& spans) {
        if (x.size) spans.push_back({x.data, x.data + x.bytes()});
    }

    PyObject* last_rule = nullptr;
    bool is_last_supported = false;
    std::deque<Rule> rules;
};

}  // namespace lars
