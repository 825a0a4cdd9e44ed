// One LARS step of many layers, shared out among threads: both passes, or one of them.
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

// What a layer is stepped by; the addition matters with joint_norm.
struct Terms {
    Coefficients by;
    Addition addition;
};

// What is done with each layer: `norms` reads, `apply` writes, given the norms.
enum class Phases { both, norms, apply };

// How far the threads are with a larger layer.
struct Progress {
    std::unique_ptr<Counter[]> to_sum, to_apply;  // one for each thread
    std::atomic<std::size_t> summed{0};
    std::atomic<bool> ready{false};
    std::once_flag is_joining;
    double sum_exponent = 0;
    Terms terms;
};

class Step {
public:
    // `norms` has one item for each layer, which is written to by Phases::norms and read by
    // Phases::apply. With `bounds`, Phases::norms also finds the largest magnitude of each
    // velocity.
    Step(const Layer* layers, std::size_t count, std::size_t most_threads, InstructionSet set,
         Phases phases, Norms* norms, bool bounds)
        : layers(layers), loops(loops_for(set)), phases(phases), norms(norms), bounds(bounds) {
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
        sums.resize(longest);
        totals.resize(threads * total_size);
    }

    // What each thread does until no work is left.
    void work(std::size_t thread) noexcept {
        DefaultFloats guard;
        for (std::size_t i = 0; i < large.size(); ++i) {
            step_in_chunks(large[i], progress[i], thread);
        }
        const std::size_t batch = 8;
        for (std::size_t start; (start = next_small.fetch_add(batch)) < small.size();) {
            const std::size_t end = std::min(start + batch, small.size());
            for (std::size_t i = start; i < end; ++i) {
                if (i + 2 < small.size()) prefetch(layers[small[i + 2]]);
                step_whole(small[i], thread);
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

    // What is summed up of a chunk.
    struct Sums {
        Pair w, dcdw;
        double velocity_most;
    };

    // NaN stays: nothing is above it.
    static double larger(double x, double than) { return x > than || x != x ? x : than; }

    bool needs_norms(const Layer& layer) const {
        return layer.rule->adapt || phases == Phases::norms;
    }

    // Given the sums of each chunk.
    Norms norms_of(const Layer& layer, const Sums* of_chunks, double sum_exponent) const {
        Norms found;
        const Vector w = weights(layer), dcdw = gradients(layer);
        const Pair w_sum = sum(w, of_chunks, &Sums::w);
        const Pair dcdw_sum = sum(dcdw, of_chunks, &Sums::dcdw);
        found.sum_exponent = sum_exponent;
        found.velocity_most = 0;
        for (std::size_t i = 0; i < chunks(layer.size); ++i) {
            found.velocity_most = larger(of_chunks[i].velocity_most, found.velocity_most);
        }
        if (is_short(layer)) {
            found.set(std::sqrt(w_sum.high), std::sqrt(dcdw_sum.high));
        } else if (layer.rule->is_joint()) {
            const int exponent = std::isnan(sum_exponent) ? 0 : static_cast<int>(sum_exponent);
            found.set(norm(loops, w, w_sum), scaled(sqrt(DoubleDouble(dcdw_sum)), exponent));
        } else {
            found.set(norm(loops, w, w_sum), norm(loops, dcdw, dcdw_sum));
        }
        return found;
    }

    Terms terms_of(const Layer& layer, const Norms& known) const {
        Terms terms = {coefficients(layer, known), {}};
        if (layer.rule->is_joint()) terms.addition = addition(*layer.rule, known.sum_exponent);
        return terms;
    }

    // The same as by the norms, which are kept only where the second pass comes later.
    Terms terms_of(const Layer& layer, const Sums* of_chunks, double sum_exponent) const {
        if (!is_short(layer) || layer.rule->is_joint()) {
            return terms_of(layer, norms_of(layer, of_chunks, sum_exponent));
        }
        const double w = std::sqrt(sum(weights(layer), of_chunks, &Sums::w).high);
        const double dcdw = std::sqrt(sum(gradients(layer), of_chunks, &Sums::dcdw).high);
        return {coefficients<double>(w, dcdw, *layer.rule), {}};
    }

    double sum_exponent_of(const Layer& layer) const {
        if (!layer.rule->is_joint()) return std::numeric_limits<double>::quiet_NaN();
        return sum_exponent(loops, weights(layer), gradients(layer), *layer.rule);
    }

    void step_whole(std::size_t index, std::size_t thread) {
        const Layer& layer = layers[index];
        if (phases == Phases::apply || !needs_norms(layer)) {
            apply(layer, terms_of(layer, norms ? norms[index] : Norms{}), 0, layer.size);
            return;
        }
        Sums of_chunks[whole / smallest_chunk];
        const double exponent = sum_exponent_of(layer);
        for (std::size_t i = 0; i < chunks(layer.size); ++i) {
            of_chunks[i] = sum_chunk(layer, i, exponent, thread);
        }
        if (phases == Phases::norms) {
            norms[index] = norms_of(layer, of_chunks, exponent);
        } else {
            apply(layer, terms_of(layer, of_chunks, exponent), 0, layer.size);
        }
    }

    Sums sum_chunk(const Layer& layer, std::size_t i, double exponent, std::size_t thread) {
        Sums found = {};
        const std::size_t chunk = chunk_size(layer.size);
        const Vector w = weights(layer).part(i * chunk, chunk);
        Vector dcdw = gradients(layer).part(i * chunk, chunk);
        if (layer.rule->is_joint()) {
            double* total = totals.data() + thread * total_size;
            loops.join[w.format][dcdw.format](w.data, dcdw.data, total, w.size,
                                              addition(*layer.rule, exponent));
            dcdw = {reinterpret_cast<const char*>(total), w.size, float64};
        }
        sum_both(loops, w, dcdw, w.size == chunk, found.w, found.dcdw);
        if (bounds && layer.velocity) {
            const Format format = velocity_format(layer.w_format);
            const auto* velocity = static_cast<const char*>(layer.velocity);
            const std::size_t start = i * chunk * Vector::item_size(format);
            found.velocity_most = loops.largest[format](velocity + start, w.size);
        }
        return found;
    }

    void step_in_chunks(std::size_t index, Progress& now, std::size_t thread) {
        const Layer& layer = layers[index];
        const std::size_t count = chunks(layer.size), chunk = chunk_size(layer.size);
        Terms terms;
        if (phases == Phases::apply || !needs_norms(layer)) {
            terms = terms_of(layer, norms ? norms[index] : Norms{});
        } else {
            std::call_once(now.is_joining, [&] { now.sum_exponent = sum_exponent_of(layer); });
            const auto sum_one = [&](std::size_t start, std::size_t, std::size_t i) {
                sums[start + i] = sum_chunk(layer, start + i, now.sum_exponent, thread);
                if (now.summed.fetch_add(1) + 1 < count) return;
                if (phases == Phases::norms) {
                    norms[index] = norms_of(layer, sums.data(), now.sum_exponent);
                } else {
                    now.terms = terms_of(layer, sums.data(), now.sum_exponent);
                }
                now.ready.store(true, std::memory_order_release);
            };
            for_chunks(now.to_sum.get(), count, thread, sum_one);
            while (!now.ready.load(std::memory_order_acquire)) std::this_thread::yield();
            terms = now.terms;
        }
        if (phases == Phases::norms) return;
        const auto apply_chunk = [&](std::size_t start, std::size_t length, std::size_t i) {
            const std::size_t first = (start + length - 1 - i) * chunk;
            apply(layer, terms, first, std::min(chunk, layer.size - first));
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

    void apply(const Layer& layer, const Terms& terms, std::size_t start, std::size_t size) const {
        const char *w = weights(layer).at(start), *dcdw = gradients(layer).at(start);
        if (!terms.by.along_total) {
            apply(layer, w, dcdw, layer.dcdw_format, terms.by, start, size);
            return;
        }
        double total[block];
        for (std::size_t i = 0; i < size; i += block) {
            const std::size_t length = std::min(block, size - i);
            w = weights(layer).at(start + i);
            dcdw = gradients(layer).at(start + i);
            loops.join[layer.w_format][layer.dcdw_format](w, dcdw, total, length, terms.addition);
            apply(layer, w, total, float64, terms.by, start + i, length);
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
                                        {rule.momentum, rule.lr_after_momentum, rule.nesterov});
    }

    const Layer* layers;
    const Loops& loops;
    std::vector<std::size_t> large, small;
    const Phases phases;
    Norms* const norms;
    const bool bounds;
    std::size_t elements = 0;
    std::unique_ptr<Progress[]> progress;
    std::vector<Sums> sums;
    std::vector<double> totals;  // a chunk for each thread
    std::size_t total_size = 0;
    std::atomic<std::size_t> next_small{0};
};

// Whether the step of a layer, taken in scratch memory, gives finite numbers alone.
inline bool is_finite(const Layer& layer, const Norms& norms, InstructionSet set) {
    DefaultFloats guard;
    const Loops& loops = loops_for(set);
    const std::size_t item = Vector::item_size(layer.w_format);
    const std::size_t dcdw_item = Vector::item_size(layer.dcdw_format);
    const Format moving = velocity_format(layer.w_format);
    const std::size_t moving_item = Vector::item_size(moving);
    const Coefficients by = coefficients(layer, norms);
    for (std::size_t start = 0; start < layer.size; start += block) {
        double out[block], velocity[block], total[block];
        const std::size_t size = std::min(block, layer.size - start);
        const char* w = static_cast<const char*>(layer.w) + start * item;
        const char* dcdw = static_cast<const char*>(layer.dcdw) + start * dcdw_item;
        const void* gradient = dcdw;
        Format format = layer.dcdw_format;
        if (by.along_total) {
            loops.join[layer.w_format][format](w, dcdw, total, size,
                                               addition(*layer.rule, norms.sum_exponent));
            gradient = total;
            format = float64;
        }
        if (layer.velocity) {
            const Rule& rule = *layer.rule;
            std::memcpy(velocity, static_cast<const char*>(layer.velocity) + start * moving_item,
                        size * moving_item);
            loops.move[layer.w_format][format](
                w, gradient, velocity, out, size, by,
                {rule.momentum, rule.lr_after_momentum, rule.nesterov});
            if (!std::isfinite(loops.largest[moving](velocity, size))) return false;
        } else {
            loops.apply[layer.w_format][format](w, gradient, out, size, by);
        }
        if (!std::isfinite(loops.largest[layer.w_format](out, size))) return false;
    }
    return true;
}

// Takes one pass over all layers, or both. Throws std::bad_alloc before anything is written, or
// nothing.
inline void step(const Layer* layers, std::size_t count, std::size_t threads, InstructionSet set,
                 Phases phases = Phases::both, Norms* norms = nullptr, bool bounds = false) {
    Step all(layers, count, threads, set, phases, norms, bounds);
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
