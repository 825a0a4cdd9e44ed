// The number formats: how an element is read, as a number that C++ has, and a double rounded to it,
// once.
//
// Reads and writes are free of branches, so that compilers turn the loops around them into vector
// instructions. float16 and bfloat16 are read and written as the bits that they are.
#pragma once

#include <cstdint>
#include <cstring>

namespace lars {

enum Format { float16, bfloat16, float32, float64 };
enum { formats = 4 };

struct Half {
    std::uint16_t bits;
};
struct Brain {
    std::uint16_t bits;
};

// What the velocity of weights of a type is kept in: float for those that are shorter.
template <class T>
struct VelocityOf {
    typedef float type;
};
template <>
struct VelocityOf<double> {
    typedef double type;
};

inline Format velocity_format(Format of_w) { return of_w == float64 ? float64 : float32; }

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline double read(double x) { return x; }
inline float read(float x) { return x; }

inline float read(Brain x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

inline float read(Half x) {
    // As a float the bits have an exponent that is 112 too small, also where they are subnormal.
    std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
    float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;        // 2^112
    std::uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // infinity, NaN
    std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    return bit_cast<float>(bit_cast<std::uint32_t>(scaled) | special | sign);
}

// All ones where the statement holds: choices are made by masks, as compilers take a choice between
// two computed values for a branch.
inline std::uint64_t mask(bool holds) { return -static_cast<std::uint64_t>(holds); }

// x rounded to nearest, ties to even, to a format of `Bits` significant bits whose smallest normal
// number is 2^Smallest: a double that the format holds, or one beyond its largest number.
template <int Bits, int Smallest>
inline double rounded(double x) {
    const int dropped = 53 - Bits;
    const std::uint64_t one = 1, sign = one << 63;
    const std::uint64_t bits = bit_cast<std::uint64_t>(x);
    std::uint64_t even = (bits >> dropped) & 1;
    std::uint64_t normal = (bits + even + ((one << (dropped - 1)) - 1)) & ~((one << dropped) - 1);
    // Subnormal numbers have a fixed last place: that of this constant as a double.
    const double anchor = 1.5 * bit_cast<double>((one * (1023 + Smallest + dropped)) << 52);
    std::uint64_t subnormal = bit_cast<std::uint64_t>((x + anchor) - anchor);
    const std::int64_t smallest = (std::int64_t{1023} + Smallest) << 52;
    std::uint64_t is_small = mask(static_cast<std::int64_t>(bits & ~sign) < smallest);
    return bit_cast<double>((subnormal & is_small) | (normal & ~is_small) | (bits & sign));
}

inline void write(double& out, double x) { out = x; }
inline void write(float& out, double x) { out = static_cast<float>(x); }

inline void write(Brain& out, double x) {
    std::uint32_t bits = bit_cast<std::uint32_t>(static_cast<float>(rounded<8, -126>(x)));
    std::uint32_t is_nan = static_cast<std::uint32_t>(mask(x != x));
    out.bits = static_cast<std::uint16_t>(((bits >> 16) & ~is_nan) | (0x7fc0u & is_nan));
}

inline void write(Half& out, double x) {
    float value = static_cast<float>(rounded<11, -14>(x));
    std::uint32_t bits = bit_cast<std::uint32_t>(value);
    std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Multiplied by 2^-112 the bits of a float are those of a float16, thirteen places up.
    float scaled = bit_cast<float>(magnitude) * 1.925929944387236e-34f;
    std::uint32_t half = bit_cast<std::uint32_t>(scaled) >> 13;
    std::uint32_t is_large = static_cast<std::uint32_t>(mask(magnitude >= 0x47800000u));  // 65,536
    std::uint32_t is_nan = static_cast<std::uint32_t>(mask(x != x));
    half = (((half & ~is_large) | (0x7c00u & is_large)) & ~is_nan) | (0x7e00u & is_nan);
    out.bits = static_cast<std::uint16_t>(half | sign);
}

}  // namespace lars
