// The loops that read: sums of squares, the largest element, the sum of a gradient and decay.
//
// loops.hpp includes this file, once for each instruction set.

template <class T, bool Scaled>
LARS_TARGET inline double value(T x, double scale, double rest) {
    return Scaled ? read(x) * scale * rest : read(x);
}

template <class T, bool Scaled>
LARS_TARGET inline void square(const T* row, double scale, double rest, double* squares) {
    for (int lane = 0; lane < lanes; ++lane) {
        const double x = value<T, Scaled>(row[lane], scale, rest);
        squares[lane] = x * x;
    }
}

// Of some arrays, the sums of subtrees of rows that still lack a neighbour, from large to small:
// one for each bit of the number of rows so far.
typedef double Subtrees[64][most_streams][lanes];

LARS_TARGET inline void merge(Subtrees& sums, int& depth, int count) {
    --depth;
    for (int k = 0; k < count; ++k) add_to(sums[depth - 1][k], sums[depth][k]);
}

// Adds the last subtree to its neighbour, if that is there, and so on: as in counting on by one.
LARS_TARGET inline void carry(Subtrees& sums, int& depth, int count, std::size_t subtrees_before) {
    for (; subtrees_before & 1; subtrees_before >>= 1) merge(sums, depth, count);
}

// Squares of 2^Level rows, added by pairs of neighbours. All at once, in registers: compilers make
// poor code of a loop that merges them.
template <class T, bool Scaled, int Level>
struct Rows {
    LARS_TARGET static inline void sum(const T* rows, double scale, double rest, double* total) {
        double other[lanes];
        Rows<T, Scaled, Level - 1>::sum(rows, scale, rest, total);
        Rows<T, Scaled, Level - 1>::sum(rows + (lanes << (Level - 1)), scale, rest, other);
        add_to(total, other);
    }
};

template <class T, bool Scaled>
struct Rows<T, Scaled, 1> {
    LARS_TARGET static inline void sum(const T* rows, double scale, double rest, double* total) {
        for (int lane = 0; lane < lanes; ++lane) {
            const double a = value<T, Scaled>(rows[lane], scale, rest);
            const double b = value<T, Scaled>(rows[lanes + lane], scale, rest);
            total[lane] = a * a + b * b;
        }
    }
};

// The squares of some arrays of the same size, summed up for each lane. They are read by turns, as
// memory serves several streams at once faster than one after the other.
template <class T, bool Scaled>
LARS_TARGET void sum_squares(const void* const* arrays, int count, std::size_t size, double scale,
                             double rest, double (*totals)[lanes]) {
    Subtrees sums;
    int depth = 0;
    std::size_t rows = 0, i = 0;
    const int level = 3, many = 1 << level;
    for (; size - i >= many * lanes; i += many * lanes) {
        for (int k = 0; k < count; ++k) {
            const T* x = static_cast<const T*>(arrays[k]) + i;
            Rows<T, Scaled, level>::sum(x, scale, rest, sums[depth][k]);
        }
        ++depth;
        carry(sums, depth, count, rows / many);
        rows += many;
    }
    for (; i < size; i += lanes) {
        for (int k = 0; k < count; ++k) {
            const T* row = static_cast<const T*>(arrays[k]) + i;
            T last[lanes] = {};  // as if zeros followed
            if (size - i < lanes) {
                std::memcpy(last, row, (size - i) * sizeof(T));
                row = last;
            }
            square<T, Scaled>(row, scale, rest, sums[depth][k]);
        }
        ++depth;
        carry(sums, depth, count, rows);
        rows += 1;
    }
    while (depth > 1) merge(sums, depth, count);
    for (int k = 0; k < count; ++k) std::memcpy(totals[k], sums[0][k], sizeof totals[k]);
}

template <class T>
LARS_TARGET double largest(const void* data, std::size_t size) {
    const T* x = static_cast<const T*>(data);
    double most = 0;
    for (std::size_t i = 0; i < size; ++i) {
        double value = std::fabs(static_cast<double>(read(x[i])));
        most = value > most || value != value ? value : most;  // NaN stays: nothing is above it
    }
    return most;
}

// dcdw + decay * w as if each element was rounded once, also where the two cancel.
template <class T, class G>
LARS_TARGET void join(const T* w, const G* dcdw, double* total, std::size_t size, double high,
                      double low, double sign) {
    LARS_INDEPENDENT
    for (std::size_t i = 0; i < size; ++i) {
        const double weight = read(w[i]);
        const Pair product = two_product(high, weight);
        const Pair sum = two_sum(sign * read(dcdw[i]), product.high);
        const double exact = sum.high + (sum.low + (product.low + low * weight));
        total[i] = std::isfinite(exact) ? exact : sum.high;
    }
}

template <class T, class G>
LARS_TARGET void join(const void* w, const void* dcdw, double* total, std::size_t size,
                      const Addition& by) {
    const T* weights = static_cast<const T*>(w);
    const G* gradients = static_cast<const G*>(dcdw);
    const double sign = by.maximize ? -1 : 1;
    if (!by.w_shift && !by.dcdw_shift) {
        join(weights, gradients, total, size, by.high, by.low, sign);
        return;
    }
    double scaled_w[block], scaled_dcdw[block];
    for (std::size_t start = 0; start < size; start += block) {
        const std::size_t length = std::min(block, size - start);
        for (std::size_t i = 0; i < length; ++i) {
            const double weight = read(weights[start + i]), gradient = read(gradients[start + i]);
            scaled_w[i] = std::ldexp(weight, by.w_shift);
            scaled_dcdw[i] = std::ldexp(gradient, by.dcdw_shift);
        }
        join(scaled_w, scaled_dcdw, total + start, length, by.high, by.low, sign);
    }
}
