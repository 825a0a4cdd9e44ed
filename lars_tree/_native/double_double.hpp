// Double-double numbers: twice the precision of double, with a separate exponent.
//
// A DoubleDouble is (high + low) * 2^exponent, where 1 <= |high| < 2 and |low| is at most half an
// ulp of high. If high is 0, infinite or NaN, low and exponent are 0. Norms and coefficients are
// double-double numbers because the ratio of two norms of float64 arrays may be outside the range
// of double even if the step is not, and because the rounding error of a double ratio would add to
// the error of a float64 result, which must be at most 4 ulp.
//
// Products and sums of two doubles have rounding errors that are doubles themselves, and a few
// double operations compute them exactly (`two_sum`, `two_product`); all other operations are built
// on these. Every operation is a fixed sequence of double operations, without fused multiply-add,
// the same as in _numerics/double_double.py, so both files give the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "formats.hpp"

namespace lars {

// A double, and a correction below its last bit.
struct Pair {
    double high, low;
};

// The rounded sum of a and b, and its exact error: a + b = high + low (Knuth).
inline Pair two_sum(double a, double b) {
    double sum = a + b, part = sum - a;
    return {sum, (a - (sum - part)) + (b - part)};
}

// two_sum with fewer operations, for |a| >= |b|.
inline Pair fast_two_sum(double a, double b) {
    double sum = a + b;
    return {sum, b - (sum - a)};
}

// For a and b of moderate size: the rounded product and its exact error (Dekker, Veltkamp).
inline Pair two_product(double a, double b) {
    const double splitter = 134217729.0;  // 2^27 + 1
    double product = a * b;
    double a_big = splitter * a, a_high = a_big - (a_big - a), a_low = a - a_high;
    double b_big = splitter * b, b_high = b_big - (b_big - b), b_low = b - b_high;
    return {product,
            ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low};
}

// 2^exponent, for the exponents of normal numbers.
inline double power_of_two(std::int64_t exponent) {
    return bit_cast<double>(static_cast<std::uint64_t>(exponent + 1023) << 52);
}

struct DoubleDouble {
    double high, low;
    std::int64_t exponent;

    DoubleDouble() : DoubleDouble(0) {}
    DoubleDouble(double x) : DoubleDouble(Pair{x, 0}) {}

    // (high + low) * 2^exponent, where high is the sum rounded to double.
    explicit DoubleDouble(Pair x, std::int64_t exponent = 0)
        : high(x.high), low(x.low), exponent(exponent) {
        int shift = static_cast<int>(bit_cast<std::uint64_t>(x.high) >> 52 & 0x7ff) - 1023;
        if (shift == 0) return;
        if (x.high == 0 || shift == 1024) {  // zero, infinite, NaN
            low = 0;
            this->exponent = 0;
            return;
        }
        if (shift < -900 || shift > 900) {  // near the ends of the range, or subnormal
            std::frexp(x.high, &shift);
            --shift;
            high = std::ldexp(x.high, -shift);
            low = std::ldexp(x.low, -shift);
        } else {
            high *= power_of_two(-shift);
            low *= power_of_two(-shift);
        }
        this->exponent += shift;
    }

    bool is_finite_nonzero() const { return high != 0 && std::isfinite(high); }
};

inline bool is_zero(double x) { return x == 0; }
inline bool is_zero(DoubleDouble x) { return x.high == 0; }

// The nearest double, which may be 0 or infinite.
inline double to_double(double x) { return x; }
inline double to_double(DoubleDouble x) {
    if (-900 < x.exponent && x.exponent < 900) return x.high * power_of_two(x.exponent);
    std::int64_t bounded = std::max<std::int64_t>(-3000, std::min<std::int64_t>(3000, x.exponent));
    return std::ldexp(x.high, static_cast<int>(bounded));
}

// factor * 2^exponent; the exponent is 0 unless the number is far from 1. To multiply x by this
// number, scale x by 2^exponent and then multiply by the factor: the result is rounded once, and
// overflows only if the exact product does.
struct Split {
    double factor;
    int exponent;
};

inline Split split(double x) { return {x, 0}; }
inline Split split(DoubleDouble x) {
    if (-960 < x.exponent && x.exponent < 960) return {to_double(x), 0};
    return {x.high, static_cast<int>(
                        std::max<std::int64_t>(-5000, std::min<std::int64_t>(5000, x.exponent)))};
}

// x * 2^exponent. For a double, the exponent is always 0.
inline double scaled(double x, int) { return x; }
inline DoubleDouble scaled(DoubleDouble x, int exponent) {
    if (x.is_finite_nonzero()) x.exponent += exponent;
    return x;
}

inline DoubleDouble operator*(DoubleDouble a, DoubleDouble b) {
    if (!a.is_finite_nonzero() || !b.is_finite_nonzero()) return DoubleDouble(a.high * b.high);
    Pair product = two_product(a.high, b.high);
    product.low += a.high * b.low + a.low * b.high;
    return DoubleDouble(fast_two_sum(product.high, product.low), a.exponent + b.exponent);
}

inline DoubleDouble operator/(DoubleDouble a, DoubleDouble b) {
    if (!a.is_finite_nonzero() || !b.is_finite_nonzero()) return DoubleDouble(a.high / b.high);
    double quotient = a.high / b.high;
    Pair product = two_product(quotient, b.high);
    double rest = ((a.high - product.high) - product.low) + a.low - quotient * b.low;
    return DoubleDouble(fast_two_sum(quotient, rest / b.high), a.exponent - b.exponent);
}

inline DoubleDouble operator+(DoubleDouble a, DoubleDouble b) {
    if (b.high == 0) return a;
    if (a.high == 0) return b;
    if (!a.is_finite_nonzero() || !b.is_finite_nonzero()) return DoubleDouble(a.high + b.high);
    if (a.exponent < b.exponent) std::swap(a, b);
    if (a.exponent - b.exponent > 200) return a;
    double scale = power_of_two(b.exponent - a.exponent);
    Pair sum = two_sum(a.high, b.high * scale);
    sum.low += a.low + b.low * scale;
    return DoubleDouble(fast_two_sum(sum.high, sum.low), a.exponent);
}

inline DoubleDouble sqrt(DoubleDouble a) {
    if (!a.is_finite_nonzero()) return DoubleDouble(std::sqrt(a.high));
    std::int64_t odd = a.exponent & 1;
    double high = odd ? 2 * a.high : a.high, low = odd ? 2 * a.low : a.low;
    double root = std::sqrt(high);
    Pair square = two_product(root, root);
    double rest = ((high - square.high) - square.low) + low;
    return DoubleDouble(fast_two_sum(root, rest / (2 * root)), (a.exponent - odd) / 2);
}

// For non-negative numbers; false if a or b is NaN.
inline bool operator>(DoubleDouble a, DoubleDouble b) {
    if (!a.is_finite_nonzero() || !b.is_finite_nonzero()) return a.high > b.high;
    if (a.exponent != b.exponent) return a.exponent > b.exponent;
    return a.high != b.high ? a.high > b.high : a.low > b.low;
}

}  // namespace lars
