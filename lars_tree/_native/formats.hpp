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

inline Format velocity_format(Format w_format) { return w_format == float64 ? float64 : float32; }

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
inline std::uint32_t mask(bool condition) { return -static_cast<std::uint32_t>(condition); }

// Rounds x to `Bits` significant bits: a result that is not exact becomes odd. It can be rounded
// again, to two bits less, as if x were rounded once.
template <int Bits>
inline double round_to_odd(double x) {
    const std::uint64_t dropped = (std::uint64_t{1} << (53 - Bits)) - 1;
    const std::uint64_t bits = bit_cast<std::uint64_t>(x);
    // Unless all bits that are dropped are 0, this sum carries into the last bit that is kept.
    return bit_cast<double>((bits | ((bits & dropped) + dropped)) & ~dropped);
}

// Significands have 8 bits (bfloat16) and 11 bits (float16), so 10 and 13 bits are rounded again.
// With as few bits as that, the conversion to float is exact for all numbers that do not become 0
// or infinity, subnormal ones too.
const int bfloat16_bits = 10, float16_bits = 13;

// Shifts to the right by `Bits`, rounds to nearest, ties to even.
template <int Bits>
inline std::uint32_t shift_and_round(std::uint32_t bits) {
    return (bits + ((bits >> Bits) & 1) + ((1u << (Bits - 1)) - 1)) >> Bits;
}

inline void write(double& out, double x) { out = x; }
inline void write(float& out, double x) { out = static_cast<float>(x); }

// All NaN become the same.
inline void write(Bfloat16& out, double x) {
    std::uint32_t bits =
        bit_cast<std::uint32_t>(static_cast<float>(round_to_odd<bfloat16_bits>(x)));
    std::uint32_t is_nan = mask(x != x);
    bits = (shift_and_round<16>(bits) & ~is_nan) | (0x7fc0u & is_nan);
    out.bits = static_cast<std::uint16_t>(bits);
}

inline void write(Float16& out, double x) {
    std::uint32_t bits = bit_cast<std::uint32_t>(static_cast<float>(round_to_odd<float16_bits>(x)));
    std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // The bits of value * 2^-112 are the bits of the float16, shifted left by 13.
    float scaled = bit_cast<float>(magnitude) * 1.925929944387236e-34f;
    std::uint32_t half = shift_and_round<13>(bit_cast<std::uint32_t>(scaled));
    std::uint32_t is_large = mask(magnitude >= 0x47800000u), is_nan = mask(x != x);  // 65,536
    half = (((half & ~is_large) | (0x7c00u & is_large) | sign) & ~is_nan) | (0x7e00u & is_nan);
    out.bits = static_cast<std::uint16_t>(half);
}

}  // namespace lars
