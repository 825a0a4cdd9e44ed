// The arithmetic of one LARS step in CPU memory, without Python. module.cpp binds it to Python, and
// step.hpp distributes it over threads.
//
// For weights w and gradient g = dcdw / grad_scale,
//
//     ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)
//     w_new = w - lr * ratio * (g + decay_lambda * w)
//
// (with joint_norm the denominator is |g + decay_lambda * w| + eps). The step is linear in w and
// dcdw, with two coefficients that depend on the norms only. So a layer is read twice: the first
// pass sums the squares of w and dcdw, the second applies the coefficients. With momentum, the
// second pass also updates the velocity.
//
// Precision. Elements are converted to double exactly, and results are rounded once, when they are
// written. Norms and coefficients are double-double numbers (double_double.hpp) where double could
// overflow or lose digits.
//
// The order of the sums. Arrays are cut into chunks, and chunks into rows of 16 elements. Within a
// chunk, the squares of each of the 16 lanes are added row by row (sums.hpp). If neither w nor dcdw
// is float64, rounding errors of the rows are far below the last bit of a result; otherwise both
// sums are compensated. Then the lanes are added by pairwise summation, and the chunks one after
// another, in about twice the precision of double. If squares of float64 elements overflow or
// underflow, the sum is computed again from elements that are scaled by a power of two.
//
// This order does not depend on threads, the instruction set or alignment, and
// _backends/cpu/norms.py adds in the same order, so the norms are always bit-identical.
// tests/test_native.py compares this file with _backends/cpu/twin.py; tests/test_numbers.py
// compares both with an exact reference.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define LARS_X86
#endif

#include "double_double.hpp"
#include "formats.hpp"
#include "rule.hpp"

namespace lars {

// The joint gradient dcdw + decay_lambda * grad_scale * w, whose norm joint_norm uses. It is
// computed as 2^dcdw_shift * dcdw + (high + low) * 2^w_shift * w. The shifts keep the sum in range.
struct JointGradient {
    double high, low;
    int w_shift, dcdw_shift;
    bool maximize;  // negates dcdw
};

const std::size_t lanes = 16;
const std::size_t group = 4 * lanes;  // four rows are added at once
const std::size_t block = 128;  // elements that are computed before they are checked and written

// A sum in about twice the precision of double: `low` collects the rounding errors of `high`.
inline Pair add(Pair a, Pair b) {
    Pair sum = two_sum(a.high, b.high);
    return {sum.high, sum.low + (a.low + b.low)};
}

// The sums of squares of each lane; `low` has the rounding errors of `high`.
struct LaneSums {
    double high[lanes], low[lanes];
};

// The pairwise sum of all lanes.
inline Pair sum_of_lanes(LaneSums sums) {
    for (std::size_t left = lanes / 2; left; left /= 2) {
        for (std::size_t i = 0; i < left; ++i) {
            Pair sum = add({sums.high[2 * i], sums.low[2 * i]},
                           {sums.high[2 * i + 1], sums.low[2 * i + 1]});
            sums.high[i] = sum.high;
            sums.low[i] = sum.low;
        }
    }
    return {sums.high[0], sums.low[0]};
}

// ---- The loops, for each instruction set

struct Loops {
    typedef void (*SumSquares)(const void* w, const void* dcdw, std::size_t size, LaneSums& w_sums,
                               LaneSums& dcdw_sums);
    typedef void (*SumScaledSquares)(const double* x, std::size_t size, double scale, double rest,
                                     LaneSums& sums);
    typedef double (*Largest)(const void* x, std::size_t size);
    typedef void (*Apply)(const void* w, const void* dcdw, void* out, std::size_t size,
                          const Coefficients& coefficients);
    typedef void (*ApplyMomentum)(const void* w, const void* dcdw, void* velocity, void* out,
                                  std::size_t size, const Coefficients& coefficients,
                                  const MomentumOptions& options);

    // Computes a joint gradient as doubles.
    typedef void (*AddDecay)(const void* w, const void* dcdw, double* joint, std::size_t size,
                             const JointGradient& terms);

    // Indexed by the formats of w and dcdw, or of x.
    SumSquares sum_squares[formats][formats];
    SumScaledSquares sum_scaled_squares;
    Largest largest[formats];
    Apply apply[formats][formats];
    ApplyMomentum apply_momentum[formats][formats];
    AddDecay add_decay[formats][formats];
};

// States that the iterations of the next loop are independent, so it can be vectorized.
#if defined(_MSC_VER)
#define LARS_INDEPENDENT __pragma(loop(ivdep))
#elif defined(__clang__)
#define LARS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define LARS_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Compilers do not inline all functions of vectors.
#if defined(__GNUC__)
#define LARS_INLINE inline __attribute__((always_inline))
#else
#define LARS_INLINE inline
#endif

namespace baseline {
#define LARS_TARGET
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace baseline

#ifdef LARS_X86
#define LARS_VECTORS
namespace avx2 {
#define LARS_TARGET __attribute__((target("avx2,fma,f16c")))
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace avx2

namespace avx512 {
#define LARS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace avx512
#undef LARS_VECTORS
#endif

enum InstructionSet { baseline_set, avx2_set, avx512_set };

// The best instruction set that this processor supports.
inline InstructionSet best_set() {
#ifdef LARS_X86
    __builtin_cpu_init();
    unsigned eax, ebx, ecx = 0, edx;  // older compilers cannot ask for F16C by name
    const unsigned needed = bit_FMA | bit_F16C;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & needed) != needed) return baseline_set;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return avx512_set;
    if (__builtin_cpu_supports("avx2")) return avx2_set;
#endif
    return baseline_set;
}

inline const Loops& loops_for(InstructionSet set) {
#ifdef LARS_X86
    static const Loops of_avx512 = avx512::loops(), of_avx2 = avx2::loops();
    if (set == avx512_set) return of_avx512;
    if (set == avx2_set) return of_avx2;
#endif
    static const Loops of_baseline = baseline::loops();
    return of_baseline;
}

// ---- Norms

const std::size_t min_chunk = 1 << 14, max_chunks = 1 << 14;

// The number of elements of a chunk. The largest arrays have larger chunks, so that the memory for
// the sums is bounded.
inline std::size_t chunk_size(std::size_t size) {
    std::size_t chunk = min_chunk;
    while (size / chunk > max_chunks) chunk *= 2;
    return chunk;
}

inline std::size_t chunks(std::size_t size) {
    std::size_t chunk = chunk_size(size);
    return (size + chunk - 1) / chunk;
}

// The elements of a dense array, or a part of them.
struct FlatArray {
    const char* data;
    std::size_t size;
    Format format;

    const char* at(std::size_t i) const { return data + i * item_size(format); }

    FlatArray part(std::size_t start, std::size_t length) const {
        return {at(start), std::min(length, size - start), format};
    }
};

// The sum of one member of `sums` over all chunks of x.
template <class Sums>
inline Pair sum(const FlatArray& x, const Sums* sums, Pair Sums::* part) {
    Pair total = {0, 0};
    for (std::size_t i = 0; i < chunks(x.size); ++i) total = add(total, sums[i].*part);
    // If the sum is infinite or NaN, the rounding error is NaN.
    return std::isfinite(total.high) ? fast_two_sum(total.high, total.low) : Pair{total.high, 0};
}

// The norm, given the sum of squares.
inline DoubleDouble norm(const Loops& loops, const FlatArray& x, Pair total) {
    // Only sums of squares of float64 elements can overflow, or underflow enough to matter.
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
        LaneSums sums;
        loops.sum_scaled_squares(reinterpret_cast<const double*>(x.at(start)),
                                 std::min(chunk, x.size - start), scale, rest, sums);
        total = add(total, sum_of_lanes(sums));
    }
    DoubleDouble root = sqrt(DoubleDouble(fast_two_sum(total.high, total.low)));
    root.exponent += exponent;
    return root;
}

// ---- The joint gradient

// A joint gradient is scaled so that the exponents of its elements do not exceed this limit. Then
// no square overflows, and small elements keep their digits.
const int max_joint_exponent = 480;

// The exponent of the scale of a joint gradient, as a double. It is NaN if the gradient is not
// scaled: no scaling is needed if neither format is float64 and the options are moderate, and
// infinite or NaN elements cannot be scaled.
inline double joint_exponent(const Loops& loops, const FlatArray& w, const FlatArray& dcdw,
                             const Rule& rule) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    if (w.format != float64 && dcdw.format != float64 && has_moderate_options(rule)) return none;
    const double w_max = loops.largest[w.format](w.data, w.size);
    const double dcdw_max = loops.largest[dcdw.format](dcdw.data, dcdw.size);
    if (!std::isfinite(w_max) || !std::isfinite(dcdw_max)) return none;
    int w_exponent, dcdw_exponent;
    std::frexp(w_max, &w_exponent);
    std::frexp(dcdw_max, &dcdw_exponent);
    const DoubleDouble decay = DoubleDouble(rule.decay_lambda) * DoubleDouble(rule.grad_scale);
    w_exponent += static_cast<int>(decay.exponent) + 1;
    const int most = w_max == 0 && dcdw_max == 0 ? 0
                     : w_max == 0                ? dcdw_exponent
                     : dcdw_max == 0             ? w_exponent
                                                 : std::max(w_exponent, dcdw_exponent);
    return most - max_joint_exponent;
}

inline JointGradient joint_gradient(const Rule& rule, double exponent) {
    const DoubleDouble decay = DoubleDouble(rule.decay_lambda) * DoubleDouble(rule.grad_scale);
    const int decay_exponent = static_cast<int>(decay.exponent);
    if (std::isnan(exponent)) {
        const double high = std::ldexp(decay.high, decay_exponent);
        return {high, std::ldexp(decay.low, decay_exponent), 0, 0, rule.maximize};
    }
    const int scale = static_cast<int>(exponent);
    return {decay.high, decay.low, decay_exponent - scale, -scale, rule.maximize};
}

}  // namespace lars
