// The arithmetic of one LARS step in CPU memory. No Python here: module.cpp binds it, and step.hpp
// has the threads.
//
// For weights w and gradient g = dcdw / grad_scale,
//
//     ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)
//     w_new = w - lr * ratio * (g + decay_lambda * w)
//
// (with joint_norm the denominator is |g + decay_lambda * w| + eps), which is linear in w and dcdw,
// with two coefficients that are made of norms. So a layer is read twice: once to sum the squares
// of w and dcdw, once to apply the coefficients. With momentum the velocity takes in the step in
// that second pass, and moves the weights.
//
// The numbers. Elements are read as double, exactly, and rounded once when they are written.
// Squares are added in a fixed order: 16 lanes; within a chunk the rows of 16 by pairs of
// neighbours, then pairs of pairs, as if zeros followed up to the next power of two; then the
// lanes, likewise, and the chunks, one after the other, in about twice the precision. Nothing in
// this order depends on threads, on the instruction set or on alignment, and
// lars_tree/_backends/norms.py adds in the same one: it gives the same bits. Where squares of
// float64 numbers leave the range of double, the sum is made again of numbers that are scaled by a
// power of two; coefficients are DoubleDouble (double_double.hpp).
//
// tests/test_native.py holds this file to cpu.py, tests/test_numbers.py both to an exact reference.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define LARS_X86
#endif

#include "formats.hpp"
#include "rule.hpp"
#include "double_double.hpp"

namespace lars {

// How to add decay_lambda * grad_scale * w to dcdw, of which joint_norm takes the norm: the factor
// of w is (high + low) * 2^w_shift. The sum is to be multiplied by 2^exponent, which is 0 unless it
// was scaled to stay in range.
struct Addition {
    double high, low;
    int w_shift, dcdw_shift, exponent;
    bool maximize;
};

const int lanes = 16;
const int most_streams = 4;     // arrays, or parts of them, that are read by turns
const std::size_t block = 128;  // elements that are stepped at a time, where that matters

// Sums in about twice the precision of double: `low` gathers what rounding takes from `high`.
inline Pair add(Pair a, Pair b) {
    Pair sum = two_sum(a.high, b.high);
    return {sum.high, sum.low + (a.low + b.low)};
}

inline void add_to(double* a, const double* b) {
    for (int lane = 0; lane < lanes; ++lane) a[lane] += b[lane];
}

// The sum of all lanes, by pairs of neighbours.
inline Pair sum_of_lanes(const double* sums) {
    double high[lanes], low[lanes] = {};
    std::memcpy(high, sums, sizeof high);
    for (int left = lanes / 2; left; left /= 2) {
        for (int i = 0; i < left; ++i) {
            Pair sum = add({high[2 * i], low[2 * i]}, {high[2 * i + 1], low[2 * i + 1]});
            high[i] = sum.high;
            low[i] = sum.low;
        }
    }
    return {high[0], low[0]};
}

// ---- The loops, for each instruction set

struct Loops {
    typedef void (*SumSquares)(const void* const* arrays, int count, std::size_t size, double scale,
                               double rest, double (*totals)[lanes]);
    typedef double (*Largest)(const void* x, std::size_t size);
    typedef void (*Apply)(const void* w, const void* dcdw, void* out, std::size_t size,
                          const Coefficients& by);
    typedef void (*Move)(const void* w, const void* dcdw, void* velocity, void* out,
                         std::size_t size, const Coefficients& by, const Motion& motion);

    // Adds decay_lambda * w to a gradient, as doubles.
    typedef void (*Join)(const void* w, const void* dcdw, double* total, std::size_t size,
                         const Addition& by);

    SumSquares sum_squares[formats], sum_scaled_squares[formats];
    Largest largest[formats];
    Apply apply[formats][formats];  // by the formats of w and dcdw
    Move move[formats][formats];
    Join join[formats][formats];
};

#if defined(_MSC_VER)
#define LARS_INDEPENDENT __pragma(loop(ivdep))
#elif defined(__clang__)
#define LARS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define LARS_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace plain {
#define LARS_TARGET
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace plain

#ifdef LARS_X86
#define LARS_FOURS
namespace avx2 {
#define LARS_TARGET __attribute__((target("avx2")))
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace avx2

namespace avx512 {
#define LARS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace avx512
#undef LARS_FOURS
#endif

enum InstructionSet { no_set, avx2_set, avx512_set };

// The best that this processor has.
inline InstructionSet best_set() {
#ifdef LARS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return avx512_set;
    if (__builtin_cpu_supports("avx2")) return avx2_set;
#endif
    return no_set;
}

inline const Loops& loops_for(InstructionSet set) {
#ifdef LARS_X86
    static const Loops of_avx512 = avx512::loops(), of_avx2 = avx2::loops();
    if (set == avx512_set) return of_avx512;
    if (set == avx2_set) return of_avx2;
#endif
    static const Loops of_plain = plain::loops();
    return of_plain;
}

// ---- Norms

const std::size_t smallest_chunk = 1 << 14, most_chunks = 1 << 14;

// How many elements make a chunk: more in the largest arrays, so that the sums take no more memory.
inline std::size_t chunk_size(std::size_t size) {
    std::size_t chunk = smallest_chunk;
    while (size / chunk > most_chunks) chunk *= 2;
    return chunk;
}

inline std::size_t chunks(std::size_t size) {
    std::size_t chunk = chunk_size(size);
    return (size + chunk - 1) / chunk;
}

// One of the arrays that a norm is taken of, by chunks.
struct Vector {
    const char* data;
    std::size_t size;
    Format format;

    static std::size_t item_size(Format format) {
        return format == float64 ? 8 : format == float32 ? 4 : 2;
    }

    const char* at(std::size_t i) const { return data + i * item_size(format); }

    Vector part(std::size_t start, std::size_t length) const {
        return {at(start), std::min(length, size - start), format};
    }
};

// The sums of squares of w and dcdw: of a chunk of both. A whole chunk is read in two places.
inline void sum_both(const Loops& loops, const Vector& w, const Vector& dcdw, bool is_whole,
                     Pair& w_sum, Pair& dcdw_sum) {
    const int parts = is_whole ? 2 : 1;
    const std::size_t size = w.size / parts;
    // Those of w before those of dcdw, whose format may be another.
    const void* arrays[most_streams];
    double sums[most_streams][lanes];
    for (int part = 0; part < parts; ++part) {
        arrays[part] = w.at(part * size);
        arrays[parts + part] = dcdw.at(part * size);
    }
    if (w.format == dcdw.format) {
        loops.sum_squares[w.format](arrays, 2 * parts, size, 1, 1, sums);
    } else {
        loops.sum_squares[w.format](arrays, parts, size, 1, 1, sums);
        loops.sum_squares[dcdw.format](arrays + parts, parts, size, 1, 1, sums + parts);
    }
    if (parts == 2) {
        add_to(sums[0], sums[1]);
        add_to(sums[2], sums[3]);
    }
    w_sum = sum_of_lanes(sums[0]);
    dcdw_sum = sum_of_lanes(sums[parts]);
}

// The sum of one of the sums of each chunk.
template <class Sums>
inline Pair sum(const Vector& x, const Sums* sums, Pair Sums::* part) {
    Pair total = {0, 0};
    for (std::size_t i = 0; i < chunks(x.size); ++i) total = add(total, sums[i].*part);
    // Where the sum is infinite or NaN, the rounding errors are NaN.
    return std::isfinite(total.high) ? fast_two_sum(total.high, total.low) : Pair{total.high, 0};
}

// The norm, given the sum of squares.
inline DoubleDouble norm(const Loops& loops, const Vector& x, Pair total) {
    // Only squares of float64 numbers overflow, or vanish where they would count.
    if (x.format != float64 ||
        (total.high > power_of_two(-900) && total.high < power_of_two(1000))) {
        return sqrt(DoubleDouble(total));
    }
    double largest = loops.largest[x.format](x.data, x.size);
    if (largest == 0 || !std::isfinite(largest)) return largest;
    int exponent;
    std::frexp(largest, &exponent);
    double scale = std::ldexp(1, -exponent / 2), rest = std::ldexp(1, -exponent + exponent / 2);
    total = {0, 0};
    const std::size_t chunk = chunk_size(x.size);
    for (std::size_t start = 0; start < x.size; start += chunk) {
        const void* data = x.at(start);
        double lane_sums[1][lanes];
        loops.sum_scaled_squares[x.format](&data, 1, std::min(chunk, x.size - start), scale, rest,
                                           lane_sums);
        total = add(total, sum_of_lanes(lane_sums[0]));
    }
    DoubleDouble root = sqrt(DoubleDouble(fast_two_sum(total.high, total.low)));
    root.exponent += exponent;
    return root;
}

// ---- The sum of g and decay_lambda * w

// Where scaled sums have their largest elements: squares are in range, and small elements too.
const int total_exponent = 480;

// The exponent of the scale of a sum, as a double. NaN where it is not scaled: numbers shorter than
// double, with moderate options, are added as they are, and so are those that are not finite.
inline double sum_exponent(const Loops& loops, const Vector& w, const Vector& dcdw,
                           const Rule& rule) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    if (w.format != float64 && dcdw.format != float64 && double_is_enough(rule)) return none;
    const double w_most = loops.largest[w.format](w.data, w.size);
    const double dcdw_most = loops.largest[dcdw.format](dcdw.data, dcdw.size);
    if (!std::isfinite(w_most) || !std::isfinite(dcdw_most)) return none;
    int w_exponent, dcdw_exponent;
    std::frexp(w_most, &w_exponent);
    std::frexp(dcdw_most, &dcdw_exponent);
    const DoubleDouble decay = DoubleDouble(rule.decay_lambda) * DoubleDouble(rule.grad_scale);
    w_exponent += static_cast<int>(decay.exponent) + 1;
    const int most = w_most == 0 && dcdw_most == 0 ? 0
                     : w_most == 0                 ? dcdw_exponent
                     : dcdw_most == 0              ? w_exponent
                                                   : std::max(w_exponent, dcdw_exponent);
    return most - total_exponent;
}

inline Addition addition(const Rule& rule, double exponent) {
    const DoubleDouble decay = DoubleDouble(rule.decay_lambda) * DoubleDouble(rule.grad_scale);
    const int decay_exponent = static_cast<int>(decay.exponent);
    if (std::isnan(exponent)) {
        const double high = std::ldexp(decay.high, decay_exponent);
        return {high, std::ldexp(decay.low, decay_exponent), 0, 0, 0, rule.maximize};
    }
    const int scale = static_cast<int>(exponent);
    return {decay.high, decay.low, decay_exponent - scale, -scale, scale, rule.maximize};
}

}  // namespace lars
