// The rule of one layer: coefficients from norms, and what norms prove of the results.
//
// The same statements as in lars_tree/_rule.py; kernel.hpp explains the two passes over memory.
// Number is DoubleDouble, or double where that is enough (see `double_is_enough`).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "formats.hpp"
#include "double_double.hpp"

namespace lars {

struct Rule {
    double lr_before_momentum, decay_lambda, trust_coefficient, eps, grad_scale;
    bool adapt, trust_clip;
    double momentum, lr_after_momentum;
    bool nesterov, maximize;
    bool joint_norm;
    double dampening;
    bool must_be_finite;  // the results; else infinity and NaN propagate

    // Whether the norm of g + decay_lambda * w is asked for, and is not that of g.
    bool is_joint() const { return joint_norm && adapt && decay_lambda != 0; }
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
    double momentum, lr_after_momentum;
    bool nesterov;
};

// Unless it is `bounded`, it is the ratio divided by the rate, before trust_clip limits it to 1.
template <class Number>
inline Number trust_ratio(Number w_norm, Number dcdw_norm, const Rule& rule, bool bounded = true) {
    const Number one = 1;
    if (!rule.adapt) return one;
    if (is_zero(w_norm) || is_zero(dcdw_norm)) return one;
    Number denominator = dcdw_norm / Number(rule.grad_scale);
    // With joint_norm it is the norm of the sum.
    if (!rule.joint_norm) denominator = denominator + Number(rule.decay_lambda) * w_norm;
    denominator = denominator + Number(rule.eps);
    Number ratio = Number(rule.trust_coefficient) * w_norm / denominator;
    if (!rule.trust_clip) return ratio;
    const Number rate = Number(rule.lr_before_momentum) * Number(rule.lr_after_momentum);
    if (bounded && ratio > rate) return one;
    return ratio / (is_zero(rate) ? one : rate);
}

// `exponent` is that of a sum, see Addition.
template <class Number>
inline Coefficients coefficients(Number w_norm, Number dcdw_norm, const Rule& rule,
                                 int exponent = 0) {
    Number rate = Number(rule.lr_before_momentum) * trust_ratio(w_norm, dcdw_norm, rule) *
                  Number(1 - rule.dampening);
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
    return is_moderate(rule.lr_before_momentum) && is_moderate(rule.decay_lambda) &&
           is_moderate(rule.eps) && is_moderate(rule.trust_coefficient) &&
           is_moderate(rule.grad_scale) &&
           (!rule.trust_clip || is_moderate(rule.lr_after_momentum));
}

// ---- Between the two passes

// What the first pass finds of a layer; all but the last are numbers of DoubleDouble. dcdw is the
// norm of the sum where rule.is_joint(), whose scale has the exponent `sum_exponent`.
// `velocity_most` is the largest magnitude of the velocity, where that was asked for.
struct Norms {
    double w_high, w_low, w_exponent;
    double dcdw_high, dcdw_low, dcdw_exponent;
    double sum_exponent, velocity_most;

    static DoubleDouble number(double high, double low, double exponent) {
        return DoubleDouble(Pair{high, low}, static_cast<std::int64_t>(exponent));
    }
    DoubleDouble w() const { return number(w_high, w_low, w_exponent); }
    DoubleDouble dcdw() const { return number(dcdw_high, dcdw_low, dcdw_exponent); }
    void set(DoubleDouble w, DoubleDouble dcdw) {
        w_high = w.high, w_low = w.low, w_exponent = static_cast<double>(w.exponent);
        dcdw_high = dcdw.high, dcdw_low = dcdw.low;
        dcdw_exponent = static_cast<double>(dcdw.exponent);
    }
};

// Whether coefficients are computed in double; else in DoubleDouble.
inline bool is_short(const Layer& layer) {
    return layer.w_format != float64 && layer.dcdw_format != float64 &&
           double_is_enough(*layer.rule);
}

inline Coefficients coefficients(const Layer& layer, const Norms& norms) {
    const Rule& rule = *layer.rule;
    if (!rule.adapt) return coefficients<DoubleDouble>(0, 0, rule);
    if (is_short(layer)) {
        return coefficients<double>(rounded(norms.w()), rounded(norms.dcdw()), rule);
    }
    const double exponent = norms.sum_exponent;
    return coefficients(norms.w(), norms.dcdw(), rule,
                        std::isnan(exponent) ? 0 : static_cast<int>(exponent));
}

// What the step of a layer is made of, all without the scale of the loss. `unclipped` is the ratio
// that trust_clip limits to 1.
struct Measured {
    double w_norm, g_norm, ratio, unclipped;
};

template <class Number>
inline Measured measured(Number w, Number dcdw, const Rule& rule) {
    return {rounded(w), rounded(dcdw / Number(rule.grad_scale)),
            rounded(trust_ratio(w, dcdw, rule)), rounded(trust_ratio(w, dcdw, rule, false))};
}

inline Measured measured(const Layer& layer, const Norms& norms) {
    if (is_short(layer)) return measured(rounded(norms.w()), rounded(norms.dcdw()), *layer.rule);
    return measured(norms.w(), norms.dcdw(), *layer.rule);
}

// The largest number of a format.
inline double limit(Format format) {
    return format == float16    ? 65504.0
           : format == bfloat16 ? 3.3895313892515355e38
           : format == float32  ? static_cast<double>(std::numeric_limits<float>::max())
                                : std::numeric_limits<double>::max();
}

// Whether these norms prove that all results of a layer are finite. No element is larger than the
// norm, so the step is at most as long as it would be for one that has all of it.
template <class Number>
inline bool prove_finite(const Layer& layer, Number w, Number dcdw, double velocity_most) {
    const Rule& rule = *layer.rule;
    Number gradient = dcdw / Number(rule.grad_scale);
    if (!rule.is_joint()) gradient = gradient + Number(rule.decay_lambda) * w;
    const Number rate =
        Number(rule.lr_before_momentum) * trust_ratio(w, dcdw, rule) * Number(1 - rule.dampening);
    const double step = rounded(rate * gradient), slack = 1.001;
    // Beyond the range of double it makes infinite or NaN what in exact numbers is neither.
    if (!(rounded(rate * Number(rule.decay_lambda)) < limit(float64))) return false;
    double moved_by = step;
    if (layer.velocity) {
        const double velocity = rule.momentum * velocity_most + step;
        if (!(velocity * slack < limit(velocity_format(layer.w_format)))) return false;
        moved_by =
            rule.lr_after_momentum * (rule.nesterov ? step + rule.momentum * velocity : velocity);
    }
    return (rounded(w) + moved_by) * slack < limit(layer.w_format);  // false for NaN
}

inline bool prove_finite(const Layer& layer, const Norms& norms) {
    if (is_short(layer)) {
        const double w = rounded(norms.w()), dcdw = rounded(norms.dcdw());
        return prove_finite(layer, w, dcdw, norms.velocity_most);
    }
    return prove_finite(layer, norms.w(), norms.dcdw(), norms.velocity_most);
}

}  // namespace lars
