// The rule for one layer: the coefficients of the step, given the norms, and a bound on the
// results.
//
// The statements mirror _numerics/formula.py, which explains them. They run between the two passes
// over memory (see kernel.hpp). Number is DoubleDouble, or double if no intermediate result can
// leave the range of double (see `computes_in_double`).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "double_double.hpp"
#include "formats.hpp"

namespace lars {

struct MomentumOptions {
    double momentum, lr_after_momentum;
    bool nesterov;
};

struct Rule {
    double lr_before_momentum, decay_lambda, trust_coefficient, eps, grad_scale;
    bool adapt, trust_clip;
    double momentum, lr_after_momentum;
    bool nesterov, maximize;
    bool joint_norm;
    double dampening;
    bool must_be_finite;  // whether infinite and NaN results are reported

    MomentumOptions momentum_options() const { return {momentum, lr_after_momentum, nesterov}; }

    // Whether the denominator uses the norm of the joint gradient.
    bool is_joint() const { return joint_norm && adapt && decay_lambda != 0; }
};

// Dense arrays of the same size, in the same memory order. `out` may be w or dcdw. A complex
// element counts as two real elements. The velocity, if not null, has the format
// `velocity_format(w_format)`.
struct Layer {
    const void* w;
    const void* dcdw;
    void* out;
    void* velocity;
    std::size_t size;
    Format w_format, dcdw_format;
    const Rule* rule;
};

// The step is u = gradient * (2^exponent * dcdw) + decay * w; the second term is omitted if
// `decays` is false. The exponent is 0 unless the gradient coefficient would be far from 1.
struct Coefficients {
    double decay, gradient;
    int exponent;
    bool decays;
    bool uses_joint_gradient;  // instead of dcdw, see JointGradient

    double weight_factor() const { return decays ? 1 - decay : 1; }  // w - u = factor * w - ...
};

// The trust ratio of the formula. With trust_clip it is divided by the learning rate and, if `clip`
// is true, limited to 1.
template <class Number>
inline Number trust_ratio(Number w_norm, Number dcdw_norm, const Rule& rule, bool clip = true) {
    const Number one = 1;
    if (!rule.adapt) return one;
    if (is_zero(w_norm) || is_zero(dcdw_norm)) return one;
    Number denominator = dcdw_norm / Number(rule.grad_scale);
    if (!rule.joint_norm) denominator = denominator + Number(rule.decay_lambda) * w_norm;
    denominator = denominator + Number(rule.eps);
    Number ratio = Number(rule.trust_coefficient) * w_norm / denominator;
    if (!rule.trust_clip) return ratio;
    const Number rate = Number(rule.lr_before_momentum) * Number(rule.lr_after_momentum);
    if (clip && ratio > rate) return one;
    return ratio / (is_zero(rate) ? one : rate);
}

// x, or the positive quiet NaN. The sign of another NaN would depend on the order of operands,
// which compilers choose anew for each inlined copy of a function, and so on the thread that
// computes it.
inline double with_positive_nan(double x) {
    return std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : x;
}

// `joint_exponent`: the exponent of the scale of the joint gradient.
template <class Number>
inline Coefficients coefficients_for(Number w_norm, Number dcdw_norm, const Rule& rule,
                                     int joint_exponent = 0) {
    Number rate = Number(rule.lr_before_momentum) * trust_ratio(w_norm, dcdw_norm, rule) *
                  Number(1 - rule.dampening);
    const double decay = to_double(rate * Number(rule.decay_lambda));
    const Number gradient = rate / Number(rule.grad_scale);
    // g and decay_lambda * w may cancel, and a long step would magnify the rounding error of their
    // sum. So this step is computed from the joint gradient, whose elements are rounded once.
    if (rule.is_joint() && decay > 1) {
        const Split joint = split(scaled(gradient, joint_exponent));
        return {0, with_positive_nan(joint.factor), joint.exponent, false, true};
    }
    const Split parts = split(gradient);
    const double factor = rule.maximize ? -parts.factor : parts.factor;
    return {with_positive_nan(decay), with_positive_nan(factor), parts.exponent,
            rule.decay_lambda != 0, false};
}

inline bool is_moderate(double x) {
    return x == 0 || (x > power_of_two(-100) && x < power_of_two(100));
}

// Whether the options are moderate: if neither w nor dcdw is float64, no intermediate result can
// then leave the range of double.
inline bool has_moderate_options(const Rule& rule) {
    return is_moderate(rule.lr_before_momentum) && is_moderate(rule.decay_lambda) &&
           is_moderate(rule.eps) && is_moderate(rule.trust_coefficient) &&
           is_moderate(rule.grad_scale) &&
           (!rule.trust_clip || is_moderate(rule.lr_after_momentum));
}

// ---- Between the two passes

// The result of the first pass over a layer. The norms of w and dcdw are stored as the fields of
// double-double numbers. If rule.is_joint(), the fields of dcdw are the norm of the joint gradient,
// and `joint_exponent` is the exponent of its scale (NaN if it is not scaled). `velocity_max` is
// the largest magnitude of the velocity, or 0 if it was not requested.
struct Norms {
    double w_high, w_low, w_exponent;
    double dcdw_high, dcdw_low, dcdw_exponent;
    double joint_exponent, velocity_max;

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

// Whether coefficients are computed in double; otherwise they are double-double numbers.
inline bool computes_in_double(const Layer& layer) {
    return layer.w_format != float64 && layer.dcdw_format != float64 &&
           has_moderate_options(*layer.rule);
}

inline Coefficients coefficients_for(const Layer& layer, const Norms& norms) {
    const Rule& rule = *layer.rule;
    if (!rule.adapt) return coefficients_for<DoubleDouble>(0, 0, rule);
    if (computes_in_double(layer)) {
        return coefficients_for<double>(to_double(norms.w()), to_double(norms.dcdw()), rule);
    }
    const double exponent = norms.joint_exponent;
    return coefficients_for(norms.w(), norms.dcdw(), rule,
                            std::isnan(exponent) ? 0 : static_cast<int>(exponent));
}

// The norms and ratios of a layer, with the loss scale divided out. `unclipped` is the ratio before
// trust_clip limits it to 1.
struct Measured {
    double w_norm, g_norm, ratio, unclipped;
};

template <class Number>
inline Measured measured(Number w, Number dcdw, const Rule& rule) {
    return {to_double(w), to_double(dcdw / Number(rule.grad_scale)),
            to_double(trust_ratio(w, dcdw, rule)), to_double(trust_ratio(w, dcdw, rule, false))};
}

inline Measured measured(const Layer& layer, const Norms& norms) {
    if (computes_in_double(layer)) {
        return measured(to_double(norms.w()), to_double(norms.dcdw()), *layer.rule);
    }
    return measured(norms.w(), norms.dcdw(), *layer.rule);
}

// The largest number of a format.
inline double max_value(Format format) {
    return format == float16    ? 65504.0
           : format == bfloat16 ? 3.3895313892515355e38
           : format == float32  ? static_cast<double>(std::numeric_limits<float>::max())
                                : std::numeric_limits<double>::max();
}

// Whether these norms prove that all results of a layer are finite. No element exceeds the norm, so
// no result exceeds the result for an element that equals the norm. The velocity is bounded by
// `velocity_max`, its largest magnitude.
template <class Number>
inline bool prove_finite(const Layer& layer, Number w, Number dcdw, double velocity_max) {
    const Rule& rule = *layer.rule;
    Number gradient = dcdw / Number(rule.grad_scale);
    if (!rule.is_joint()) gradient = gradient + Number(rule.decay_lambda) * w;
    const Number rate =
        Number(rule.lr_before_momentum) * trust_ratio(w, dcdw, rule) * Number(1 - rule.dampening);
    const double u = to_double(rate * gradient), slack = 1.001;  // slack covers rounding errors
    // An infinite decay coefficient gives infinity or NaN although the exact result is finite.
    if (!(to_double(rate * Number(rule.decay_lambda)) < max_value(float64))) return false;
    double moved_by = u;
    if (layer.velocity) {
        const double velocity = rule.momentum * velocity_max + u;
        if (!(velocity * slack < max_value(velocity_format(layer.w_format)))) return false;
        moved_by =
            rule.lr_after_momentum * (rule.nesterov ? u + rule.momentum * velocity : velocity);
    }
    return (to_double(w) + moved_by) * slack < max_value(layer.w_format);  // false for NaN
}

inline bool prove_finite(const Layer& layer, const Norms& norms) {
    if (computes_in_double(layer)) {
        const double w = to_double(norms.w()), dcdw = to_double(norms.dcdw());
        return prove_finite(layer, w, dcdw, norms.velocity_max);
    }
    return prove_finite(layer, norms.w(), norms.dcdw(), norms.velocity_max);
}

}  // namespace lars
