// Checks of step.hpp, without Python: memory outside the arrays is not touched, and inputs are not
// written; the bits do not depend on the instruction set, threads or separate passes; results are
// finite if `prove_finite` says so. The program stops at the first difference.
//
//     g++ -std=c++17 -O2 -ffp-contract=off -pthread -I lars_tree/_native tests/native/harness.cpp
//     ./a.out [quick] [team]
//
// With `team`, only threads are checked, on the team of an OpenMP runtime. sanitize.sh builds this
// program with and without sanitizers.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "step.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#endif

namespace {

using namespace lars;

[[noreturn]] void fail(const char* text, ...) {
    std::va_list values;
    va_start(values, text);
    std::vfprintf(stderr, text, values);
    std::fputc('\n', stderr);
    std::_Exit(1);  // other threads may be running
}

const Format all_formats[formats] = {float16, bfloat16, float32, float64};
const char* const names[formats] = {"float16", "bfloat16", "float32", "float64"};

// ---- Numbers and rules

enum Range { moderate, any, largest_ones };
enum { ranges = 3 };

// Elements of a format. In the range `any`, all bits are random, but no element is infinite or NaN.
class Numbers {
public:
    Numbers(Format format, Range range, std::size_t size, unsigned seed)
        : bytes(size * item_size(format)) {
        std::mt19937_64 random(seed);
        for (std::size_t i = 0; i < size; ++i) put(format, range, i, random());
    }

    std::vector<char> bytes;

private:
    void put(Format format, Range range, std::size_t i, std::uint64_t bits) {
        const double share = static_cast<double>(bits >> 11) * power_of_two(-53);  // in [0, 1)
        const double large[formats] = {6e4, 3e38, 3e38, 1.7e308};
        const double number = range == moderate ? share - 0.5 : (bits & 1 ? 1 : -1) * large[format];
        switch (format) {
            case float16:
                return put<Float16>(range, i, number, bits, 0x7c00);
            case bfloat16:
                return put<Bfloat16>(range, i, number, bits, 0x7f80);
            case float32:
                return put<float>(range, i, number, bits, 0x7f800000);
            case float64:
                return put<double>(range, i, number, bits, std::uint64_t{0x7ff} << 52);
        }
    }

    template <class T>
    void put(Range range, std::size_t i, double number, std::uint64_t bits, std::uint64_t special) {
        T item;
        write(item, number);
        if (range == any && (bits & special) != special) std::memcpy(&item, &bits, sizeof item);
        std::memcpy(&bytes[i * sizeof item], &item, sizeof item);
    }
};

// lr_before_momentum, decay_lambda, trust_coefficient, eps, grad_scale, adapt, trust_clip;
// momentum, lr_after_momentum, nesterov, maximize; joint_norm, dampening, must_be_finite
const Rule rules[] = {
    {0.1, 0, 1, 0, 1, true, false, 0.9, 1, false, false, false, 0, true},
    {0.1, 1e-2, 1, 1e-8, 1024, true, false, 0.9, 1, true, false, false, 0.5, true},
    {0.1, 0.5, 3, 0, 1, true, true, 0.5, 0.1, false, true, false, 0, true},
    {1e-3, 0, 1, 0, 1, false, false, 0.9, 3, true, true, false, 0.25, true},
    {1e-3, 1e-2, 1, 0, 1, false, false, 1, 1, false, false, true, 0, true},
    {1e-300, 0, 1e-5, 0, 1e-280, true, false, 0, 1, true, false, false, 0, true},
    {1e300, 1e-200, 1e-280, 0, 1, true, false, 1e-300, 1e290, true, true, false, 0, true},
    {0.1, 0.1, 1, 0, 1, true, false, 0.9, 1, false, false, true, 0, true},
    {10, 0.3, 1, 0, 3, true, true, 0.9, 1, true, true, true, 0.5, true},
    {1e-3, 1e-200, 1, 0, 1e-280, true, false, 0, 1, false, false, true, 0, true},
};
const std::size_t rule_count = sizeof rules / sizeof rules[0];

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets;
    for (int set = baseline_set; set <= best_set(); ++set) {
        sets.push_back(static_cast<InstructionSet>(set));
    }
    return sets;
}

// Both passes, in one call or in two.
enum Way { at_once, by_norms };

void step_layers(const std::vector<Layer>& layers, std::size_t threads, InstructionSet set,
                 Way way) {
    if (way == at_once) return step(layers.data(), layers.size(), threads, set);
    std::vector<Norms> norms(layers.size());
    step(layers.data(), layers.size(), threads, set, Passes::norms, norms.data(), true);
    std::vector<bool> finite;
    for (std::size_t i = 0; i < layers.size(); ++i) {
        finite.push_back(is_finite(layers[i], norms[i], set));
        if (!finite[i] && prove_finite(layers[i], norms[i])) {
            fail("layer %zu: a step with infinity or NaN is reported as finite", i);
        }
    }
    step(layers.data(), layers.size(), threads, set, Passes::apply, norms.data());
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const Layer& layer = layers[i];
        const Loops& loops = loops_for(set);
        const Format moving = velocity_format(layer.w_format);
        const bool is_now =
            std::isfinite(loops.largest[layer.w_format](layer.out, layer.size)) &&
            (!layer.velocity || std::isfinite(loops.largest[moving](layer.velocity, layer.size)));
        if (is_now != finite[i]) fail("layer %zu: is_finite is wrong", i);
    }
}

// ---- Arrays between guards

// Memory for one array at any offset, between guards. AddressSanitizer detects reads of guards too.
class Room {
public:
    explicit Room(std::size_t most_bytes) : memory(most_bytes + 2 * guard + 2 * line) {
        const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(memory.data());
        aligned = memory.data() + (line - start % line) % line;
    }
    ~Room() { ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size()); }

    // A copy of these bytes, `offset` bytes after an address that is aligned to 64.
    char* put(const char* bytes, std::size_t size, std::size_t offset) {
        ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size());
        start = aligned + guard + offset;
        end = start + size;
        std::memset(aligned, filling, start - aligned);
        std::memset(end, filling, guard);
        std::memcpy(start, bytes, size);
        ASAN_POISON_MEMORY_REGION(aligned, start - aligned);
        ASAN_POISON_MEMORY_REGION(end, guard);
        return start;
    }

    bool guards_are_untouched() {
        ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size());
        return is_filling(aligned, start) && is_filling(end, end + guard);
    }

private:
    static const std::size_t guard = 256, line = 64;
    static const char filling = 0x5a;

    static bool is_filling(const char* from, const char* to) {
        return *from == filling && std::memcmp(from, from + 1, to - from - 1) == 0;
    }

    std::vector<char> memory;
    char *aligned, *start = nullptr, *end = nullptr;
};

// Compares the step of each instruction set, at all offsets from the start of a cache line, with
// the step of baseline_set. `moves`: whether the layer has a velocity.
class Offsets {
public:
    Offsets(Format w_format, Format dcdw_format, Range range)
        : w_format(w_format),
          dcdw_format(dcdw_format),
          w_numbers(w_format, range, most, 1),
          dcdw_numbers(dcdw_format, range, most, 2),
          velocity_numbers(velocity_format(w_format), range, most, 3) {}

    void check(std::size_t size, const Rule& rule, bool moves) {
        const std::size_t item = item_size(w_format);
        expected.assign(size * item + 1, 0);
        expected_velocity = velocity_numbers.bytes;
        std::vector<char> w(w_numbers.bytes), dcdw(dcdw_numbers.bytes);
        step_one({w.data(), dcdw.data(), expected.data(),
                  moves ? expected_velocity.data() : nullptr, size, w_format, dcdw_format, &rule},
                 baseline_set, at_once);
        for (InstructionSet set : instruction_sets()) {
            for (std::size_t offset = 0; offset < 64; offset += item) {
                const Way way = offset / item % 2 ? by_norms : at_once;
                check(size, rule, moves, set, offset, "neither", way);
                check(size, rule, moves, set, offset, "w", way);
                if (w_format == dcdw_format) check(size, rule, moves, set, offset, "dcdw", way);
            }
        }
    }

    static const std::size_t most = 256;

private:
    static void step_one(const Layer& layer, InstructionSet set, Way way) {
        step_layers({layer}, 1, set, way);
    }

    void check(std::size_t size, const Rule& rule, bool moves, InstructionSet set,
               std::size_t offset, const char* in_place, Way way) {
        const std::size_t bytes = size * item_size(w_format);
        const std::size_t dcdw_bytes = size * item_size(dcdw_format);
        const std::size_t velocity_item = item_size(velocity_format(w_format));
        const std::size_t velocity_bytes = size * velocity_item;
        const bool over_w = in_place[0] == 'w', over_dcdw = in_place[0] == 'd';
        char* w = w_room.put(w_numbers.bytes.data(), bytes, offset);
        char* dcdw = dcdw_room.put(dcdw_numbers.bytes.data(), dcdw_bytes,
                                   (offset + size) * item_size(dcdw_format) % 64);
        std::vector<char> zeros(bytes + 1);
        char* out = over_w      ? w
                    : over_dcdw ? dcdw
                                : out_room.put(zeros.data(), bytes, (3 * offset + bytes) % 64);
        char* velocity = velocity_room.put(velocity_numbers.bytes.data(), velocity_bytes,
                                           (offset + 3 * size) * velocity_item % 64);
        step_one({w, dcdw, out, moves ? velocity : nullptr, size, w_format, dcdw_format, &rule},
                 set, way);

        const char* wrong = nullptr;
        if (!w_room.guards_are_untouched() || !dcdw_room.guards_are_untouched() ||
            !velocity_room.guards_are_untouched() ||
            (out != w && out != dcdw && !out_room.guards_are_untouched())) {
            wrong = "memory beyond an array was written";
        } else if (!over_w && std::memcmp(w, w_numbers.bytes.data(), bytes) != 0) {
            wrong = "w was written";
        } else if (!over_dcdw && std::memcmp(dcdw, dcdw_numbers.bytes.data(), dcdw_bytes) != 0) {
            wrong = "dcdw was written";
        } else if (std::memcmp(out, expected.data(), bytes) != 0) {
            wrong = "other bits than those of instruction set 0";
        } else if (std::memcmp(velocity, expected_velocity.data(), velocity_bytes) != 0) {
            wrong = "another velocity than that of instruction set 0";
        }
        if (wrong) {
            fail("%s: w %s, dcdw %s, size %zu, offset %zu, set %d, rule %d, out over %s, %s, %s",
                 wrong, names[w_format], names[dcdw_format], size, offset, static_cast<int>(set),
                 static_cast<int>(&rule - rules), in_place, moves ? "momentum" : "no momentum",
                 way == at_once ? "at once" : "in two passes");
        }
    }

    const Format w_format, dcdw_format;
    const Numbers w_numbers, dcdw_numbers, velocity_numbers;
    std::vector<char> expected, expected_velocity;
    Room w_room{most * 8}, dcdw_room{most * 8}, out_room{most * 8}, velocity_room{most * 8};
};

void check_offsets(bool quick) {
    std::size_t steps = 0;
    for (Format w_format : all_formats) {
        for (Format dcdw_format : all_formats) {
            for (int range = 0; range < ranges; ++range) {
                Offsets offsets(w_format, dcdw_format, static_cast<Range>(range));
                for (std::size_t size = 0; size <= Offsets::most; ++size) {
                    const bool is_near_block = (size + 1) % block <= 2;
                    if (quick && !is_near_block && (size + range) % 16 != 0) continue;
                    for (bool moves : {false, true}) {
                        offsets.check(size, rules[steps / 2 % rule_count], moves);
                        ++steps;
                    }
                }
            }
        }
    }
    std::printf("%zu steps, each at all offsets: guards and bits are right\n", steps);
}

// ---- Threads

// Layers and their memory; two of three layers have a velocity. Models with the same seed contain
// the same numbers.
class Model {
public:
    explicit Model(unsigned seed) {
        const std::size_t chunk = min_chunk;
        add(least_whole_size + 1, float32, float32, moderate, 0);
        add(3 * least_whole_size + 777, bfloat16, bfloat16, moderate, 1);
        // The squares overflow, so the elements are scaled and summed again.
        add(2 * least_whole_size + 5, float64, float64, largest_ones, 2);
        add(least_whole_size + chunk, float16, float32, moderate, 3);  // adapt is off
        add(6 * least_whole_size + 333, bfloat16, bfloat16, moderate, 2);
        add(least_whole_size + chunk - 1, float64, float32, any, 1);
        add(2 * least_whole_size, float32, float64, any, 4);
        add(least_whole_size, float32, bfloat16, moderate, 0);  // the largest size for one thread
        for (std::size_t i = 0; i < 240; ++i) {
            add(i * i % 401, all_formats[i % 4], all_formats[i / 4 % 4],
                static_cast<Range>(i % ranges), i % rule_count);
        }
        for (std::size_t i = 0; i < specs.size(); ++i) {
            const Spec& spec = specs[i];
            w.push_back(Numbers(spec.w_format, spec.range, spec.size, seed++).bytes);
            dcdw.push_back(Numbers(spec.dcdw_format, spec.range, spec.size, seed++).bytes);
            const std::size_t moving = i % 3 ? spec.size : 0;
            velocity.push_back(
                Numbers(velocity_format(spec.w_format), spec.range, moving, seed++).bytes);
        }
        first = out = w;
        first_velocity = velocity;
    }

    void restart() {
        w = out = first;
        velocity = first_velocity;
    }

    // Updates all layers in this order, in place or not; then `w` has the new weights.
    void step(const std::vector<std::size_t>& order, bool in_place, std::size_t threads,
              InstructionSet set, Way way) {
        std::vector<Layer> layers;
        for (std::size_t i : order) {
            const Spec& spec = specs[i];
            char* result = (in_place ? w : out)[i].data();
            char* moving = velocity[i].empty() ? nullptr : velocity[i].data();
            layers.push_back({w[i].data(), dcdw[i].data(), result, moving, spec.size, spec.w_format,
                              spec.dcdw_format, &rules[spec.rule]});
        }
        step_layers(layers, threads, set, way);
        if (!in_place) w.swap(out);
    }

    std::size_t size() const { return specs.size(); }

    std::vector<std::vector<char>> w, dcdw, out, velocity, first, first_velocity;

private:
    struct Spec {
        std::size_t size;
        Format w_format, dcdw_format;
        Range range;
        std::size_t rule;
    };

    void add(std::size_t size, Format w_format, Format dcdw_format, Range range, std::size_t rule) {
        specs.push_back({size, w_format, dcdw_format, range, rule});
    }

    std::vector<Spec> specs;
};

void check_threads(int steps, unsigned seed) {
    const std::size_t thread_counts[] = {1, 2, 3, 8};
    Model by_one(seed), by_many(seed);
    std::vector<std::size_t> order, shuffled;
    for (std::size_t i = 0; i < by_one.size(); ++i) order.push_back(i);
    shuffled = order;
    std::mt19937 random(seed);
    for (int i = 0; i < steps; ++i) {
        if (i % 8 == 0) {  // before every number that can overflow has overflowed
            by_one.restart();
            by_many.restart();
        }
        const std::size_t threads = thread_counts[i % 4];
        const bool in_place = random() % 2;
        std::shuffle(shuffled.begin(), shuffled.end(), random);
        by_one.step(order, in_place, 1, best_set(), at_once);
        by_many.step(shuffled, in_place, threads, best_set(), i / 4 % 2 ? by_norms : at_once);
        for (std::size_t layer : order) {
            if (by_one.w[layer] != by_many.w[layer] || by_one.dcdw[layer] != by_many.dcdw[layer] ||
                by_one.velocity[layer] != by_many.velocity[layer]) {
                fail("step %d, layer %zu: %zu threads give other bits than one", i, layer, threads);
            }
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    bool quick = false, team = false;
    for (int i = 1; i < count; ++i) {
        (std::strcmp(arguments[i], "team") != 0 ? quick : team) = true;
    }
    if (team) dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (team != bool(OpenMP().parallel)) fail("%s OpenMP runtime", team ? "no" : "an unexpected");
    if (!team) check_offsets(quick);
    const int steps = quick ? 24 : 400;
    check_threads(steps, 1);
    std::printf("%d steps of 1, 2, 3 and 8 threads: the same bits\n", steps);
    std::thread other([steps] { check_threads(steps / 2, 2); });
    check_threads(steps / 2, 3);
    other.join();
    std::printf("two callers at once: the same bits\n");
    return 0;
}
