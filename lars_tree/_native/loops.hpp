// The loops over elements. kernel.hpp includes this file once for each instruction set, in a
// namespace of its own, with LARS_TARGET as the attribute that asks the compiler for it.
//
// All instruction sets do the same operations on each element in the same order, so they give the
// same bits: compile without contraction of a * b + c into one operation, and without -ffast-math.

#include "sums.hpp"

// The step itself, kept * w - on_dcdw * dcdw, element by element; `out` may be w or dcdw
// themselves.

// For numbers that leave the range of double on the way.
template <class T, class G>
inline void apply_carefully(const T* w, const G* dcdw, T* out, std::size_t size,
                            const Coefficients& by) {
    const double kept = by.kept();
    const auto stepped = [&by, kept](double weight, double gradient, int exponent) {
        gradient = exponent ? std::ldexp(gradient, exponent) : gradient;
        return kept * weight - by.on_dcdw * gradient;
    };
    for (std::size_t i = 0; i < size; ++i) {
        const double weight = read(w[i]), gradient = read(dcdw[i]);
        double result = stepped(weight, gradient, by.exponent);
        if (sizeof(T) == sizeof(double) && !std::isfinite(result)) {
            // A step as long as the largest number may overflow although the new weight does not.
            result = 4 * stepped(weight / 4, gradient, by.exponent - 2);
        }
        write(out[i], result);
    }
}

#ifdef LARS_FOURS
// Four elements at a time, in double. Compilers take twice as many, and spend more time on taking
// them apart and joining them than on arithmetic.
typedef __m256d Four;

LARS_TARGET inline Four read_four(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }

LARS_TARGET inline void write_four(float* out, Four x) { _mm_storeu_ps(out, _mm256_cvtpd_ps(x)); }

LARS_TARGET inline std::size_t apply_fours(const float* w, const float* dcdw, float* out,
                                           std::size_t size, double kept, double on_dcdw) {
    std::size_t i = 0;
    for (; i + 4 <= size; i += 4) {
        write_four(out + i, kept * read_four(w + i) - on_dcdw * read_four(dcdw + i));
    }
    return i;
}
#endif

// How many elements were done four at a time: none of other types.
template <class T, class G>
inline std::size_t apply_fours(const T*, const G*, T*, std::size_t, double, double) {
    return 0;
}

template <class T, class G>
LARS_TARGET void apply_in_double(const T* w, const G* dcdw, T* out, std::size_t size,
                                 const Coefficients& by) {
    const double kept = by.kept(), on_dcdw = by.on_dcdw;
    const std::size_t done = apply_fours(w, dcdw, out, size, kept, on_dcdw);
    LARS_INDEPENDENT
    for (std::size_t i = done; i < size; ++i) {
        write(out[i], kept * read(w[i]) - on_dcdw * read(dcdw[i]));
    }
}

template <class T, class G>
LARS_TARGET void apply(const T* w, const G* dcdw, T* out, std::size_t size,
                       const Coefficients& by) {
    apply_in_double(w, dcdw, out, size, by);
}

// The sign bit is set for infinity and NaN, whose exponent has all its bits: so it carries.
LARS_TARGET inline std::uint64_t sign_if_beyond(double x) {
    const std::uint64_t infinite = std::uint64_t{0x7ff} << 52, last_bit = infinite & -infinite;
    return (bit_cast<std::uint64_t>(x) & infinite) + last_bit;
}

// float64 may leave the range of double: look before it is written.
template <class G>
LARS_TARGET void apply(const double* w, const G* dcdw, double* out, std::size_t size,
                       const Coefficients& by) {
    const double kept = by.kept(), on_dcdw = by.on_dcdw;
    std::size_t start = 0;
    for (; size - start >= block; start += block) {
        double results[block];
        std::uint64_t beyond = 0;
        for (std::size_t i = 0; i < block; ++i) {
            results[i] = kept * w[start + i] - on_dcdw * read(dcdw[start + i]);
            beyond |= sign_if_beyond(results[i]);
        }
        if (beyond >> 63) {
            apply_carefully(w + start, dcdw + start, out + start, block, by);
        } else {
            std::memcpy(out + start, results, sizeof results);
        }
    }
    apply_carefully(w + start, dcdw + start, out + start, size - start, by);
}

// bfloat16 in float, as far as that can tell the bits. The roundings of float add up to less than
// `error`; where both ends of that interval round to the same bfloat16, the double does so too, and
// where they do not, or are not finite, their block is computed in double.
struct Trial {
    std::uint32_t bits;   // the result in the upper half, if there is no doubt
    std::uint32_t doubt;  // the upper half is 0 if there is none
    std::uint32_t error;
};

LARS_TARGET inline Trial tried(float weight, float gradient, float on_w, float on_dcdw) {
    const float relative = 4.76837158203125e-07f, absolute = 1e-39f;  // 2^-21, more than 2^-130
    weight = on_w * weight;
    float step = on_dcdw * gradient;
    float error = (std::fabs(weight) + std::fabs(step)) * relative + absolute;
    float result = weight - step;
    std::uint32_t low = bit_cast<std::uint32_t>(result - error) + 0x8000u;
    std::uint32_t high = bit_cast<std::uint32_t>(result + error) + 0x8000u;
    return {low, low ^ high, bit_cast<std::uint32_t>(error)};
}

// Two numbers to each word of 32 bits, which takes less shuffling than one at a time.
LARS_TARGET inline void apply(const Brain* w, const Brain* dcdw, Brain* out, std::size_t size,
                              const Coefficients& by) {
    const float on_w = static_cast<float>(by.kept()), on_dcdw = static_cast<float>(by.on_dcdw);
    const std::uint32_t upper = 0xffff0000u, infinite = 0x7f800000u;
    const bool in_range = 1e-30f < std::fabs(on_w) && std::fabs(on_w) < 1e30f &&  //
                          1e-30f < on_dcdw && on_dcdw < 1e30f;
    std::size_t start = 0;
    for (; in_range && size - start >= block; start += block) {
        std::uint32_t weights[block / 2], gradients[block / 2], doubt = 0, error = 0;
        std::memcpy(weights, w + start, sizeof weights);
        std::memcpy(gradients, dcdw + start, sizeof gradients);
        for (std::size_t i = 0; i < block / 2; ++i) {
            Trial one = tried(bit_cast<float>(weights[i] & upper),
                              bit_cast<float>(gradients[i] & upper), on_w, on_dcdw);
            Trial other = tried(bit_cast<float>(weights[i] << 16),
                                bit_cast<float>(gradients[i] << 16), on_w, on_dcdw);
            doubt |= one.doubt | other.doubt;
            error = std::max(error, std::max(one.error, other.error));
            weights[i] = (one.bits & upper) | (other.bits >> 16);
        }
        if ((doubt & upper) || error >= infinite) {
            apply_in_double(w + start, dcdw + start, out + start, block, by);
        } else {
            std::memcpy(out + start, weights, sizeof weights);
        }
    }
    apply_in_double(w + start, dcdw + start, out + start, size - start, by);
}

template <class T, class G>
LARS_TARGET void apply(const void* w, const void* dcdw, void* out, std::size_t size,
                       const Coefficients& by) {
    const T* weights = static_cast<const T*>(w);
    const G* gradients = static_cast<const G*>(dcdw);
    T* results = static_cast<T*>(out);
    if (by.exponent) {
        apply_carefully(weights, gradients, results, size, by);
    } else {
        apply(weights, gradients, results, size, by);
    }
}

// The step with momentum: `velocity` is stepped in place.

template <class Number>
struct Moved {
    Number w, velocity;
};

// The same statements as in `along` and `move` in lars_tree/_rule.py; of one number, or of four.
template <class Number>
LARS_TARGET inline Moved<Number> moved(Number w, Number dcdw, Number velocity,
                                       const Coefficients& by, const Motion& motion) {
    Number step = by.on_dcdw * dcdw;
    if (by.decays) step += by.on_w * w;
    velocity = motion.momentum * velocity + step;
    const Number moved_by = motion.nesterov ? step + motion.momentum * velocity : velocity;
    return {w - motion.lr_after_momentum * moved_by, velocity};
}

template <class T, class G, class V>
inline void move_carefully(const T* w, const G* dcdw, V* velocity, T* out, std::size_t size,
                           const Coefficients& by, const Motion& motion) {
    const auto scaled = [&by](double gradient, int change) {
        const int exponent = by.exponent + change;
        return exponent ? std::ldexp(gradient, exponent) : gradient;
    };
    for (std::size_t i = 0; i < size; ++i) {
        const double weight = read(w[i]), gradient = read(dcdw[i]), before = read(velocity[i]);
        auto result = moved(weight, scaled(gradient, 0), before, by, motion);
        if (sizeof(T) == sizeof(double)) {  // as in apply_carefully
            auto quarter = moved(weight / 4, scaled(gradient, -2), before / 4, by, motion);
            if (!std::isfinite(result.w)) result.w = 4 * quarter.w;
            if (!std::isfinite(result.velocity)) result.velocity = 4 * quarter.velocity;
        }
        write(velocity[i], result.velocity);
        write(out[i], result.w);
    }
}

#ifdef LARS_FOURS
// By value: what is behind a reference might change with each write, as far as compilers know.
LARS_TARGET inline std::size_t move_fours(const float* w, const float* dcdw, float* velocity,
                                          float* out, std::size_t size, Coefficients by,
                                          Motion motion) {
    std::size_t i = 0;
    for (; i + 4 <= size; i += 4) {
        const auto result =
            moved(read_four(w + i), read_four(dcdw + i), read_four(velocity + i), by, motion);
        write_four(velocity + i, result.velocity);
        write_four(out + i, result.w);
    }
    return i;
}
#endif

template <class T, class G, class V>
inline std::size_t move_fours(const T*, const G*, V*, T*, std::size_t, Coefficients, Motion) {
    return 0;
}

template <class T, class G, class V>
LARS_TARGET void move(const T* w, const G* dcdw, V* velocity, T* out, std::size_t size,
                      const Coefficients& by, const Motion& motion) {
    const std::size_t done = move_fours(w, dcdw, velocity, out, size, by, motion);
    LARS_INDEPENDENT
    for (std::size_t i = done; i < size; ++i) {
        auto result = moved<double>(read(w[i]), read(dcdw[i]), read(velocity[i]), by, motion);
        write(velocity[i], result.velocity);
        write(out[i], result.w);
    }
}

template <class G>
LARS_TARGET void move(const double* w, const G* dcdw, double* velocity, double* out,
                      std::size_t size, const Coefficients& by, const Motion& motion) {
    std::size_t start = 0;
    for (; size - start >= block; start += block) {
        double weights[block], velocities[block];
        std::uint64_t beyond = 0;
        for (std::size_t i = 0; i < block; ++i) {
            auto result =
                moved<double>(w[start + i], read(dcdw[start + i]), velocity[start + i], by, motion);
            weights[i] = result.w;
            velocities[i] = result.velocity;
            beyond |= sign_if_beyond(result.w);  // which it is wherever the velocity is
        }
        if (beyond >> 63) {
            move_carefully(w + start, dcdw + start, velocity + start, out + start, block, by,
                           motion);
        } else {
            std::memcpy(velocity + start, velocities, sizeof velocities);
            std::memcpy(out + start, weights, sizeof weights);
        }
    }
    move_carefully(w + start, dcdw + start, velocity + start, out + start, size - start, by,
                   motion);
}

template <class T, class G>
LARS_TARGET void move(const void* w, const void* dcdw, void* velocity, void* out, std::size_t size,
                      const Coefficients& by, const Motion& motion) {
    const T* weights = static_cast<const T*>(w);
    const G* gradients = static_cast<const G*>(dcdw);
    auto* velocities = static_cast<typename VelocityOf<T>::type*>(velocity);
    T* results = static_cast<T*>(out);
    if (by.exponent) {
        move_carefully(weights, gradients, velocities, results, size, by, motion);
    } else {
        move(weights, gradients, velocities, results, size, by, motion);
    }
}

// The table of what is above.

template <class T, class G>
inline void enter(Loops& to, Format format, Format dcdw_format) {
    to.apply[format][dcdw_format] = apply<T, G>;
    to.move[format][dcdw_format] = move<T, G>;
    to.join[format][dcdw_format] = join<T, G>;
}

template <class T>
inline void enter(Loops& to, Format format) {
    to.sum_squares[format] = sum_squares<T, false>;
    to.sum_scaled_squares[format] = sum_squares<T, true>;
    to.largest[format] = largest<T>;
    enter<T, Half>(to, format, float16);
    enter<T, Brain>(to, format, bfloat16);
    enter<T, float>(to, format, float32);
    enter<T, double>(to, format, float64);
}

inline Loops loops() {
    Loops all;
    enter<Half>(all, float16);
    enter<Brain>(all, bfloat16);
    enter<float>(all, float32);
    enter<double>(all, float64);
    return all;
}
