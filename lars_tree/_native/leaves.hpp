// The leaves of one update, as the native engine takes them: read and checked, but not stepped.
//
// Arrays are only described here: whoever steps the layers keeps the arrays alive.
#pragma once

#include <deque>
#include <vector>

#include "reader.hpp"

namespace lars {

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

// What becomes of the results.
enum class Results { in_place, new_arrays, none };

// The arrays of a leaf; `out` matters with Results::in_place. The velocity is null where no leaf
// has one, and None where this one does not.
struct Arrays {
    PyObject *w, *dcdw, *out, *velocity;

    bool moves() const { return velocity && velocity != Py_None; }
};

// New arrays for the results of a leaf.
struct Made {
    Owned out, velocity;
};

class Leaves {
public:
    // Adds a leaf, without touching its memory; false if the kernel does not support it, or with an
    // exception set. New arrays are owned by `made`, also when it fails.
    bool add(const Reader& reader, const Arrays& given, PyObject* fields, Results results,
             Py_ssize_t place, Made& made) {
        Memory weights, gradients, to, moving = {};
        Buffer of_w, of_dcdw, of_out, of_velocity, of_copy;
        const bool in_place = results == Results::in_place;
        if (!read_rule(reader, fields)) return false;
        if (!given.moves() && given.velocity && rules.back().momentum != 0) return false;
        const bool is_own = in_place && given.out == given.w;
        if (!reader.read(given.w, is_own, weights, of_w.view)) return false;
        if (!reader.read(given.dcdw, false, gradients, of_dcdw.view)) return false;
        if (!fit(weights, gradients) || !is_dense(weights)) return false;
        // Also before it is copied: copy(velocity) may take what is no such array, or was freed.
        if (given.moves() &&
            !read_velocity(reader, given.velocity, in_place, weights, moving, of_velocity.view)) {
            return false;
        }
        PyObject* out = given.out;
        if (results == Results::new_arrays) {
            if (!reader.make(given.w, made.out)) return false;
            out = made.out;
            if (given.moves() &&
                (!reader.copy(given.velocity, made.velocity) ||
                 !read_velocity(reader, made.velocity, true, weights, moving, of_copy.view))) {
                return false;
            }
        }
        if (is_own || results == Results::none) {
            to = weights;
        } else if (!reader.read(out, true, to, of_out.view)) {
            return false;
        }
        if (!fit(weights, to) || to.format != weights.format) return false;
        layers.push_back({weights.data, gradients.data, to.data, moving.data, weights.size,
                          weights.format, gradients.format, &rules.back()});
        places.push_back(place);
        if (in_place) {
            note(to, written);
            if (given.moves()) note(moving, written);
            if (weights.data != to.data) note(weights, read);
            // A gradient may be the very memory of its own result: it is read first.
            if (gradients.data != to.data || gradients.format != to.format) note(gradients, read);
        }
        return true;
    }

    // Adds weights that stay as they are, as does their velocity, but that no other array may
    // overlap; false as above.
    bool keep(const Reader& reader, const Arrays& given) {
        Memory weights, moving;
        Buffer of_w, of_velocity;
        if (!reader.read(given.w, true, weights, of_w.view) || !is_dense(weights)) return false;
        if (given.moves() &&
            !read_velocity(reader, given.velocity, true, weights, moving, of_velocity.view)) {
            return false;
        }
        note(weights, written);
        if (given.moves()) note(moving, written);
        return true;
    }

    // Makes room for so many more leaves.
    void reserve(std::size_t count, bool moves) {
        layers.reserve(layers.size() + count);
        places.reserve(places.size() + count);
        written.reserve(written.size() + (moves ? 2 : 1) * count);
        read.reserve(read.size() + count);
    }

    // Adds a number that is written, and that no array may overlap.
    void write_number(std::int64_t* x) {
        const char* start = reinterpret_cast<char*>(x);
        written.push_back({start, start + sizeof *x});
    }

    std::vector<Layer> layers;
    std::vector<Py_ssize_t> places;   // of the leaf of each layer
    std::vector<Span> written, read;  // of arrays that are given, not made

private:
    bool read_rule(const Reader& reader, PyObject* fields) {
        if (fields == last) return is_supported;  // most often one for all leaves
        rules.emplace_back();
        is_supported = call_python([&] { return reader.read_rule(fields, rules.back()); });
        last = fields;
        return is_supported;
    }

    static bool read_velocity(const Reader& reader, PyObject* x, bool writable,
                              const Memory& weights, Memory& to, Py_buffer& buffer) {
        return reader.read(x, writable, to, buffer) && fit(weights, to) &&
               to.format == velocity_format(weights.format);
    }

    static bool fit(const Memory& a, const Memory& b) {
        return a.is_complex == b.is_complex && same_shape(a, b) && same_order(a, b);
    }

    static void note(const Memory& x, std::vector<Span>& among) {
        if (x.size) among.push_back({x.data, x.data + x.bytes()});
    }

    PyObject* last = nullptr;
    bool is_supported = false;  // the last one
    std::deque<Rule> rules;
};

}  // namespace lars
