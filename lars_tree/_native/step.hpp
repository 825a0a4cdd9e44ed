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
#include <mutex>
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

// How a layer is stepped; the addition matters with joint_norm.
struct Plan {
    Coefficients by;
    Addition addition;
};

// How far the threads are with a larger layer.
struct Progress {
    std::unique_ptr<Counter[]> to_sum, to_apply;  // one for each thread
    std::atomic<std::size_t> summed{0};
    std::atomic<bool> ready{false};
    std::once_flag is_joining;
    Plan plan;
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
            if (layers[i].rule->is_joint()) {
                total_size =
                    std::max(total_size, std::min(layers[i].size, chunk_size(layers[i].size)));
            }
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
        totals.resize(threads * total_size);
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
                alone(layers[small[i]], thread);
            }
        }
    }

    std::size_t threads;

private:
    // Has the start of a layer fetched, to be read a little later: in a tree of many small layers
    // each is elsewhere in memory.
    static void prefetch(const Layer& layer) {
#if defined(__GNUC__)
        const std::size_t bytes =
            std::min<std::size_t>(1024, layer.size * Vector::item_size(layer.w_format));
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
    Coefficients coefficients_of(const Layer& layer, const Pair* w_sums, const Pair* dcdw_sums,
                                 const Addition& addition) const {
        const Rule& rule = *layer.rule;
        const Vector w = weights(layer), dcdw = gradients(layer);
        if (!rule.adapt) return coefficients<Wide>(0, 0, rule);
        if (w.format != float64 && dcdw.format != float64 && double_is_enough(rule)) {
            return coefficients<double>(std::sqrt(sum(w, w_sums).high),
                                        std::sqrt(sum(dcdw, dcdw_sums).high), rule);
        }
        const Wide w_norm = norm(loops, w, w_sums);
        if (!rule.is_joint()) return coefficients(w_norm, norm(loops, dcdw, dcdw_sums), rule);
        const Wide total_norm = scaled(sqrt(Wide(sum(dcdw, dcdw_sums))), addition.exponent);
        return coefficients(w_norm, total_norm, rule, addition.exponent);
    }

    void join(Plan& plan, const Layer& layer) const {
        if (!layer.rule->is_joint()) return;
        plan.addition = addition(loops, weights(layer), gradients(layer), *layer.rule);
    }

    void alone(const Layer& layer, std::size_t thread) {
        Pair w_sums[whole / smallest_chunk], dcdw_sums[whole / smallest_chunk];
        Plan plan = {};
        join(plan, layer);
        for (std::size_t i = 0; layer.rule->adapt && i < chunks(layer.size); ++i) {
            sum_squares(layer, i, w_sums, dcdw_sums, plan, thread);
        }
        plan.by = coefficients_of(layer, w_sums, dcdw_sums, plan.addition);
        apply(layer, plan, 0, layer.size);
    }

    void sum_squares(const Layer& layer, std::size_t i, Pair* w_sums, Pair* dcdw_sums,
                     const Plan& plan, std::size_t thread) {
        const std::size_t chunk = chunk_size(layer.size);
        const Vector w = weights(layer).part(i * chunk, chunk);
        Vector dcdw = gradients(layer).part(i * chunk, chunk);
        if (layer.rule->is_joint()) {
            double* total = totals.data() + thread * total_size;
            loops.join[w.format][dcdw.format](w.data, dcdw.data, total, w.size, plan.addition);
            dcdw = {reinterpret_cast<const char*>(total), w.size, float64};
        }
        sum_both(loops, w, dcdw, w.size == chunk, w_sums[i], dcdw_sums[i]);
    }

    void share(const Layer& layer, Progress& now, std::size_t thread) {
        const std::size_t count = chunks(layer.size), chunk = chunk_size(layer.size);
        Plan plan = {};
        if (!layer.rule->adapt) {
            plan.by = coefficients_of(layer, nullptr, nullptr, plan.addition);
        } else {
            std::call_once(now.is_joining, [&] { join(now.plan, layer); });
            const auto sum_chunk = [&](std::size_t start, std::size_t, std::size_t i) {
                sum_squares(layer, start + i, w_sums.data(), dcdw_sums.data(), now.plan, thread);
                if (now.summed.fetch_add(1) + 1 < count) return;
                now.plan.by =
                    coefficients_of(layer, w_sums.data(), dcdw_sums.data(), now.plan.addition);
                now.ready.store(true, std::memory_order_release);
            };
            for_chunks(now.to_sum.get(), count, thread, sum_chunk);
            while (!now.ready.load(std::memory_order_acquire)) std::this_thread::yield();
            plan = now.plan;
        }
        const auto apply_chunk = [&](std::size_t start, std::size_t length, std::size_t i) {
            const std::size_t first = (start + length - 1 - i) * chunk;
            apply(layer, plan, first, std::min(chunk, layer.size - first));
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

    void apply(const Layer& layer, const Plan& plan, std::size_t start, std::size_t size) const {
        const char *w = weights(layer).at(start), *dcdw = gradients(layer).at(start);
        if (!plan.by.along_total) {
            apply(layer, w, dcdw, layer.dcdw_format, plan.by, start, size);
            return;
        }
        double total[block];
        for (std::size_t i = 0; i < size; i += block) {
            const std::size_t length = std::min(block, size - i);
            w = weights(layer).at(start + i);
            dcdw = gradients(layer).at(start + i);
            loops.join[layer.w_format][layer.dcdw_format](w, dcdw, total, length, plan.addition);
            apply(layer, w, total, float64, plan.by, start + i, length);
        }
    }

    void apply(const Layer& layer, const void* w, const void* dcdw, Format dcdw_format,
               const Coefficients& by, std::size_t start, std::size_t size) const {
        const Format format = layer.w_format;
        char* out = static_cast<char*>(layer.out) + start * Vector::item_size(format);
        if (!layer.velocity) {
            loops.apply[format][dcdw_format](w, dcdw, out, size, by);
            return;
        }
        const Rule& rule = *layer.rule;
        char* velocity =
            static_cast<char*>(layer.velocity) + start * Vector::item_size(velocity_format(format));
        loops.move[format][dcdw_format](w, dcdw, velocity, out, size, by,
                                        {rule.momentum, rule.rate, rule.nesterov});
    }

    const Layer* layers;
    const Loops& loops;
    std::vector<std::size_t> large, small;
    std::size_t elements = 0;
    std::unique_ptr<Progress[]> progress;
    std::vector<Pair> w_sums, dcdw_sums;
    std::vector<double> totals;  // a chunk for each thread
    std::size_t total_size = 0;
    std::atomic<std::size_t> next_small{0};
};

// Steps all layers. Throws std::bad_alloc before anything is written, or nothing.
inline void step(const Layer* layers, std::size_t count, std::size_t threads, InstructionSet set) {
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
