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
// power of two; coefficients are Wide (wide.hpp).
//
// tests/test_native.py holds this file to cpu.py, tests/test_numbers.py both to an exact reference.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define LARS_X86
#endif

#include "formats.hpp"
#include "wide.hpp"

namespace lars {

struct Rule {
    double lr, decay_lambda, trust_coefficient, eps, grad_scale;
    bool adapt, trust_clip;
    double momentum, rate;
    bool nesterov, maximize;
    bool joint_norm;
    double dampening;

    // Whether the norm of g + decay_lambda * w is asked for, and is not that of g.
    bool is_joint() const { return joint_norm && adapt && decay_lambda != 0; }
};

// How to add decay_lambda * grad_scale * w to dcdw, of which joint_norm takes the norm: the factor
// of w is (high + low) * 2^w_shift. The sum is to be multiplied by 2^exponent, which is 0 unless it
// was scaled to stay in range.
struct Addition {
    double high, low;
    int w_shift, dcdw_shift, exponent;
    bool maximize;
};

// Dense arrays of the same size, in the same memory order; `out` may be w or dcdw. Complex numbers
// are pairs of real ones. The velocity, if not null, is of the format `velocity_format(w_format)`.
struct Layer {
    const void* w;
    const void* dcdw;
    void* out;
    void* velocity;
    std::size_t size;
    Format w_format, dcdw_format;
    const Rule* rule;
};

const int lanes = 16;
const int most_streams = 4;     // arrays, or parts of them, that are read by turns
const std::size_t block = 128;  // elements that are stepped at a time, where that matters

// The step is on_dcdw * dcdw + on_w * w, the last only where it `decays`. dcdw is to be multiplied
// by 2^exponent first, where on_dcdw alone would be far from 1.
struct Coefficients {
    double on_w, on_dcdw;
    int exponent;
    bool decays;
    bool along_total;  // whether dcdw stands for its sum with decay_lambda * grad_scale * w

    double kept() const { return decays ? 1 - on_w : 1; }  // what is left of w
};

// How a velocity moves the weights.
struct Motion {
    double momentum, rate;
    bool nesterov;
};

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

// ---- The rule: the same statements as in lars_tree/_rule.py. Number is Wide, or double where that
// is enough (see `double_is_enough`).

template <class Number>
inline Number trust_ratio(Number w_norm, Number dcdw_norm, const Rule& rule) {
    const Number one = 1;
    if (!rule.adapt) return one;
    if (is_zero(w_norm) || is_zero(dcdw_norm)) return one;
    Number denominator = dcdw_norm / Number(rule.grad_scale);
    // With joint_norm it is the norm of the sum.
    if (!rule.joint_norm) denominator = denominator + Number(rule.decay_lambda) * w_norm;
    denominator = denominator + Number(rule.eps);
    Number ratio = Number(rule.trust_coefficient) * w_norm / denominator;
    if (!rule.trust_clip) return ratio;
    const Number rate = Number(rule.lr) * Number(rule.rate);
    return ratio > rate ? one : ratio / (is_zero(rate) ? one : rate);
}

// `exponent` is that of a sum, see Addition.
template <class Number>
inline Coefficients coefficients(Number w_norm, Number dcdw_norm, const Rule& rule,
                                 int exponent = 0) {
    Number rate =
        Number(rule.lr) * trust_ratio(w_norm, dcdw_norm, rule) * Number(1 - rule.dampening);
    const double on_w = rounded(rate * Number(rule.decay_lambda));
    const Number on_dcdw = rate / Number(rule.grad_scale);
    // g and decay_lambda * w may cancel, and what is left is stepped far along.
    if (rule.is_joint() && on_w > 1) {
        const Split on_total = split(scaled(on_dcdw, exponent));
        return {0, on_total.factor, on_total.exponent, false, true};
    }
    const Split by = split(on_dcdw);
    return {on_w, rule.maximize ? -by.factor : by.factor, by.exponent, rule.decay_lambda != 0,
            false};
}

inline bool is_moderate(double x) {
    return x == 0 || (x > power_of_two(-100) && x < power_of_two(100));
}

// Whether norms of numbers that are shorter than double make no coefficient that leaves its range.
inline bool double_is_enough(const Rule& rule) {
    return is_moderate(rule.lr) && is_moderate(rule.decay_lambda) && is_moderate(rule.eps) &&
           is_moderate(rule.trust_coefficient) && is_moderate(rule.grad_scale) &&
           (!rule.trust_clip || is_moderate(rule.rate));
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

inline Pair sum(const Vector& x, const Pair* sums) {
    Pair total = {0, 0};
    for (std::size_t i = 0; i < chunks(x.size); ++i) total = add(total, sums[i]);
    // Where the sum is infinite or NaN, the rounding errors are NaN.
    return std::isfinite(total.high) ? fast_two_sum(total.high, total.low) : Pair{total.high, 0};
}

// The norm, given the sum of squares of each chunk.
inline Wide norm(const Loops& loops, const Vector& x, const Pair* sums) {
    Pair total = sum(x, sums);
    // Only squares of float64 numbers overflow, or vanish where they would count.
    if (x.format != float64 ||
        (total.high > power_of_two(-900) && total.high < power_of_two(1000))) {
        return sqrt(Wide(total));
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
    Wide root = sqrt(Wide(fast_two_sum(total.high, total.low)));
    root.exponent += exponent;
    return root;
}

// ---- The sum of g and decay_lambda * w

// Where scaled sums have their largest elements: squares are in range, and small elements too.
const int total_exponent = 480;

// Numbers shorter than double, with moderate options, are added as they are; of others the sum is
// scaled, unless elements are not finite.
inline Addition addition(const Loops& loops, const Vector& w, const Vector& dcdw,
                         const Rule& rule) {
    const Wide decay = Wide(rule.decay_lambda) * Wide(rule.grad_scale);
    const int decay_exponent = static_cast<int>(decay.exponent);
    Addition by = {std::ldexp(decay.high, decay_exponent),
                   std::ldexp(decay.low, decay_exponent),
                   0,
                   0,
                   0,
                   rule.maximize};
    if (w.format != float64 && dcdw.format != float64 && double_is_enough(rule)) return by;
    const double w_most = loops.largest[w.format](w.data, w.size);
    const double dcdw_most = loops.largest[dcdw.format](dcdw.data, dcdw.size);
    if (!std::isfinite(w_most) || !std::isfinite(dcdw_most)) return by;
    int w_exponent, dcdw_exponent;
    std::frexp(w_most, &w_exponent);
    std::frexp(dcdw_most, &dcdw_exponent);
    w_exponent += decay_exponent + 1;
    const int most = w_most == 0 && dcdw_most == 0 ? 0
                     : w_most == 0                 ? dcdw_exponent
                     : dcdw_most == 0              ? w_exponent
                                                   : std::max(w_exponent, dcdw_exponent);
    by.exponent = most - total_exponent;
    by.high = decay.high;
    by.low = decay.low;
    by.w_shift = decay_exponent - by.exponent;
    by.dcdw_shift = -by.exponent;
    return by;
}

}  // namespace lars
