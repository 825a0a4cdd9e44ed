// One LARS step of many layers, shared out among threads.
//
// A layer that fits into the cache of a core is stepped whole by one thread. Of a larger
// one all threads take chunks, first to sum, forwards, then to apply, backwards: what was read last
// is still in a cache. The threads live as long as the call, so nothing is left for a fork to
// break.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "kernel.hpp"

namespace lars {

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

// The next chunk of those that a thread starts with; the others take from them when theirs are
// done.
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
        sum_both(loops, weights(layer), gradients(layer), i, w_sums[i], dcdw_sums[i]);
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
