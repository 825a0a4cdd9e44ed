// The loops that do not write to a layer: sums of squares, the largest element, the joint gradient.
// loops.hpp includes this file, once for each instruction set.
//
// The elements of an array form rows of 16, and lane i sums the squares of the i-th elements. All
// lanes do the same operations, so they become vector instructions.

// The product of two numbers shorter than double is exact in double, so FMA gives the same bits.
#ifdef LARS_VECTORS
LARS_TARGET LARS_INLINE void add_squares(Doubles x, double* sums) {
    _mm256_storeu_pd(sums, _mm256_fmadd_pd(x.low, x.low, _mm256_loadu_pd(sums)));
    _mm256_storeu_pd(sums + 4, _mm256_fmadd_pd(x.high, x.high, _mm256_loadu_pd(sums + 4)));
}
#else
LARS_INLINE void add_squares(Doubles x, double* sum) { *sum += x * x; }
#endif

// The two ways to add four rows to the lanes. This one adds them row by row.
struct Plain {
    template <class T>
    LARS_TARGET LARS_INLINE static void add_group(const T* rows, LaneSums& sums) {
        for (std::size_t row = 0; row < group; row += lanes) {
            for (std::size_t lane = 0; lane < lanes; lane += width) {
                add_squares(load(rows + row + lane), sums.high + lane);
            }
        }
    }
};

// Results in float64 show the rounding errors of a long sum. So that the error does not grow with
// the number of rows, this adds squares by pairwise summation within the group, and by compensated
// summation to the lanes.
struct Compensated {
    template <class T>
    LARS_TARGET LARS_INLINE static void add_group(const T* rows, LaneSums& sums) {
        static_assert(group == 4 * lanes, "two pairs of rows");
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            const double a = read(rows[lane]), b = read(rows[lanes + lane]);
            const double c = read(rows[2 * lanes + lane]), d = read(rows[3 * lanes + lane]);
            const Pair sum = two_sum(sums.high[lane], (a * a + b * b) + (c * c + d * d));
            sums.high[lane] = sum.high;
            sums.low[lane] += sum.low;
        }
    }
};

// The last elements, which do not fill a group, are padded with zeros.
template <class Sums, class T>
LARS_TARGET LARS_INLINE void add_last(const T* x, std::size_t size, LaneSums& sums) {
    T last[group] = {};
    std::memcpy(last, x, size * sizeof(T));
    Sums::add_group(last, sums);
}

// The sums of squares of w and of dcdw. Both are read in one loop, because memory is faster with
// two streams than with one.
template <class T, class G>
LARS_TARGET void sum_squares(const void* w, const void* dcdw, std::size_t size, LaneSums& w_sums,
                             LaneSums& dcdw_sums) {
    const bool is_double = std::is_same<T, double>::value || std::is_same<G, double>::value;
    typedef typename std::conditional<is_double, Compensated, Plain>::type Sums;
    const T* weights = static_cast<const T*>(w);
    const G* gradients = static_cast<const G*>(dcdw);
    LaneSums of_w = {}, of_dcdw = {};  // local variables stay in registers
    std::size_t i = 0;
    for (; size - i >= group; i += group) {
        Sums::add_group(weights + i, of_w);
        Sums::add_group(gradients + i, of_dcdw);
    }
    if (i < size) {
        add_last<Sums>(weights + i, size - i, of_w);
        add_last<Sums>(gradients + i, size - i, of_dcdw);
    }
    w_sums = of_w;
    dcdw_sums = of_dcdw;
}

// The sum of squares of x * scale * rest: a single factor could overflow.
LARS_TARGET inline void sum_scaled_squares(const double* x, std::size_t size, double scale,
                                           double rest, LaneSums& sums) {
    sums = {};
    for (std::size_t start = 0; start < size; start += group) {
        double scaled[group] = {};
        for (std::size_t i = 0; i < std::min(group, size - start); ++i) {
            scaled[i] = x[start + i] * scale * rest;
        }
        Compensated::add_group(scaled, sums);
    }
}

// The largest magnitude; NaN if there is a NaN.
template <class T>
LARS_TARGET double largest(const void* data, std::size_t size) {
    const T* x = static_cast<const T*>(data);
    double most = 0;
    for (std::size_t i = 0; i < size; ++i) {
        double value = std::fabs(static_cast<double>(read(x[i])));
        most = value > most || value != value ? value : most;  // a NaN stays
    }
    return most;
}

// sign * dcdw + (high + low) * w, where each element is rounded once, even if the terms cancel.
template <class T, class G>
LARS_TARGET void add_decay(const T* w, const G* dcdw, double* joint, std::size_t size, double high,
                           double low, double sign) {
    LARS_INDEPENDENT
    for (std::size_t i = 0; i < size; ++i) {
        const double weight = read(w[i]);
        const Pair product = two_product(high, weight);
        const Pair sum = two_sum(sign * read(dcdw[i]), product.high);
        const double exact = sum.high + (sum.low + (product.low + low * weight));
        joint[i] = std::isfinite(exact) ? exact : sum.high;
    }
}

template <class T, class G>
LARS_TARGET void add_decay(const void* w, const void* dcdw, double* joint, std::size_t size,
                           const JointGradient& terms) {
    const T* weights = static_cast<const T*>(w);
    const G* gradients = static_cast<const G*>(dcdw);
    const double sign = terms.maximize ? -1 : 1;
    if (!terms.w_shift && !terms.dcdw_shift) {
        add_decay(weights, gradients, joint, size, terms.high, terms.low, sign);
        return;
    }
    double scaled_w[block], scaled_dcdw[block];
    for (std::size_t start = 0; start < size; start += block) {
        const std::size_t length = std::min(block, size - start);
        for (std::size_t i = 0; i < length; ++i) {
            const double weight = read(weights[start + i]), gradient = read(gradients[start + i]);
            scaled_w[i] = std::ldexp(weight, terms.w_shift);
            scaled_dcdw[i] = std::ldexp(gradient, terms.dcdw_shift);
        }
        add_decay(scaled_w, scaled_dcdw, joint + start, length, terms.high, terms.low, sign);
    }
}
