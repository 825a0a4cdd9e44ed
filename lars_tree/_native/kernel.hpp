// One LARS step of many layers in CPU memory. No Python here: module.cpp binds it.
//
// For weights w and gradient g = dcdw / grad_scale,
//
//     ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)
//     w_new = w - lr * ratio * (g + decay_lambda * w)
//
// which is linear in w and dcdw, with two coefficients that are made of norms. So a layer is read
// twice: once to sum the squares of w and dcdw, once to apply the coefficients. With momentum the
// velocity takes in the step in that second pass, and moves the weights.
//
// The numbers. Elements are read as double, exactly, and rounded once when they are written. Squares
// are added in a fixed order: 16 lanes; within a chunk the rows of 16 by pairs of neighbours, then
// pairs of pairs, as if zeros followed up to the next power of two; then the lanes, likewise, and the
// chunks, one after the other, in about twice the precision. Nothing in this order depends on threads,
// on the instruction set or on alignment, and lars_tree/_backends/cpu.py adds in the same one: it
// gives the same bits. Where squares of float64 numbers leave the range of double, the sum is made
// again of numbers that are scaled by a power of two; coefficients are Wide (wide.hpp).
//
// The threads. A layer that fits into the cache of a core is stepped whole by one thread. Of a larger
// one all threads take chunks, first to sum, forwards, then to apply, backwards: what was read last
// is still in a cache. The threads live as long as the call, so nothing is left for a fork to break.
//
// tests/test_native.py holds this file to cpu.py, tests/test_numbers.py both to an exact reference.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "formats.hpp"
#include "wide.hpp"

namespace lars {

struct Rule {
    double lr, decay_lambda, trust_coefficient, eps, grad_scale;
    bool adapt, trust_clip;
    double momentum, rate;
    bool nesterov, maximize;
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

const int lanes = 16;
const std::size_t block = 128;  // elements that are stepped at a time, where that matters

// The step is on_dcdw * dcdw + on_w * w, the last only where it `decays`. dcdw is to be multiplied by
// 2^exponent first, where on_dcdw alone would be far from 1.
struct Coefficients {
    double on_w, on_dcdw;
    int exponent;
    bool decays;

    double kept() const { return decays ? 1 - on_w : 1; }  // what is left of w
};

// How a velocity moves the weights.
struct Motion {
    double momentum, rate;
    bool nesterov;
};

struct Moved {
    double w, velocity;
};

// The same statements as in `along` and `move` in lars_tree/_rule.py.
inline Moved moved(double w, double dcdw, double velocity, const Coefficients& by,
                   const Motion& motion) {
    double step = by.on_dcdw * dcdw;
    if (by.decays) step += by.on_w * w;
    velocity = motion.momentum * velocity + step;
    const double moved_by = motion.nesterov ? step + motion.momentum * velocity : velocity;
    return {w - motion.rate * moved_by, velocity};
}

// Sums in about twice the precision of double: `low` gathers what rounding takes from `high`.
inline Pair add(Pair a, Pair b) {
    Pair sum = two_sum(a.high, b.high);
    return {sum.high, sum.low + (a.low + b.low)};
}

// The sum of all lanes, by pairs of neighbours.
inline Pair sum_of_lanes(const double* sums) {
    double high[lanes], low[lanes] = {};
    std::memcpy(high, sums, sizeof high);
    for (int left = lanes / 2; left; left /= 2) {
        for (int i = 0; i < left; ++i) {
            Pair sum = add({high[2 * i], low[2 * i]}, {high[2 * i + 1], low[2 * i + 1]});
            high[i] = sum.high;
            low[i] = sum.low;
        }
    }
    return {high[0], low[0]};
}

// ---- The rule: the same statements as in lars_tree/_rule.py. Number is Wide, or double where that
// is enough (see `double_is_enough`).

template <class Number>
inline Number trust_ratio(Number w_norm, Number dcdw_norm, const Rule& rule) {
    const Number one = 1;
    if (!rule.adapt) return one;
    Number denominator = dcdw_norm / Number(rule.grad_scale) +
                         Number(rule.decay_lambda) * w_norm + Number(rule.eps);
    bool undefined = is_zero(w_norm) || is_zero(denominator);
    Number ratio = Number(rule.trust_coefficient) * w_norm / (undefined ? one : denominator);
    if (rule.trust_clip && ratio > one) ratio = one;
    return undefined ? one : ratio;
}

template <class Number>
inline Coefficients coefficients(Number w_norm, Number dcdw_norm, const Rule& rule) {
    Number rate = Number(rule.lr) * trust_ratio(w_norm, dcdw_norm, rule);
    Split on_dcdw = split(rate / Number(rule.grad_scale));
    const double on_w = rounded(rate * Number(rule.decay_lambda));
    const double factor = rule.maximize ? -on_dcdw.factor : on_dcdw.factor;
    return {on_w, factor, on_dcdw.exponent, rule.decay_lambda != 0};
}

inline bool is_moderate(double x) {
    return x == 0 || (x > power_of_two(-100) && x < power_of_two(100));
}

// Whether norms of numbers that are shorter than double make no coefficient that leaves its range.
inline bool double_is_enough(const Rule& rule) {
    return is_moderate(rule.lr) && is_moderate(rule.decay_lambda) && is_moderate(rule.eps) &&
           is_moderate(rule.trust_coefficient) && is_moderate(rule.grad_scale);
}

// ---- The loops, for each instruction set

struct Loops {
    typedef Pair (*Sum)(const void* x, std::size_t size, double scale, double rest);
    typedef double (*Largest)(const void* x, std::size_t size);
    typedef void (*Apply)(const void* w, const void* dcdw, void* out, std::size_t size,
                          const Coefficients& by);
    typedef void (*Move)(const void* w, const void* dcdw, void* velocity, void* out,
                         std::size_t size, const Coefficients& by, const Motion& motion);

    Sum sum_of_squares[formats], sum_of_scaled_squares[formats];
    Largest largest[formats];
    Apply apply[formats][formats];  // by the formats of w and dcdw
    Move move[formats][formats];
};

#if defined(_MSC_VER)
#define LARS_INDEPENDENT __pragma(loop(ivdep))
#elif defined(__clang__)
#define LARS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define LARS_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace plain {
#define LARS_TARGET
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace plain

#if defined(__GNUC__) && defined(__x86_64__)
#define LARS_X86
namespace avx2 {
#define LARS_TARGET __attribute__((target("avx2")))
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace avx2

namespace avx512 {
#define LARS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#include "loops.hpp"
#undef LARS_TARGET
}  // namespace avx512
#endif

enum InstructionSet { no_set, avx2_set, avx512_set };

// The best that this processor has.
inline InstructionSet best_set() {
#ifdef LARS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return avx512_set;
    if (__builtin_cpu_supports("avx2")) return avx2_set;
#endif
    return no_set;
}

inline const Loops& loops_for(InstructionSet set) {
#ifdef LARS_X86
    static const Loops of_avx512 = avx512::loops(), of_avx2 = avx2::loops();
    if (set == avx512_set) return of_avx512;
    if (set == avx2_set) return of_avx2;
#endif
    static const Loops of_plain = plain::loops();
    return of_plain;
}

// ---- Norms

const std::size_t smallest_chunk = 1 << 14, most_chunks = 1 << 14;

// How many elements make a chunk: more in the largest arrays, so that the sums take no more memory.
inline std::size_t chunk_size(std::size_t size) {
    std::size_t chunk = smallest_chunk;
    while (size / chunk > most_chunks) chunk *= 2;
    return chunk;
}

inline std::size_t chunks(std::size_t size) {
    std::size_t chunk = chunk_size(size);
    return (size + chunk - 1) / chunk;
}

// One of the arrays that a norm is taken of, by chunks.
struct Vector {
    const char* data;
    std::size_t size;
    Format format;

    static std::size_t item_size(Format format) {
        return format == float64 ? 8 : format == float32 ? 4 : 2;
    }

    const char* at(std::size_t i) const { return data + i * item_size(format); }

    Pair sum(const Loops::Sum* sums, std::size_t i, double scale = 1, double rest = 1) const {
        std::size_t chunk = chunk_size(size), start = i * chunk;
        return sums[format](at(start), std::min(chunk, size - start), scale, rest);
    }
};

inline Pair sum(const Vector& x, const Pair* sums) {
    Pair total = {0, 0};
    for (std::size_t i = 0; i < chunks(x.size); ++i) total = add(total, sums[i]);
    // Where the sum is infinite or NaN, the rounding errors are NaN.
    return std::isfinite(total.high) ? fast_two_sum(total.high, total.low) : Pair{total.high, 0};
}

// The norm, given the sum of squares of each chunk.
inline Wide norm(const Loops& loops, const Vector& x, const Pair* sums) {
    Pair total = sum(x, sums);
    // Only squares of float64 numbers overflow, or vanish where they would count.
    if (x.format != float64 ||
        (total.high > power_of_two(-900) && total.high < power_of_two(1000))) {
        return sqrt(Wide(total));
    }
    double largest = loops.largest[x.format](x.data, x.size);
    if (largest == 0 || !std::isfinite(largest)) return largest;
    int exponent;
    std::frexp(largest, &exponent);
    double scale = std::ldexp(1, -exponent / 2), rest = std::ldexp(1, -exponent + exponent / 2);
    total = {0, 0};
    for (std::size_t i = 0; i < chunks(x.size); ++i) {
        total = add(total, x.sum(loops.sum_of_scaled_squares, i, scale, rest));
    }
    Wide root = sqrt(Wide(fast_two_sum(total.high, total.low)));
    root.exponent += exponent;
    return root;
}

// ---- Layers, and the threads that step them

// Floating point as the C++ standard has it, whatever a library set for its own ends: rounding to
// nearest, and no flushing of subnormal numbers to zero.
class DefaultFloats {
public:
    DefaultFloats() {
        std::fegetenv(&before);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloats() { std::fesetenv(&before); }
    DefaultFloats(const DefaultFloats&) = delete;
    DefaultFloats& operator=(const DefaultFloats&) = delete;

private:
    std::fenv_t before;
};

// Layers up to this many elements are stepped whole: their arrays fit into the cache of a core.
const std::size_t whole = 1 << 17;

// The next chunk of those that a thread starts with; the others take from them when theirs are done.
struct Counter {
    std::atomic<std::size_t> next{0};
    char padding[56];  // no two counters in one line of the cache
};

// How far the threads are with a larger layer.
struct Progress {
    std::unique_ptr<Counter[]> to_sum, to_apply;  // one for each thread
    std::atomic<std::size_t> summed{0};
    std::atomic<bool> ready{false};
    Coefficients by;
};

class Step {
public:
    Step(const Layer* layers, std::size_t count, std::size_t most_threads, InstructionSet set)
        : layers(layers), loops(loops_for(set)) {
        std::size_t longest = 0;
        for (std::size_t i = 0; i < count; ++i) {
            elements += layers[i].size;
            bool is_large = layers[i].size > whole;
            (is_large ? large : small).push_back(i);
            if (is_large) longest = std::max(longest, chunks(layers[i].size));
        }
        // More threads than this would take longer to start than they save.
        threads = std::min(most_threads, 1 + elements / (2 * whole));
        progress.reset(new Progress[large.size()]);
        for (std::size_t i = 0; i < large.size(); ++i) {
            progress[i].to_sum.reset(new Counter[threads]);
            progress[i].to_apply.reset(new Counter[threads]);
        }
        w_sums.resize(longest);
        dcdw_sums.resize(longest);
    }

    // What each thread does until no work is left.
    void work(std::size_t thread) noexcept {
        DefaultFloats guard;
        for (std::size_t i = 0; i < large.size(); ++i) {
            share(layers[large[i]], progress[i], thread);
        }
        const std::size_t batch = 8;
        for (std::size_t start; (start = next_small.fetch_add(batch)) < small.size();) {
            const std::size_t end = std::min(start + batch, small.size());
            for (std::size_t i = start; i < end; ++i) {
                if (i + 2 < small.size()) prefetch(layers[small[i + 2]]);
                alone(layers[small[i]]);
            }
        }
    }

    std::size_t threads;

private:
    // Has the start of a layer fetched, to be read a little later: in a tree of many small layers
    // each is elsewhere in memory.
    static void prefetch(const Layer& layer) {
#if defined(__GNUC__)
        const std::size_t bytes = std::min<std::size_t>(
            1024, layer.size * Vector::item_size(layer.w_format));
        for (std::size_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch(static_cast<const char*>(layer.w) + i);
            __builtin_prefetch(static_cast<const char*>(layer.dcdw) + i);
            if (layer.velocity) __builtin_prefetch(static_cast<char*>(layer.velocity) + i);
        }
#else
        (void)layer;
#endif
    }

    static Vector weights(const Layer& layer) {
        return {static_cast<const char*>(layer.w), layer.size, layer.w_format};
    }

    static Vector gradients(const Layer& layer) {
        return {static_cast<const char*>(layer.dcdw), layer.size, layer.dcdw_format};
    }

    // The coefficients of a layer, given the sums of squares of each chunk of w and dcdw.
    Coefficients coefficients_of(const Layer& layer, const Pair* w_sums,
                                 const Pair* dcdw_sums) const {
        const Rule& rule = *layer.rule;
        const Vector w = weights(layer), dcdw = gradients(layer);
        if (!rule.adapt) return coefficients<Wide>(0, 0, rule);
        if (w.format != float64 && dcdw.format != float64 && double_is_enough(rule)) {
            return coefficients<double>(std::sqrt(sum(w, w_sums).high),
                                        std::sqrt(sum(dcdw, dcdw_sums).high), rule);
        }
        return coefficients<Wide>(norm(loops, w, w_sums), norm(loops, dcdw, dcdw_sums), rule);
    }

    void alone(const Layer& layer) const {
        Pair w_sums[whole / smallest_chunk], dcdw_sums[whole / smallest_chunk];
        for (std::size_t i = 0; layer.rule->adapt && i < chunks(layer.size); ++i) {
            sum_squares(layer, i, w_sums, dcdw_sums);
        }
        apply(layer, coefficients_of(layer, w_sums, dcdw_sums), 0, layer.size);
    }

    void sum_squares(const Layer& layer, std::size_t i, Pair* w_sums, Pair* dcdw_sums) const {
        w_sums[i] = weights(layer).sum(loops.sum_of_squares, i);
        dcdw_sums[i] = gradients(layer).sum(loops.sum_of_squares, i);
    }

    void share(const Layer& layer, Progress& now, std::size_t thread) {
        const std::size_t count = chunks(layer.size), chunk = chunk_size(layer.size);
        Coefficients by;
        if (!layer.rule->adapt) {
            by = coefficients_of(layer, nullptr, nullptr);
        } else {
            const auto sum_chunk = [&](std::size_t start, std::size_t, std::size_t i) {
                sum_squares(layer, start + i, w_sums.data(), dcdw_sums.data());
                if (now.summed.fetch_add(1) + 1 < count) return;
                now.by = coefficients_of(layer, w_sums.data(), dcdw_sums.data());
                now.ready.store(true, std::memory_order_release);
            };
            for_chunks(now.to_sum.get(), count, thread, sum_chunk);
            while (!now.ready.load(std::memory_order_acquire)) std::this_thread::yield();
            by = now.by;
        }
        const auto apply_chunk = [&](std::size_t start, std::size_t length, std::size_t i) {
            const std::size_t first = (start + length - 1 - i) * chunk;
            apply(layer, by, first, std::min(chunk, layer.size - first));
        };
        for_chunks(now.to_apply.get(), count, thread, apply_chunk);
    }

    template <class Do>
    void for_chunks(Counter* counters, std::size_t count, std::size_t thread, Do action) const {
        for (std::size_t k = 0; k < threads; ++k) {
            const std::size_t owner = (thread + k) % threads;
            const std::size_t start = owner * count / threads;
            const std::size_t length = (owner + 1) * count / threads - start;
            for (std::size_t i; (i = counters[owner].next.fetch_add(1)) < length;) {
                action(start, length, i);
            }
        }
    }

    void apply(const Layer& layer, const Coefficients& by, std::size_t start,
               std::size_t size) const {
        const char *w = weights(layer).at(start), *dcdw = gradients(layer).at(start);
        const Format format = layer.w_format;
        char* out = static_cast<char*>(layer.out) + start * Vector::item_size(format);
        if (!layer.velocity) {
            loops.apply[format][layer.dcdw_format](w, dcdw, out, size, by);
            return;
        }
        const Rule& rule = *layer.rule;
        char* velocity = static_cast<char*>(layer.velocity) +
                         start * Vector::item_size(velocity_format(format));
        loops.move[format][layer.dcdw_format](w, dcdw, velocity, out, size, by,
                                              {rule.momentum, rule.rate, rule.nesterov});
    }

    const Layer* layers;
    const Loops& loops;
    std::vector<std::size_t> large, small;
    std::size_t elements = 0;
    std::unique_ptr<Progress[]> progress;
    std::vector<Pair> w_sums, dcdw_sums;
    std::atomic<std::size_t> next_small{0};
};

// Steps all layers. Throws std::bad_alloc before anything is written, or nothing.
inline void step(const Layer* layers, std::size_t count, std::size_t threads,
                 InstructionSet set) {
    Step all(layers, count, threads, set);
    std::vector<std::thread> others;
    others.reserve(all.threads);
    try {
        for (std::size_t i = 1; i < all.threads; ++i) {
            others.emplace_back([&all, i] { all.work(i); });
        }
    } catch (const std::exception&) {
        // The system gives no more threads, or memory for them: those that there are do the work.
    }
    all.work(0);
    for (std::thread& other : others) other.join();
}

}  // namespace lars
