// The number formats: `read` converts an element to float or double exactly, and `write` rounds a
// double to the format, once.
//
// Both functions are free of branches, so that compilers vectorize the loops that call them. C++17
// does not have float16 and bfloat16, so they are read and written as bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lars {

enum Format { float16, bfloat16, float32, float64 };
enum { formats = 4 };

inline std::size_t item_size(Format format) {
    return format == float64 ? 8 : format == float32 ? 4 : 2;
}

struct Float16 {
    std::uint16_t bits;
};
struct Bfloat16 {
    std::uint16_t bits;
};

// The type of the velocity of weights of type T: float for types shorter than float.
template <class T>
struct VelocityOf {
    typedef float type;
};
template <>
struct VelocityOf<double> {
    typedef double type;
};

inline Format velocity_format(Format w_buffer) { return w_buffer == float64 ? float64 : float32; }

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline double read(double x) { return x; }
inline float read(float x) { return x; }

inline float read(Bfloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

inline float read(Float16 x) {
    // As the bits of a float, these bits have an exponent that is too small by 112.
    std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
    float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;        // 2^112
    std::uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // infinity, NaN
    std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    return bit_cast<float>(bit_cast<std::uint32_t>(scaled) | special | sign);
}

// All ones if the condition is true, else 0. Values are selected by masks, because compilers turn
// conditional expressions into branches.
inline std::uint64_t mask(bool condition) { return -static_cast<std::uint64_t>(condition); }

// Rounds x to nearest, ties to even, to a format of `Bits` significant bits whose smallest normal
// number is 2^Smallest. Results beyond the largest number of the format stay finite.
template <int Bits, int Smallest>
inline double round_to(double x) {
    const int dropped = 53 - Bits;
    const std::uint64_t one = 1, sign = one << 63;
    const std::uint64_t bits = bit_cast<std::uint64_t>(x);
    std::uint64_t even = (bits >> dropped) & 1;
    std::uint64_t normal = (bits + even + ((one << (dropped - 1)) - 1)) & ~((one << dropped) - 1);
    // The last bit of this double has the value of the last bit of the subnormal numbers.
    const double anchor = 1.5 * bit_cast<double>((one * (1023 + Smallest + dropped)) << 52);
    std::uint64_t subnormal = bit_cast<std::uint64_t>((x + anchor) - anchor);
    const std::int64_t smallest = (std::int64_t{1023} + Smallest) << 52;
    std::uint64_t is_small = mask(static_cast<std::int64_t>(bits & ~sign) < smallest);
    return bit_cast<double>((subnormal & is_small) | (normal & ~is_small) | (bits & sign));
}

inline void write(double& out, double x) { out = x; }
inline void write(float& out, double x) { out = static_cast<float>(x); }

inline void write(Bfloat16& out, double x) {
    std::uint32_t bits = bit_cast<std::uint32_t>(static_cast<float>(round_to<8, -126>(x)));
    std::uint32_t is_nan = static_cast<std::uint32_t>(mask(x != x));
    out.bits = static_cast<std::uint16_t>(((bits >> 16) & ~is_nan) | (0x7fc0u & is_nan));
}

inline void write(Float16& out, double x) {
    float value = static_cast<float>(round_to<11, -14>(x));
    std::uint32_t bits = bit_cast<std::uint32_t>(value);
    std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // The bits of value * 2^-112 are the bits of the float16, shifted left by 13.
    float scaled = bit_cast<float>(magnitude) * 1.925929944387236e-34f;
    std::uint32_t half = bit_cast<std::uint32_t>(scaled) >> 13;
    std::uint32_t is_large = static_cast<std::uint32_t>(mask(magnitude >= 0x47800000u));  // 65,536
    std::uint32_t is_nan = static_cast<std::uint32_t>(mask(x != x));
    half = (((half & ~is_large) | (0x7c00u & is_large)) & ~is_nan) | (0x7e00u & is_nan);
    out.bits = static_cast<std::uint16_t>(half | sign);
}

}  // namespace lars
