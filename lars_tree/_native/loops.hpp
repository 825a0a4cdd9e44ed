// The loops over elements, which write the weights (`apply`), or the weights and the velocity
// (`apply_momentum`). kernel.hpp includes this file once for each instruction set, each time in
// another namespace; LARS_TARGET is the attribute that selects the instruction set.
//
// All instruction sets do the same operations on each element in the same order, so they give the
// same bits. This requires compilation without contraction of a * b + c (-ffp-contract=off) and
// without -ffast-math.
//
// For most types, the obvious loop in double is exact enough and is vectorized. Three types need
// more: float is handled four elements at a time, bfloat16 is computed in float where that provably
// gives the same bits, and float64 results that overflow are recomputed from scaled inputs.

#include "sums.hpp"

// ---- Without momentum: weight_factor * w - gradient_coefficient * dcdw. `out` may be w or dcdw.

// Handles coefficients and intermediate results that are out of the range of double.
template <class T, class G>
inline void apply_wide_range(const T* w, const G* dcdw, T* out, std::size_t size,
                             const Coefficients& coefficients) {
    const double weight_factor = coefficients.weight_factor();
    const auto stepped = [&coefficients, weight_factor](double weight, double gradient,
                                                        int exponent) {
        gradient = exponent ? std::ldexp(gradient, exponent) : gradient;
        return weight_factor * weight - coefficients.gradient * gradient;
    };
    for (std::size_t i = 0; i < size; ++i) {
        const double weight = read(w[i]), gradient = read(dcdw[i]);
        double result = stepped(weight, gradient, coefficients.exponent);
        if (sizeof(T) == sizeof(double) && !std::isfinite(result)) {
            // The step may overflow even if the new weight is finite: compute a quarter of both.
            result = 4 * stepped(weight / 4, gradient, coefficients.exponent - 2);
        }
        write(out[i], result);
    }
}

#ifdef LARS_FOURS
// Four elements at a time, in double. Compilers would vectorize the loop over eight elements at a
// time, and splitting and joining the vectors would take longer than the arithmetic.
typedef __m256d Four;

LARS_TARGET inline Four read_four(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }

LARS_TARGET inline void write_four(float* out, Four x) { _mm_storeu_ps(out, _mm256_cvtpd_ps(x)); }

LARS_TARGET inline std::size_t apply_fours(const float* w, const float* dcdw, float* out,
                                           std::size_t size, double weight_factor,
                                           double gradient_coefficient) {
    std::size_t i = 0;
    for (; i + 4 <= size; i += 4) {
        write_four(out + i,
                   weight_factor * read_four(w + i) - gradient_coefficient * read_four(dcdw + i));
    }
    return i;
}
#endif

// Returns the number of elements that were computed four at a time: 0 for types other than float.
template <class T, class G>
inline std::size_t apply_fours(const T*, const G*, T*, std::size_t, double, double) {
    return 0;
}

template <class T, class G>
LARS_TARGET void apply_in_double(const T* w, const G* dcdw, T* out, std::size_t size,
                                 const Coefficients& coefficients) {
    const double weight_factor = coefficients.weight_factor();
    const double gradient_coefficient = coefficients.gradient;
    const std::size_t done = apply_fours(w, dcdw, out, size, weight_factor, gradient_coefficient);
    LARS_INDEPENDENT
    for (std::size_t i = done; i < size; ++i) {
        write(out[i], weight_factor * read(w[i]) - gradient_coefficient * read(dcdw[i]));
    }
}

template <class T, class G>
LARS_TARGET void apply(const T* w, const G* dcdw, T* out, std::size_t size,
                       const Coefficients& coefficients) {
    apply_in_double(w, dcdw, out, size, coefficients);
}

// The sign bit of the result is set if x is infinite or NaN: adding one to an exponent of all ones
// carries into the sign bit.
LARS_TARGET inline std::uint64_t sign_if_not_finite(double x) {
    const std::uint64_t infinite = std::uint64_t{0x7ff} << 52, last_bit = infinite & -infinite;
    return (bit_cast<std::uint64_t>(x) & infinite) + last_bit;
}

// float64 results may overflow, so each block of results is checked before it is written.
template <class G>
LARS_TARGET void apply(const double* w, const G* dcdw, double* out, std::size_t size,
                       const Coefficients& coefficients) {
    const double weight_factor = coefficients.weight_factor();
    const double gradient_coefficient = coefficients.gradient;
    std::size_t start = 0;
    for (; size - start >= block; start += block) {
        double results[block];
        std::uint64_t overflows = 0;
        for (std::size_t i = 0; i < block; ++i) {
            results[i] =
                weight_factor * w[start + i] - gradient_coefficient * read(dcdw[start + i]);
            overflows |= sign_if_not_finite(results[i]);
        }
        if (overflows >> 63) {
            apply_wide_range(w + start, dcdw + start, out + start, block, coefficients);
        } else {
            std::memcpy(out + start, results, sizeof results);
        }
    }
    apply_wide_range(w + start, dcdw + start, out + start, size - start, coefficients);
}

// bfloat16 is computed in float where that gives the same bits as double. The rounding errors of
// float add up to less than `error`. If both ends of the interval result +- error round to the same
// bfloat16, so does the result in double. Otherwise, or if the interval is not finite, the block is
// computed in double.
struct Trial {
    std::uint32_t bits;   // the upper half is the result, unless there is doubt
    std::uint32_t doubt;  // the upper half is 0 if both ends round to the same bfloat16
    std::uint32_t error;
};

LARS_TARGET inline Trial try_in_float(float weight, float gradient, float weight_factor,
                                      float gradient_coefficient) {
    const float relative = 4.76837158203125e-07f, absolute = 1e-39f;  // 2^-21; above 2^-130
    weight = weight_factor * weight;
    float step = gradient_coefficient * gradient;
    float error = (std::fabs(weight) + std::fabs(step)) * relative + absolute;
    float result = weight - step;
    std::uint32_t low = bit_cast<std::uint32_t>(result - error) + 0x8000u;
    std::uint32_t high = bit_cast<std::uint32_t>(result + error) + 0x8000u;
    return {low, low ^ high, bit_cast<std::uint32_t>(error)};
}

// Elements are read in pairs, as words of 32 bits: this needs fewer shuffles than reading single
// elements.
LARS_TARGET inline void apply(const Bfloat16* w, const Bfloat16* dcdw, Bfloat16* out,
                              std::size_t size, const Coefficients& coefficients) {
    const float weight_factor = static_cast<float>(coefficients.weight_factor());
    const float gradient_coefficient = static_cast<float>(coefficients.gradient);
    const std::uint32_t upper = 0xffff0000u, infinite = 0x7f800000u;
    const bool in_range = 1e-30f < std::fabs(weight_factor) && std::fabs(weight_factor) < 1e30f &&
                          1e-30f < gradient_coefficient && gradient_coefficient < 1e30f;
    std::size_t start = 0;
    for (; in_range && size - start >= block; start += block) {
        std::uint32_t weights[block / 2], gradients[block / 2], doubt = 0, error = 0;
        std::memcpy(weights, w + start, sizeof weights);
        std::memcpy(gradients, dcdw + start, sizeof gradients);
        for (std::size_t i = 0; i < block / 2; ++i) {
            Trial one = try_in_float(bit_cast<float>(weights[i] & upper),
                                     bit_cast<float>(gradients[i] & upper), weight_factor,
                                     gradient_coefficient);
            Trial other =
                try_in_float(bit_cast<float>(weights[i] << 16), bit_cast<float>(gradients[i] << 16),
                             weight_factor, gradient_coefficient);
            doubt |= one.doubt | other.doubt;
            error = std::max(error, std::max(one.error, other.error));
            weights[i] = (one.bits & upper) | (other.bits >> 16);
        }
        if ((doubt & upper) || error >= infinite) {
            apply_in_double(w + start, dcdw + start, out + start, block, coefficients);
        } else {
            std::memcpy(out + start, weights, sizeof weights);
        }
    }
    apply_in_double(w + start, dcdw + start, out + start, size - start, coefficients);
}

template <class T, class G>
LARS_TARGET void apply(const void* w, const void* dcdw, void* out, std::size_t size,
                       const Coefficients& coefficients) {
    const T* weights = static_cast<const T*>(w);
    const G* gradients = static_cast<const G*>(dcdw);
    T* results = static_cast<T*>(out);
    if (coefficients.exponent) {
        apply_wide_range(weights, gradients, results, size, coefficients);
    } else {
        apply(weights, gradients, results, size, coefficients);
    }
}

// ---- With momentum: `velocity` is updated in place.

template <class Number>
struct WeightAndVelocity {
    Number w, velocity;
};

// Mirrors `increment` and `apply_momentum` of _numerics/formula.py, for one number or four.
template <class Number>
LARS_TARGET inline WeightAndVelocity<Number> momentum_step(Number w, Number dcdw, Number velocity,
                                                           const Coefficients& coefficients,
                                                           const MomentumOptions& options) {
    Number u = coefficients.gradient * dcdw;
    if (coefficients.decays) u += coefficients.decay * w;
    velocity = options.momentum * velocity + u;
    const Number direction = options.nesterov ? u + options.momentum * velocity : velocity;
    return {w - options.lr_after_momentum * direction, velocity};
}

template <class T, class G, class V>
inline void apply_momentum_wide_range(const T* w, const G* dcdw, V* velocity, T* out,
                                      std::size_t size, const Coefficients& coefficients,
                                      const MomentumOptions& options) {
    const auto scaled = [&coefficients](double gradient, int change) {
        const int exponent = coefficients.exponent + change;
        return exponent ? std::ldexp(gradient, exponent) : gradient;
    };
    for (std::size_t i = 0; i < size; ++i) {
        const double weight = read(w[i]), gradient = read(dcdw[i]), before = read(velocity[i]);
        auto result = momentum_step(weight, scaled(gradient, 0), before, coefficients, options);
        if (sizeof(T) == sizeof(double)) {  // as in apply_wide_range
            auto quarter =
                momentum_step(weight / 4, scaled(gradient, -2), before / 4, coefficients, options);
            if (!std::isfinite(result.w)) result.w = 4 * quarter.w;
            if (!std::isfinite(result.velocity)) result.velocity = 4 * quarter.velocity;
        }
        write(velocity[i], result.velocity);
        write(out[i], result.w);
    }
}

#ifdef LARS_FOURS
// The options are passed by value: with a reference, compilers would reload them after each write.
LARS_TARGET inline std::size_t apply_momentum_fours(const float* w, const float* dcdw,
                                                    float* velocity, float* out, std::size_t size,
                                                    Coefficients coefficients,
                                                    MomentumOptions options) {
    std::size_t i = 0;
    for (; i + 4 <= size; i += 4) {
        const auto result = momentum_step(read_four(w + i), read_four(dcdw + i),
                                          read_four(velocity + i), coefficients, options);
        write_four(velocity + i, result.velocity);
        write_four(out + i, result.w);
    }
    return i;
}
#endif

template <class T, class G, class V>
inline std::size_t apply_momentum_fours(const T*, const G*, V*, T*, std::size_t, Coefficients,
                                        MomentumOptions) {
    return 0;
}

template <class T, class G, class V>
LARS_TARGET void apply_momentum(const T* w, const G* dcdw, V* velocity, T* out, std::size_t size,
                                const Coefficients& coefficients, const MomentumOptions& options) {
    const std::size_t done =
        apply_momentum_fours(w, dcdw, velocity, out, size, coefficients, options);
    LARS_INDEPENDENT
    for (std::size_t i = done; i < size; ++i) {
        auto result = momentum_step<double>(read(w[i]), read(dcdw[i]), read(velocity[i]),
                                            coefficients, options);
        write(velocity[i], result.velocity);
        write(out[i], result.w);
    }
}

template <class G>
LARS_TARGET void apply_momentum(const double* w, const G* dcdw, double* velocity, double* out,
                                std::size_t size, const Coefficients& coefficients,
                                const MomentumOptions& options) {
    std::size_t start = 0;
    for (; size - start >= block; start += block) {
        double weights[block], velocities[block];
        std::uint64_t overflows = 0;
        for (std::size_t i = 0; i < block; ++i) {
            auto result = momentum_step<double>(w[start + i], read(dcdw[start + i]),
                                                velocity[start + i], coefficients, options);
            weights[i] = result.w;
            velocities[i] = result.velocity;
            overflows |= sign_if_not_finite(result.w);  // set too if the velocity is not finite
        }
        if (overflows >> 63) {
            apply_momentum_wide_range(w + start, dcdw + start, velocity + start, out + start, block,
                                      coefficients, options);
        } else {
            std::memcpy(velocity + start, velocities, sizeof velocities);
            std::memcpy(out + start, weights, sizeof weights);
        }
    }
    apply_momentum_wide_range(w + start, dcdw + start, velocity + start, out + start, size - start,
                              coefficients, options);
}

template <class T, class G>
LARS_TARGET void apply_momentum(const void* w, const void* dcdw, void* velocity, void* out,
                                std::size_t size, const Coefficients& coefficients,
                                const MomentumOptions& options) {
    const T* weights = static_cast<const T*>(w);
    const G* gradients = static_cast<const G*>(dcdw);
    auto* velocities = static_cast<typename VelocityOf<T>::type*>(velocity);
    T* results = static_cast<T*>(out);
    if (coefficients.exponent) {
        apply_momentum_wide_range(weights, gradients, velocities, results, size, coefficients,
                                  options);
    } else {
        apply_momentum(weights, gradients, velocities, results, size, coefficients, options);
    }
}

// ---- The table of these functions

template <class T, class G>
inline void enter(Loops& to, Format format, Format dcdw_format) {
    to.apply[format][dcdw_format] = apply<T, G>;
    to.apply_momentum[format][dcdw_format] = apply_momentum<T, G>;
    to.add_decay[format][dcdw_format] = add_decay<T, G>;
    to.sum_squares[format][dcdw_format] = sum_squares<T, G>;
}

template <class T>
inline void enter(Loops& to, Format format) {
    to.largest[format] = largest<T>;
    enter<T, Float16>(to, format, float16);
    enter<T, Bfloat16>(to, format, bfloat16);
    enter<T, float>(to, format, float32);
    enter<T, double>(to, format, float64);
}

inline Loops loops() {
    Loops all;
    all.sum_scaled_squares = sum_scaled_squares;
    enter<Float16>(all, float16);
    enter<Bfloat16>(all, bfloat16);
    enter<float>(all, float32);
    enter<double>(all, float64);
    return all;
}
