// The loops over elements, which write the weights (`apply`), or the weights and the velocity
// (`apply_momentum`). kernel.hpp includes this file once for each instruction set, each time in
// another namespace; LARS_TARGET is the attribute that selects the instruction set.
//
// All instruction sets do the same operations on each element in the same order, so they give the
// same bits. This requires compilation without contraction of a * b + c (-ffp-contract=off) and
// without -ffast-math.
//
// For most types, computing in double is exact enough. float64 results that overflow are recomputed
// from scaled inputs. Without momentum, bfloat16 (and float16, if the processor converts it) is
// computed in float where that provably gives the same bits.

#include "vectors.hpp"

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

template <class T, class G>
LARS_TARGET LARS_INLINE void step_in_double(const T* w, const G* dcdw, T* out, double weight_factor,
                                            double gradient_coefficient) {
    store(out, weight_factor * load(w) - gradient_coefficient * load(dcdw));
}

template <class T, class G>
LARS_TARGET void apply_in_double(const T* w, const G* dcdw, T* out, std::size_t size,
                                 const Coefficients& coefficients) {
    const double weight_factor = coefficients.weight_factor(), gradient = coefficients.gradient;
    const std::size_t rest = size % width, end = size - rest;
    LARS_INDEPENDENT
    for (std::size_t i = 0; i < end; i += width) {
        step_in_double(w + i, dcdw + i, out + i, weight_factor, gradient);
    }
    if (rest) {
        Padded<T> last(w + end, rest);
        step_in_double(last.x, Padded<G>(dcdw + end, rest).x, last.x, weight_factor, gradient);
        last.copy_to(out + end, rest);
    }
}

template <class T, class G>
LARS_TARGET void apply(const T* w, const G* dcdw, T* out, std::size_t size,
                       const Coefficients& coefficients) {
    apply_in_double(w, dcdw, out, size, coefficients);
}

// Adding one to an exponent of all ones, which infinity and NaN have, carries into the sign bit.
LARS_TARGET inline bool are_finite(const double (&x)[block]) {
    const std::uint64_t infinite = std::uint64_t{0x7ff} << 52, last_bit = infinite & -infinite;
    std::uint64_t signs = 0;
    for (double item : x) signs |= (bit_cast<std::uint64_t>(item) & infinite) + last_bit;
    return !(signs >> 63);
}

// float64 results may overflow, so each block of results is checked before it is written.
template <class G>
LARS_TARGET void apply(const double* w, const G* dcdw, double* out, std::size_t size,
                       const Coefficients& coefficients) {
    std::size_t start = 0;
    for (; size - start >= block; start += block) {
        double results[block];
        apply_in_double(w + start, dcdw + start, results, block, coefficients);
        if (are_finite(results)) {
            std::memcpy(out + start, results, sizeof results);
        } else {
            apply_wide_range(w + start, dcdw + start, out + start, block, coefficients);
        }
    }
    apply_wide_range(w + start, dcdw + start, out + start, size - start, coefficients);
}

// float16 and bfloat16 are computed in float where that gives the same bits as double. The rounding
// errors of float add up to less than `error`. If both ends of the interval result +- error round
// to the same number, so does the result in double. Otherwise, or if the interval is not finite,
// the block is computed in double.
struct Interval {
    Floats low, high;
    Words error;
};

LARS_TARGET LARS_INLINE Interval interval(Floats weight, Floats gradient, float weight_factor,
                                          float gradient_coefficient) {
    // Each product is rounded twice, the difference and the ends once: 4 * 2^-24, and some more.
    const float relative = 2.98023224e-07f, absolute = 1e-39f;  // 5 * 2^-24; above 2^-130
    weight = weight_factor * weight;
    const Floats step = gradient_coefficient * gradient, result = weight - step;
    const Floats error = (magnitude(weight) + magnitude(step)) * relative + absolute;
    return {result - error, result + error, as_words(error)};
}

template <class T>
LARS_TARGET LARS_INLINE bool try_in_float(const T* w, const T* dcdw, T (&results)[block],
                                          float weight_factor, float gradient_coefficient) {
    Words doubt = {}, error = {};
    for (std::size_t i = 0; i < block; i += sizeof(Words) / sizeof(T)) {
        const FloatPair weight = load_floats(w + i), gradient = load_floats(dcdw + i);
        const Interval one =
            interval(weight.one, gradient.one, weight_factor, gradient_coefficient);
        const Interval other =
            interval(weight.other, gradient.other, weight_factor, gradient_coefficient);
        const Words low = rounded(w, {one.low, other.low});
        doubt |= low ^ rounded(w, {one.high, other.high});
        error = larger(error, larger(one.error, other.error));
        std::memcpy(results + i, &low, sizeof low);
    }
    return !any(doubt | ((error + 0x00800000u) & 0x80000000u));  // as in are_finite
}

template <class T>
LARS_TARGET void apply_in_float(const T* w, const T* dcdw, T* out, std::size_t size,
                                const Coefficients& coefficients) {
    const float weight_factor = static_cast<float>(coefficients.weight_factor());
    const float gradient_coefficient = static_cast<float>(coefficients.gradient);
    const bool in_range = 1e-30f < std::fabs(weight_factor) && std::fabs(weight_factor) < 1e30f &&
                          1e-30f < gradient_coefficient && gradient_coefficient < 1e30f;
    std::size_t start = 0;
    for (; in_range && size - start >= block; start += block) {
        T results[block];
        if (try_in_float(w + start, dcdw + start, results, weight_factor, gradient_coefficient)) {
            std::memcpy(out + start, results, sizeof results);
        } else {
            apply_in_double(w + start, dcdw + start, out + start, block, coefficients);
        }
    }
    apply_in_double(w + start, dcdw + start, out + start, size - start, coefficients);
}

LARS_TARGET inline void apply(const Bfloat16* w, const Bfloat16* dcdw, Bfloat16* out,
                              std::size_t size, const Coefficients& coefficients) {
    apply_in_float(w, dcdw, out, size, coefficients);
}

#ifdef LARS_VECTORS
LARS_TARGET inline void apply(const Float16* w, const Float16* dcdw, Float16* out, std::size_t size,
                              const Coefficients& coefficients) {
    apply_in_float(w, dcdw, out, size, coefficients);
}
#endif

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

// Mirrors `increment` and `apply_momentum` of _numerics/formula.py. Number is double or Doubles.
template <class Number>
LARS_TARGET LARS_INLINE WeightAndVelocity<Number> momentum_step(Number w, Number dcdw,
                                                                Number velocity,
                                                                const Coefficients& coefficients,
                                                                const MomentumOptions& options) {
    Number u = coefficients.gradient * dcdw;
    if (coefficients.decays) u = u + coefficients.decay * w;
    velocity = options.momentum * velocity + u;
    const Number direction = options.nesterov ? u + options.momentum * velocity : velocity;
    return {w - options.lr_after_momentum * direction, velocity};
}

template <class T, class G, class V>
LARS_TARGET void apply_momentum_wide_range(const T* w, const G* dcdw, V* velocity, T* out,
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

template <class T, class G, class V>
LARS_TARGET LARS_INLINE void momentum_step_in_double(const T* w, const G* dcdw, const V* velocity,
                                                     V* new_velocity, T* out,
                                                     const Coefficients& coefficients,
                                                     const MomentumOptions& options) {
    const auto result = momentum_step(load(w), load(dcdw), load(velocity), coefficients, options);
    store(new_velocity, result.velocity);
    store(out, result.w);
}

// The options are passed by value: with a reference, compilers would reload them after each write.
template <class T, class G, class V>
LARS_TARGET void apply_momentum_in_double(const T* w, const G* dcdw, const V* velocity,
                                          V* new_velocity, T* out, std::size_t size,
                                          Coefficients coefficients, MomentumOptions options) {
    const std::size_t rest = size % width, end = size - rest;
    LARS_INDEPENDENT
    for (std::size_t i = 0; i < end; i += width) {
        momentum_step_in_double(w + i, dcdw + i, velocity + i, new_velocity + i, out + i,
                                coefficients, options);
    }
    if (rest) {
        Padded<T> last(w + end, rest);
        Padded<V> last_velocity(velocity + end, rest);
        momentum_step_in_double(last.x, Padded<G>(dcdw + end, rest).x, last_velocity.x,
                                last_velocity.x, last.x, coefficients, options);
        last_velocity.copy_to(new_velocity + end, rest);
        last.copy_to(out + end, rest);
    }
}

template <class T, class G, class V>
LARS_TARGET void apply_momentum(const T* w, const G* dcdw, V* velocity, T* out, std::size_t size,
                                const Coefficients& coefficients, const MomentumOptions& options) {
    apply_momentum_in_double(w, dcdw, velocity, velocity, out, size, coefficients, options);
}

template <class G>
LARS_TARGET void apply_momentum(const double* w, const G* dcdw, double* velocity, double* out,
                                std::size_t size, const Coefficients& coefficients,
                                const MomentumOptions& options) {
    std::size_t start = 0;
    for (; size - start >= block; start += block) {
        double weights[block], velocities[block];
        apply_momentum_in_double(w + start, dcdw + start, velocity + start, velocities, weights,
                                 block, coefficients, options);
        if (are_finite(weights)) {  // then the velocity is finite too
            std::memcpy(velocity + start, velocities, sizeof velocities);
            std::memcpy(out + start, weights, sizeof weights);
        } else {
            apply_momentum_wide_range(w + start, dcdw + start, velocity + start, out + start, block,
                                      coefficients, options);
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
