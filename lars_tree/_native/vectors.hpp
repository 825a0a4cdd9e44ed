// Vectors of eight elements, which the loops convert to double and back by instructions of the
// processor. loops.hpp includes this file, once for each instruction set. Where LARS_VECTORS is not
// defined, Doubles is a single double.
//
// `load` and `store` do the same as `read` and `write` (formats.hpp), for `width` elements.

#ifdef LARS_VECTORS
const std::size_t width = 8;

struct Doubles {
    __m256d low, high;
};

LARS_TARGET LARS_INLINE Doubles operator+(Doubles x, Doubles y) {
    return {x.low + y.low, x.high + y.high};
}

LARS_TARGET LARS_INLINE Doubles operator-(Doubles x, Doubles y) {
    return {x.low - y.low, x.high - y.high};
}

LARS_TARGET LARS_INLINE Doubles operator*(double x, Doubles y) { return {x * y.low, x * y.high}; }

LARS_TARGET LARS_INLINE __m128i load_halves(const void* x) {
    return _mm_loadu_si128(static_cast<const __m128i*>(x));
}

LARS_TARGET LARS_INLINE Doubles load(const Float16* x) {
    const __m256 floats = _mm256_cvtph_ps(load_halves(x));
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(floats)),
            _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1))};
}

LARS_TARGET LARS_INLINE Doubles load(const Bfloat16* x) {
    const __m128i zero = _mm_setzero_si128(), bits = load_halves(x);
    return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(zero, bits))),
            _mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpackhi_epi16(zero, bits)))};
}

LARS_TARGET LARS_INLINE Doubles load(const float* x) {
    return {_mm256_cvtps_pd(_mm_loadu_ps(x)), _mm256_cvtps_pd(_mm_loadu_ps(x + 4))};
}

LARS_TARGET LARS_INLINE Doubles load(const double* x) {
    return {_mm256_loadu_pd(x), _mm256_loadu_pd(x + 4)};
}

template <int Bits>
LARS_TARGET LARS_INLINE __m128 round_to_odd(__m256d x) {
    const __m256i dropped = _mm256_set1_epi64x((std::int64_t{1} << (53 - Bits)) - 1);
    const __m256i bits = _mm256_castpd_si256(x);
    const __m256i sum = _mm256_add_epi64(_mm256_and_si256(bits, dropped), dropped);
    return _mm256_cvtpd_ps(
        _mm256_castsi256_pd(_mm256_andnot_si256(dropped, _mm256_or_si256(bits, sum))));
}

// As floats; all NaN become the same.
template <int Bits>
LARS_TARGET LARS_INLINE __m256 round_to_odd(Doubles x) {
    const __m256 odd = _mm256_set_m128(round_to_odd<Bits>(x.high), round_to_odd<Bits>(x.low));
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(odd, nan, _mm256_cmp_ps(odd, odd, _CMP_UNORD_Q));
}

LARS_TARGET LARS_INLINE void store(Float16* out, Doubles x) {
    const __m128i halves =
        _mm256_cvtps_ph(round_to_odd<float16_bits>(x), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
}

LARS_TARGET LARS_INLINE void store(Bfloat16* out, Doubles x) {
    __m256i bits = _mm256_castps_si256(round_to_odd<bfloat16_bits>(x));
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    bits = _mm256_srli_epi32(bits, 16);
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
}

LARS_TARGET LARS_INLINE void store(float* out, Doubles x) {
    _mm_storeu_ps(out, _mm256_cvtpd_ps(x.low));
    _mm_storeu_ps(out + 4, _mm256_cvtpd_ps(x.high));
}

LARS_TARGET LARS_INLINE void store(double* out, Doubles x) {
    _mm256_storeu_pd(out, x.low);
    _mm256_storeu_pd(out + 4, x.high);
}

typedef float Floats __attribute__((vector_size(32)));
typedef std::uint32_t Words __attribute__((vector_size(32)));

LARS_TARGET LARS_INLINE bool any(Words x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }
#else
const std::size_t width = 1;
typedef double Doubles;
typedef float Floats;
typedef std::uint32_t Words;

inline bool any(Words x) { return x != 0; }

template <class T>
LARS_INLINE Doubles load(const T* x) {
    return read(*x);
}

template <class T>
LARS_INLINE void store(T* out, Doubles x) {
    write(*out, x);
}
#endif

// Fewer than `width` elements, followed by zeros.
template <class T>
struct Padded {
    Padded(const T* start, std::size_t size) { std::memcpy(x, start, size * sizeof(T)); }
    void copy_to(T* out, std::size_t size) const { std::memcpy(out, x, size * sizeof(T)); }

    T x[width] = {};
};

LARS_TARGET LARS_INLINE Floats as_floats(Words x) {
    Floats floats;
    std::memcpy(&floats, &x, sizeof x);
    return floats;
}

LARS_TARGET LARS_INLINE Words as_words(Floats x) {
    Words words;
    std::memcpy(&words, &x, sizeof x);
    return words;
}

LARS_TARGET LARS_INLINE Floats magnitude(Floats x) { return as_floats(as_words(x) & 0x7fffffffu); }

LARS_TARGET LARS_INLINE Words larger(Words x, Words y) { return x > y ? x : y; }

// Elements of 16 bits as floats, in any order. bfloat16 are read in pairs, as words of 32 bits:
// this needs fewer shuffles than reading single elements.
struct FloatPair {
    Floats one, other;
};

LARS_TARGET LARS_INLINE FloatPair load_floats(const Bfloat16* x) {
    Words words;
    std::memcpy(&words, x, sizeof words);
    return {as_floats(words & 0xffff0000u), as_floats(words << 16)};
}

// Rounds to the nearest bfloat16, but ties away from 0.
LARS_TARGET LARS_INLINE Words rounded(const Bfloat16*, FloatPair x) {
    return ((as_words(x.one) + 0x8000u) & 0xffff0000u) | ((as_words(x.other) + 0x8000u) >> 16);
}

#ifdef LARS_VECTORS
LARS_TARGET LARS_INLINE FloatPair load_floats(const Float16* x) {
    return {_mm256_cvtph_ps(load_halves(x)), _mm256_cvtph_ps(load_halves(x + width))};
}

LARS_TARGET LARS_INLINE Words rounded(const Float16*, FloatPair x) {
    return (Words)_mm256_set_m128i(_mm256_cvtps_ph(x.other, _MM_FROUND_TO_NEAREST_INT),
                                   _mm256_cvtps_ph(x.one, _MM_FROUND_TO_NEAREST_INT));
}
#endif
