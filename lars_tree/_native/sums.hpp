// The loops that do not write to a layer: sums of squares, the largest element, the joint gradient.
// loops.hpp includes this file, once for each instruction set.
//
// Squares are added by pairwise summation: each half of a sequence is summed recursively, and the
// two sums are added, as in a binary tree. The rounding error grows only with the logarithm of the
// number of summands. The elements of an array form rows of 16, and lane i sums the i-th elements
// of all rows. All lanes do the same operations, so they become vector instructions.
//
// The tree is not stored: the rows are read in order, and a stack holds the sums of the subtrees
// that are complete. A subtree is added to its left neighbour of the same size as soon as it is
// complete.

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

// For each array, the sums of the subtrees that do not have a neighbour yet, from large to small:
// there is one subtree for each bit that is set in the number of rows so far.
typedef double Subtrees[64][max_streams][lanes];

LARS_TARGET inline void merge(Subtrees& sums, int& depth, int count) {
    --depth;
    for (int k = 0; k < count; ++k) add_to(sums[depth - 1][k], sums[depth][k]);
}

// Adds the last subtree to its neighbour, if it has one, then adds their sum to the next neighbour,
// and so on, like the carries when a binary number is incremented.
LARS_TARGET inline void carry(Subtrees& sums, int& depth, int count, std::size_t subtrees_before) {
    for (; subtrees_before & 1; subtrees_before >>= 1) merge(sums, depth, count);
}

// The pairwise sum of the squares of 2^Level rows. The recursion is unrolled and stays in
// registers; a loop that merges rows would be compiled to slow code.
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

// The sum of squares of each lane, for several arrays of the same size. The arrays are read
// alternately, because memory is faster with several streams than with one.
template <class T, bool Scaled>
LARS_TARGET void sum_squares(const void* const* arrays, int count, std::size_t size, double scale,
                             double rest, double (*totals)[lanes]) {
    Subtrees sums;
    int depth = 0;
    std::size_t rows = 0, i = 0;
    const int level = 3, unrolled = 1 << level;
    for (; size - i >= unrolled * lanes; i += unrolled * lanes) {
        for (int k = 0; k < count; ++k) {
            const T* x = static_cast<const T*>(arrays[k]) + i;
            Rows<T, Scaled, level>::sum(x, scale, rest, sums[depth][k]);
        }
        ++depth;
        carry(sums, depth, count, rows / unrolled);
        rows += unrolled;
    }
    for (; i < size; i += lanes) {
        for (int k = 0; k < count; ++k) {
            const T* row = static_cast<const T*>(arrays[k]) + i;
            T last[lanes] = {};  // the last row is padded with zeros
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
