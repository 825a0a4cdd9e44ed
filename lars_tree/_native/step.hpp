// One LARS step of many layers, distributed over threads: both passes, or one of them.
//
// A layer of moderate size is updated by one thread: it makes both passes while the layer is in a
// cache. A larger layer is updated by all threads, chunk by chunk: they sum in forward order, wait
// until the sums are complete, and apply in backward order, because the chunks that were read last
// are still in a cache. Each thread begins with its own range of chunks, and then takes chunks that
// other threads have not begun. Sums are stored by chunk and added in the order of the chunks, so
// the bits do not depend on the threads.
//
// team.hpp has the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernel.hpp"
#include "team.hpp"

namespace lars {

// Within its scope, the floating-point environment is the default one: rounding to nearest, without
// flushing subnormal numbers to zero, whatever the caller or a library has set.
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

// Layers of at most this size are updated by one thread, so that threads that read and threads that
// write take turns: memory is then faster. If there are many threads, the limit is lower, so that
// no thread has much more work than the others.
const std::size_t max_whole_size = 1 << 19, least_whole_size = 1 << 17;

// The next chunk in the initial range of one thread.
struct ChunkCounter {
    std::atomic<std::size_t> next{0};
    char padding[56];  // so that no two counters share a cache line
};

// What the second pass over a layer needs; `joint` is used with joint_norm only.
struct Terms {
    Coefficients coefficients;
    JointGradient joint;
};

// The passes to make over each layer: `norms` only reads, `apply` writes and is given the norms.
enum class Passes { both, norms, apply };

// The progress of all threads in a larger layer.
struct Progress {
    std::unique_ptr<ChunkCounter[]> to_sum, to_apply;  // one for each thread
    std::atomic<std::size_t> summed{0};
    std::atomic<bool> ready{false};
    // Not std::call_once: its first call in a thread allocates memory, and aborts if there is none.
    std::mutex joint_exponent_mutex;
    bool has_joint_exponent = false;
    double joint_exponent = 0;
    Terms terms;
};

class Step {
public:
    // `norms` has one item for each layer, which Passes::norms writes and Passes::apply reads. With
    // `bounds`, Passes::norms also finds the largest magnitude of each velocity.
    Step(const Layer* layers, std::size_t count, std::size_t max_threads, InstructionSet set,
         Passes passes, Norms* norms, bool bounds)
        : layers(layers), loops(loops_for(set)), passes(passes), norms(norms), bounds(bounds) {
        std::size_t longest = 0, elements = 0;
        for (std::size_t i = 0; i < count; ++i) elements += layers[i].size;
        // Starting more threads than this would take more time than they save.
        threads = std::min(max_threads, 1 + elements / (2 * least_whole_size));
        const std::size_t limit =
            std::min(max_whole_size, std::max(least_whole_size, elements / (8 * threads)));
        std::size_t in_batch = batch_size;
        for (std::size_t i = 0; i < count; ++i) {
            if (layers[i].size > limit) {
                large.push_back(i);
                longest = std::max(longest, chunks(layers[i].size));
            } else {
                // A batch has several small layers, or ends with a larger one.
                if (in_batch >= batch_size) batches.push_back(small.size()), in_batch = 0;
                small.push_back(i);
                in_batch += 1 + layers[i].size / min_chunk;
            }
            if (layers[i].rule->is_joint()) {
                joint_size =
                    std::max(joint_size, std::min(layers[i].size, chunk_size(layers[i].size)));
            }
        }
        batches.push_back(small.size());
        progress.reset(new Progress[large.size()]);
        for (std::size_t i = 0; i < large.size(); ++i) {
            progress[i].to_sum.reset(new ChunkCounter[threads]);
            progress[i].to_apply.reset(new ChunkCounter[threads]);
        }
        sums.resize(longest);
        joint_buffers.resize(threads * joint_size);
    }

    // The work of one thread; returns when no chunk or layer is left.
    void work(std::size_t thread) noexcept {
        DefaultFloats guard;
        for (std::size_t i = 0; i < large.size(); ++i) {
            step_in_chunks(large[i], progress[i], thread);
        }
        for (std::size_t batch; (batch = next_batch.fetch_add(1)) + 1 < batches.size();) {
            for (std::size_t i = batches[batch]; i < batches[batch + 1]; ++i) {
                if (i + 2 < small.size()) prefetch(layers[small[i + 2]]);
                step_whole(small[i], thread);
            }
        }
    }

    std::size_t threads;

private:
    // Prefetches the start of a layer that is read soon, because small layers may be scattered over
    // memory.
    static void prefetch(const Layer& layer) {
#if defined(__GNUC__)
        const std::size_t bytes =
            std::min<std::size_t>(1024, layer.size * item_size(layer.w_format));
        for (std::size_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch(static_cast<const char*>(layer.w) + i);
            __builtin_prefetch(static_cast<const char*>(layer.dcdw) + i);
            if (layer.velocity) __builtin_prefetch(static_cast<char*>(layer.velocity) + i);
        }
#else
        (void)layer;
#endif
    }

    static FlatArray weights(const Layer& layer) {
        return {static_cast<const char*>(layer.w), layer.size, layer.w_format};
    }

    static FlatArray gradients(const Layer& layer) {
        return {static_cast<const char*>(layer.dcdw), layer.size, layer.dcdw_format};
    }

    // The result of the first pass over a chunk.
    struct Sums {
        Pair w, dcdw;
        double velocity_max;
    };

    static double larger_or_nan(double x, double y) { return x > y || x != x ? x : y; }

    bool needs_norms(const Layer& layer) const {
        return layer.rule->adapt || passes == Passes::norms;
    }

    Norms norms_of(const Layer& layer, const Sums* of_chunks, double joint_exponent) const {
        Norms found;
        const FlatArray w = weights(layer), dcdw = gradients(layer);
        const Pair w_sum = sum(w, of_chunks, &Sums::w);
        const Pair dcdw_sum = sum(dcdw, of_chunks, &Sums::dcdw);
        found.joint_exponent = joint_exponent;
        found.velocity_max = 0;
        for (std::size_t i = 0; i < chunks(layer.size); ++i) {
            found.velocity_max = larger_or_nan(of_chunks[i].velocity_max, found.velocity_max);
        }
        if (computes_in_double(layer)) {
            found.set(std::sqrt(w_sum.high), std::sqrt(dcdw_sum.high));
        } else if (layer.rule->is_joint()) {
            const int exponent = std::isnan(joint_exponent) ? 0 : static_cast<int>(joint_exponent);
            found.set(norm(loops, w, w_sum), scaled(sqrt(DoubleDouble(dcdw_sum)), exponent));
        } else {
            found.set(norm(loops, w, w_sum), norm(loops, dcdw, dcdw_sum));
        }
        return found;
    }

    Terms terms_of(const Layer& layer, const Norms& known) const {
        Terms terms = {coefficients_for(layer, known), {}};
        if (layer.rule->is_joint()) {
            terms.joint = joint_gradient(*layer.rule, known.joint_exponent);
        }
        return terms;
    }

    // The terms, given the sums of the chunks; in most cases `Norms` need not be computed.
    Terms terms_of(const Layer& layer, const Sums* of_chunks, double joint_exponent) const {
        if (!computes_in_double(layer) || layer.rule->is_joint()) {
            return terms_of(layer, norms_of(layer, of_chunks, joint_exponent));
        }
        const double w = std::sqrt(sum(weights(layer), of_chunks, &Sums::w).high);
        const double dcdw = std::sqrt(sum(gradients(layer), of_chunks, &Sums::dcdw).high);
        return {coefficients_for<double>(w, dcdw, *layer.rule), {}};
    }

    double joint_exponent_of(const Layer& layer) const {
        if (!layer.rule->is_joint()) return std::numeric_limits<double>::quiet_NaN();
        return joint_exponent(loops, weights(layer), gradients(layer), *layer.rule);
    }

    void step_whole(std::size_t index, std::size_t thread) {
        const Layer& layer = layers[index];
        if (passes == Passes::apply || !needs_norms(layer)) {
            apply(layer, terms_of(layer, norms ? norms[index] : Norms{}), 0, layer.size);
            return;
        }
        Sums of_chunks[max_whole_size / min_chunk];
        const double exponent = joint_exponent_of(layer);
        for (std::size_t i = 0; i < chunks(layer.size); ++i) {
            of_chunks[i] = sum_chunk(layer, i, exponent, thread);
        }
        if (passes == Passes::norms) {
            norms[index] = norms_of(layer, of_chunks, exponent);
        } else {
            apply(layer, terms_of(layer, of_chunks, exponent), 0, layer.size);
        }
    }

    Sums sum_chunk(const Layer& layer, std::size_t i, double exponent, std::size_t thread) {
        Sums found = {};
        const std::size_t chunk = chunk_size(layer.size);
        const FlatArray w = weights(layer).part(i * chunk, chunk);
        FlatArray dcdw = gradients(layer).part(i * chunk, chunk);
        if (layer.rule->is_joint()) {
            double* joint = joint_buffers.data() + thread * joint_size;
            loops.add_decay[w.format][dcdw.format](w.data, dcdw.data, joint, w.size,
                                                   joint_gradient(*layer.rule, exponent));
            dcdw = {reinterpret_cast<const char*>(joint), w.size, float64};
        }
        LaneSums w_sums, dcdw_sums;
        loops.sum_squares[w.format][dcdw.format](w.data, dcdw.data, w.size, w_sums, dcdw_sums);
        found.w = sum_of_lanes(w_sums);
        found.dcdw = sum_of_lanes(dcdw_sums);
        if (bounds && layer.velocity) {
            const Format format = velocity_format(layer.w_format);
            const auto* velocity = static_cast<const char*>(layer.velocity);
            const std::size_t start = i * chunk * item_size(format);
            found.velocity_max = loops.largest[format](velocity + start, w.size);
        }
        return found;
    }

    void step_in_chunks(std::size_t index, Progress& now, std::size_t thread) {
        const Layer& layer = layers[index];
        const std::size_t count = chunks(layer.size), chunk = chunk_size(layer.size);
        Terms terms;
        if (passes == Passes::apply || !needs_norms(layer)) {
            terms = terms_of(layer, norms ? norms[index] : Norms{});
        } else {
            {
                const std::lock_guard<std::mutex> lock(now.joint_exponent_mutex);
                if (!now.has_joint_exponent) now.joint_exponent = joint_exponent_of(layer);
                now.has_joint_exponent = true;
            }
            const auto sum_one = [&](std::size_t start, std::size_t, std::size_t i) {
                sums[start + i] = sum_chunk(layer, start + i, now.joint_exponent, thread);
                if (now.summed.fetch_add(1) + 1 < count) return;
                if (passes == Passes::norms) {
                    norms[index] = norms_of(layer, sums.data(), now.joint_exponent);
                } else {
                    now.terms = terms_of(layer, sums.data(), now.joint_exponent);
                }
                now.ready.store(true, std::memory_order_release);
            };
            for_chunks(now.to_sum.get(), count, thread, sum_one);
            while (!now.ready.load(std::memory_order_acquire)) std::this_thread::yield();
            terms = now.terms;
        }
        if (passes == Passes::norms) return;
        const auto apply_chunk = [&](std::size_t start, std::size_t length, std::size_t i) {
            const std::size_t first = (start + length - 1 - i) * chunk;
            apply(layer, terms, first, std::min(chunk, layer.size - first));
        };
        for_chunks(now.to_apply.get(), count, thread, apply_chunk);
    }

    // Calls action(start, length, i) for each chunk that this thread takes: chunk i of the range of
    // `length` chunks that begins with chunk `start`. The thread begins with its own range.
    template <class Action>
    void for_chunks(ChunkCounter* counters, std::size_t count, std::size_t thread,
                    Action action) const {
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
        if (!terms.coefficients.uses_joint_gradient) {
            apply(layer, w, dcdw, layer.dcdw_format, terms.coefficients, start, size);
            return;
        }
        double joint[block];
        for (std::size_t i = 0; i < size; i += block) {
            const std::size_t length = std::min(block, size - i);
            w = weights(layer).at(start + i);
            dcdw = gradients(layer).at(start + i);
            loops.add_decay[layer.w_format][layer.dcdw_format](w, dcdw, joint, length, terms.joint);
            apply(layer, w, joint, float64, terms.coefficients, start + i, length);
        }
    }

    void apply(const Layer& layer, const void* w, const void* dcdw, Format dcdw_format,
               const Coefficients& coefficients, std::size_t start, std::size_t size) const {
        const Format format = layer.w_format;
        char* out = static_cast<char*>(layer.out) + start * item_size(format);
        if (!layer.velocity) {
            loops.apply[format][dcdw_format](w, dcdw, out, size, coefficients);
            return;
        }
        char* velocity =
            static_cast<char*>(layer.velocity) + start * item_size(velocity_format(format));
        loops.apply_momentum[format][dcdw_format](w, dcdw, velocity, out, size, coefficients,
                                                  layer.rule->momentum_options());
    }

    const Layer* layers;
    const Loops& loops;
    static const std::size_t batch_size = 8;
    std::vector<std::size_t> large, small;  // the indices of layers
    std::vector<std::size_t> batches;       // the first index in `small` of each batch, and its end
    const Passes passes;
    Norms* const norms;
    const bool bounds;
    std::unique_ptr<Progress[]> progress;
    std::vector<Sums> sums;
    std::vector<double> joint_buffers;  // the joint gradient of one chunk for each thread
    std::size_t joint_size = 0;
    std::atomic<std::size_t> next_batch{0};
};

// Whether all results of a layer are finite; computes them in scratch memory.
inline bool is_finite(const Layer& layer, const Norms& norms, InstructionSet set) {
    DefaultFloats guard;
    const Loops& loops = loops_for(set);
    const std::size_t item = item_size(layer.w_format);
    const std::size_t dcdw_item = item_size(layer.dcdw_format);
    const Format v_format = velocity_format(layer.w_format);
    const std::size_t v_item = item_size(v_format);
    const Coefficients coefficients = coefficients_for(layer, norms);
    for (std::size_t start = 0; start < layer.size; start += block) {
        double out[block], velocity[block], joint[block];
        const std::size_t size = std::min(block, layer.size - start);
        const char* w = static_cast<const char*>(layer.w) + start * item;
        const char* dcdw = static_cast<const char*>(layer.dcdw) + start * dcdw_item;
        const void* gradient = dcdw;
        Format format = layer.dcdw_format;
        if (coefficients.uses_joint_gradient) {
            loops.add_decay[layer.w_format][format](
                w, dcdw, joint, size, joint_gradient(*layer.rule, norms.joint_exponent));
            gradient = joint;
            format = float64;
        }
        if (layer.velocity) {
            std::memcpy(velocity, static_cast<const char*>(layer.velocity) + start * v_item,
                        size * v_item);
            loops.apply_momentum[layer.w_format][format](
                w, gradient, velocity, out, size, coefficients, layer.rule->momentum_options());
            if (!std::isfinite(loops.largest[v_format](velocity, size))) return false;
        } else {
            loops.apply[layer.w_format][format](w, gradient, out, size, coefficients);
        }
        if (!std::isfinite(loops.largest[layer.w_format](out, size))) return false;
    }
    return true;
}

// Makes one or both passes over all layers. May throw std::bad_alloc, but only before anything is
// written.
inline void step(const Layer* layers, std::size_t count, std::size_t threads, InstructionSet set,
                 Passes passes = Passes::both, Norms* norms = nullptr, bool bounds = false) {
    Step all(layers, count, threads, set, passes, norms, bounds);
    if (all.threads == 1) return all.work(0);
    run_on_threads(all.threads, threads, [&all](std::size_t thread) { all.work(thread); });
}

}  // namespace lars
