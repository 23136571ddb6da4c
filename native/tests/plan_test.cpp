// Norms against float64, and plans: every engine, number of threads and composition of a batch gives the same bits.
#include <new>
#include <stdexcept>
#include <string>

#include "../kernels/arena.h"
#include "../kernels/plan.h"
#include "products.h"

using namespace spicerack;

namespace {

Exact floats(int64_t count, Random& random, double scale = 1.0) {
    Exact memory(count, sizeof(float));
    for (int64_t i = 0; i < count; i++) put(memory.data(), i, random.bell() * scale, Float::f32);
    return memory;
}

double at(const Exact& memory, int64_t i) { return get(memory.data(), i, Float::f32); }

// ---- norms ----------------------------------------------------------------------------------------------------------

struct NormCase {
    int64_t rows, width;
    bool more, bias, centered, in_place;
};

struct NormInputs {
    Exact x, more, weight, bias;
    NormCase c;
};

std::vector<double> run(const Engine& engine, const NormInputs& in, int threads) {
    const int64_t count = in.c.rows * in.c.width;
    Exact y(count, sizeof(float));
    const float* x = (const float*)in.x.data();
    if (in.c.in_place) {
        std::memcpy(y.data(), x, size_t(y.bytes()));
        x = (const float*)y.data();
    }
    engine.norm({x, in.c.more ? (const float*)in.more.data() : nullptr, (const float*)in.weight.data(),
                 in.c.bias ? (const float*)in.bias.data() : nullptr, (float*)y.data(), in.c.rows, in.c.width, 1e-5f,
                 in.c.centered, threads});
    std::vector<double> values;
    for (int64_t i = 0; i < count; i++) values.push_back(at(y, i));
    return values;
}

// A sum of n numbers has at most n roundings, of at most the sum of magnitudes; a variance from a mean that is off by d
// is off by d^2; the rest is a few roundings each.
void check_right(const NormInputs& in, const std::vector<double>& y) {
    const int64_t width = in.c.width;
    const double unit = 0x1p-24, steps = double(width) + 40;
    bool right = true;
    for (int64_t row = 0; row < in.c.rows; row++) {
        std::vector<double> x;
        double mean = 0, magnitude = 0, variance = 0;
        for (int64_t i = row * width; i < (row + 1) * width; i++) {
            x.push_back(at(in.x, i) + (in.c.more ? at(in.more, i) : 0));
            mean += x.back() / double(width);
            magnitude += std::fabs(x.back()) / double(width);
        }
        if (!in.c.centered) mean = 0;
        for (const double value : x) variance += (value - mean) * (value - mean) / double(width);
        const double share = 1 / std::sqrt(variance + double(1e-5f)), off = unit * steps * magnitude;
        for (int64_t i = 0; i < width; i++) {
            const double weight = at(in.weight, i), bias = in.c.bias ? at(in.bias, i) : 0;
            const double scaled = (x[i] - mean) * share * weight;
            const double bound = std::fabs(weight) * share * (off + 2 * unit * std::fabs(x[i])) +
                                 std::fabs(scaled) * (steps * unit + off * off * share * share + 2 * off * share) +
                                 4 * unit * (std::fabs(scaled) + std::fabs(bias));
            right = right && std::fabs(y[row * width + i] - (scaled + bias)) <= bound;
        }
    }
    check(right, "y is within the bound");
}

void norms(Random& random) {
    for (const int64_t width : {1, 4, 15, 16, 17, 31, 32, 40, 384, 1000}) {
        if (once && width != 40) continue;
        for (int kind = 0; kind < 8; kind++) {
            const NormCase c{width == 384 ? 90 : random.between(1, 7), width, (kind & 1) != 0, (kind & 2) != 0,
                             (kind & 4) != 0, random.below(2) != 0};
            const int64_t count = c.rows * width;
            NormInputs in{floats(count, random, 3), floats(count, random), floats(width, random), floats(width, random), c};
            for (int64_t i = 0; i < width && kind % 2; i++) put(in.x.data(), i, 100 + random.bell(), Float::f32);
            const auto name = [&](const char* isa, int threads) {
                std::snprintf(subject, sizeof subject, "norm: %s, %d rows of %d%s%s%s%s, %d threads", isa, int(c.rows),
                              int(width), c.more ? ", of a sum" : "", c.bias ? ", bias" : "",
                              c.centered ? ", centered" : "", c.in_place ? ", in place" : "", threads);
            };
            name("scalar", 1);
            const std::vector<double> want = run(scalar_engine(), in, 1);
            check_right(in, want);
            for (const Engine& engine : engines()) {
                for (int threads = 1; threads <= 3; threads++) {
                    name(engine.isa, threads);
                    check(equal(run(engine, in, threads), want), "the same bits as scalar");
                }
            }
        }
    }
}

// ---- plans ----------------------------------------------------------------------------------------------------------

constexpr int64_t WORDS = 40, PLACES = 400, TYPES_OF_TOKENS = 2, HIDDEN = 48, INNER = 80, HEADS = 3, REACH = 6, BUCKETS = 5;

Parameter parameter(const Exact& memory, int64_t count, Float type = Float::f32, int64_t place = 0) {
    return {memory.data(), type, count, place};
}

constexpr Parameter NO_PARAMETER{nullptr, Float::f32, 0, 0};

Columns all(int buffer, int64_t width) { return {buffer, 0, width}; }

// A small encoder block behind a look-up, with what its steps point into.
struct Small {
    Exact types, places, weight, bias, of_inner, of_hidden, short_weight, short_bias, short_bias_of_qkv,
        short_up;
    Matrix words, q, k, v, out, up, down, qkv, half_down;

    explicit Small(Random& random)
        : types(floats(TYPES_OF_TOKENS * HIDDEN, random)), places(floats(PLACES * HIDDEN, random)),
          weight(floats(HIDDEN, random)), bias(floats(HIDDEN, random)), of_inner(floats(INNER, random)),
          of_hidden(floats(HIDDEN, random)) {
        const auto matrix = [&](int64_t n, int64_t columns) {
            return make({n, columns, 0, 8, symmetric, Float::f32, false, false}, random);
        };
        words = matrix(WORDS, HIDDEN);
        q = matrix(HIDDEN, HIDDEN), k = matrix(HIDDEN, HIDDEN), v = matrix(HIDDEN, HIDDEN), out = matrix(HIDDEN, HIDDEN);
        up = matrix(INNER, HIDDEN), down = matrix(HIDDEN, INNER);
        qkv = matrix(3 * HIDDEN, HIDDEN), half_down = matrix(HIDDEN, INNER / 2);
    }
    Plan plan(const Engine& engine, Positions positions) const {
        Plan plan{&engine, Float::f32, {HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, INNER}, positions, {}, 5, {}, {}, false};
        const Parameter w = parameter(weight, HIDDEN), b = parameter(bias, HIDDEN);
        plan.steps.push_back(LookUp{{{Index::ids, {WORDS, nullptr, Float::f32, words.weights}},
                                     {Index::types, {TYPES_OF_TOKENS, types.data(), Float::f32, {}}},
                                     {Index::positions, {PLACES, places.data(), Float::f32, {}}}}, 0});
        plan.steps.push_back(NormStep{0, -1, 0, w, b, 1e-5f, true});
        plan.steps.push_back(ProductStep{&engine, 0, Activations::spans, nullptr,
                                         {{q.weights, NO_PARAMETER, 1, false}, {k.weights, b, 2, false}, {v.weights, b, 3, false}}});
        plan.steps.push_back(AttentionStep{all(1, HIDDEN), all(2, HIDDEN), all(3, HIDDEN), 4, HEADS, HEADS, 0.25f, -1, -1});
        plan.steps.push_back(ProductStep{&engine, 4, Activations::tokens, nullptr, {{out.weights, b, 5, false}}});
        plan.steps.push_back(NormStep{5, 0, 0, w, NO_PARAMETER, 1e-5f, false});
        plan.steps.push_back(ProductStep{&engine, 0, Activations::spans, nullptr,
                                         {{up.weights, parameter(of_inner, INNER), 6, true}}});
        plan.steps.push_back(ProductStep{&engine, 6, Activations::spans, nullptr,
                                         {{down.weights, parameter(of_hidden, HIDDEN), 5, false}}});
        plan.steps.push_back(AddStep{5, 0, 5, NO_PARAMETER});
        return plan;
    }
    // States of a narrow type through a block whose norms come first: q, k and v side by side, rotary positions, a window,
    // a bias by distance, a gate, sums by factors.
    Plan narrow(const Engine& engine, Float type) const {
        const int fused = 1, attended = 2, normed = 3, turns = 4, wide = 5, inner = 6, y = 7;
        Plan plan{&engine, type, {HIDDEN, 3 * HIDDEN, HIDDEN, HIDDEN, HIDDEN / HEADS, INNER, INNER / 2, HIDDEN},
                  {false, 0}, {}, 0, {}, {}, true};
        const auto widened = [&](const Exact& memory, int64_t count) {
            const int64_t place = plan.widened.empty() ? 0 : plan.widened.back().place + plan.widened.back().count;
            const Parameter p = parameter(memory, count, type, place);
            if (type != Float::f32) plan.widened.push_back(p);
            return p;
        };
        std::vector<int64_t> buckets;
        for (int64_t distance = -REACH; distance <= REACH; distance++) buckets.push_back((distance + REACH) % BUCKETS);
        plan.biases.push_back({{BUCKETS, short_bias.data(), type, {}}, HEADS, buckets});
        plan.steps.push_back(TakeStep{0});
        plan.steps.push_back(NormStep{0, -1, normed, widened(short_weight, HIDDEN), NO_PARAMETER, 1e-5f, true});
        plan.steps.push_back(TurnStep{widened(short_weight, HIDDEN / HEADS / 2), 1.5f, turns});
        plan.steps.push_back(ProductStep{&engine, normed, Activations::spans, nullptr,
                                         {{qkv.weights, widened(short_bias_of_qkv, 3 * HIDDEN), fused, false}}});
        const Columns q{fused, 0, HIDDEN}, k{fused, HIDDEN, HIDDEN}, v{fused, 2 * HIDDEN, HIDDEN};
        plan.steps.push_back(RotateStep{q, HEADS, turns});
        plan.steps.push_back(RotateStep{k, HEADS, turns});
        plan.steps.push_back(AttentionStep{q, k, v, attended, HEADS, HEADS, 0.25f, 4, 0});
        plan.steps.push_back(ProductStep{&engine, attended, Activations::tokens, nullptr,
                                         {{out.weights, NO_PARAMETER, y, false}}});
        plan.steps.push_back(AddStep{0, y, 0, widened(short_weight, HIDDEN)});
        plan.steps.push_back(DenseStep{0, wide, short_up.data(), type, NO_PARAMETER, false});
        plan.steps.push_back(GateStep{{wide, 0, INNER / 2}, {wide, INNER / 2, INNER / 2}, inner, Function::silu});
        plan.steps.push_back(ProductStep{&engine, inner, Activations::floats, nullptr,
                                         {{half_down.weights, NO_PARAMETER, y, false}}});
        plan.steps.push_back(AddStep{0, y, 0, NO_PARAMETER});
        plan.steps.push_back(NormStep{0, -1, 0, widened(short_weight, HIDDEN), NO_PARAMETER, 1e-5f, true});
        return plan;
    }
    // What `narrow` reads, in its type.
    void shorten(Float type, Random& random) {
        const auto of = [&](int64_t count) {
            Exact memory(count, size_of(type));
            for (int64_t i = 0; i < count; i++) put(memory.data(), i, random.bell(), type);
            return memory;
        };
        short_weight = of(HIDDEN), short_bias = of(BUCKETS * HEADS), short_bias_of_qkv = of(3 * HIDDEN);
        short_up = of(INNER * HIDDEN);
    }
};

struct Sentences {
    int64_t batch, length;
    std::vector<int64_t> ids, mask, types;

    Sentences(int64_t count, int64_t columns) : batch(count), length(columns) {
        ids.assign(size_t(count * columns), 1);
        mask.assign(ids.size(), 0);
        types.assign(ids.size(), 0);
    }
    Batch view() const { return {ids.data(), mask.data(), types.data(), nullptr, nullptr, batch, length}; }
};

// Empty where the plan computes nothing.
std::vector<double> run(const Plan& plan, const Batch& batch, int threads) {
    Exact y(batch.batch * batch.length * HIDDEN, size_of(plan.type));
    std::vector<double> values;
    if (!run_plan(plan, batch, y.data(), threads)) return values;
    for (int64_t i = 0; i < batch.batch * batch.length * HIDDEN; i++) values.push_back(get(y.data(), i, plan.type));
    return values;
}

void plans(Random& random) {
    const Small small(random);
    for (const int64_t longest : {1, 9, 70, 300}) {
        if (once && longest != 9) continue;
        for (const bool counted : {false, true}) {
            const Positions positions{counted, counted ? 1 : 0};
            Sentences s(longest == 300 ? 3 : 7, longest);
            std::vector<int64_t> lengths;
            for (int64_t i = 0; i < s.batch; i++) {
                const int64_t size = i == 1 ? 0 : i == 2 ? longest : random.between(1, longest);
                lengths.push_back(size);
                for (int64_t j = 0; j < size; j++) {
                    s.ids[i * longest + j] = random.between(2, WORDS - 1);
                    s.types[i * longest + j] = random.below(2);
                    s.mask[i * longest + j] = 1;
                }
            }
            std::snprintf(subject, sizeof subject, "plan: %d sentences of up to %d", int(s.batch), int(longest));
            const Plan scalar = small.plan(scalar_engine(), positions);
            const std::vector<double> want = run(scalar, s.view(), 1);
            for (int64_t i = 0; i < s.batch; i++) {
                const auto begin = want.begin() + i * longest * HIDDEN;
                const std::vector<double> own(begin, begin + lengths[i] * HIDDEN);
                const std::vector<double> rest(begin + lengths[i] * HIDDEN, begin + longest * HIDDEN);
                check(equal(rest, std::vector<double>(rest.size(), 0.0)), "zeros where the mask hides");
                if (!lengths[i]) continue;
                Sentences alone(1, lengths[i]);
                std::copy_n(s.ids.begin() + i * longest, lengths[i], alone.ids.begin());
                std::copy_n(s.types.begin() + i * longest, lengths[i], alone.types.begin());
                Batch batch = alone.view();
                batch.mask = nullptr;
                check(equal(run(scalar, batch, 1), own), "the same bits alone");
            }
            for (const Engine& engine : engines()) {
                for (int threads = 1; threads <= 3; threads++) {
                    std::snprintf(subject, sizeof subject, "plan: %s, up to %d, %d threads", engine.isa, int(longest), threads);
                    check(equal(run(small.plan(engine, positions), s.view(), threads), want), "the same bits as scalar");
                }
            }
        }
    }
}

void narrow_plans(Random& random) {
    Small small(random);
    for (const Float type : TYPES) {
        small.shorten(type, random);
        for (const int64_t longest : {1, 9, 70, 200}) {
            if (once && longest != 9) continue;
            const int64_t count = 4;
            Exact states(count * longest * HIDDEN, size_of(type));
            for (int64_t i = 0; i < count * longest * HIDDEN; i++) put(states.data(), i, random.bell(), type);
            std::vector<int64_t> mask(size_t(count * longest), 0), lengths;
            for (int64_t i = 0; i < count; i++) {
                lengths.push_back(i == 1 ? longest : random.between(1, longest));
                // Padding before the first, behind the others.
                const int64_t first = i ? 0 : longest - lengths[i];
                for (int64_t j = 0; j < lengths[i]; j++) mask[i * longest + first + j] = 1;
            }
            const Batch batch{nullptr, mask.data(), nullptr, nullptr, states.data(), count, longest};
            std::snprintf(subject, sizeof subject, "plan of states: %s, up to %d", TYPE_NAMES[int(type)], int(longest));
            const Plan scalar = small.narrow(scalar_engine(), type);
            const std::vector<double> want = run(scalar, batch, 1);
            bool finite = true;
            for (const double value : want) finite = finite && std::isfinite(value);
            check(finite, "all are numbers");
            for (int64_t i = 1; i < count; i++) {
                const void* own = states.data() + i * longest * HIDDEN * size_of(type);
                const Batch alone{nullptr, nullptr, nullptr, nullptr, own, 1, lengths[i]};
                const auto begin = want.begin() + i * longest * HIDDEN;
                check(equal(run(scalar, alone, 1), {begin, begin + lengths[i] * HIDDEN}), "the same bits alone");
            }
            for (const Engine& engine : engines()) {
                for (int threads = 1; threads <= 3; threads++) {
                    std::snprintf(subject, sizeof subject, "plan of states: %s, %s, up to %d, %d threads", engine.isa,
                                  TYPE_NAMES[int(type)], int(longest), threads);
                    check(equal(run(small.narrow(engine, type), batch, threads), want), "the same bits as scalar");
                }
            }
            if (longest < 3) continue;
            std::fill(mask.begin(), mask.end(), 1);
            mask[1] = 0;
            check(run(scalar, batch, 1).empty(), "a hole is refused where distances count");
        }
    }
}

// A thread that cannot go on ends the call, and not the process.
void failures_of_threads(Random& random) {
    const Small small(random);
    Engine broken = scalar_engine();
    broken.norm = [](const Norm&) { throw std::bad_alloc(); };
    Sentences s(8, 60);
    std::fill(s.mask.begin(), s.mask.end(), 1);
    for (int threads = 1; threads <= 3; threads++) {
        std::snprintf(subject, sizeof subject, "plan: no memory in one of %d threads", threads);
        bool thrown = false;
        try {
            run(small.plan(broken, {false, 0}), s.view(), threads);
        } catch (const std::bad_alloc&) {
            thrown = true;
        }
        check(thrown, "the call throws");
        check(run(small.plan(scalar_engine(), {false, 0}), s.view(), threads).size() > 0, "and the next one does not");
    }
}

void refusals(Random& random) {
    const Small small(random);
    const auto message = [&](int64_t id, int64_t type, int64_t position) {
        Sentences s(2, 3);
        std::vector<int64_t> places(6, 0);
        s.ids[4] = id, s.types[4] = type, places[4] = position;
        Batch batch = s.view();
        batch.positions = places.data();
        try {
            run(small.plan(engines().first[0], {false, 0}), batch, 2);
        } catch (const std::out_of_range& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    std::snprintf(subject, sizeof subject, "plan: what is no row");
    check(message(0, 0, 0).empty() && message(WORDS - 1, 1, PLACES - 1).empty(), "all rows are there");
    check(message(WORDS, 0, 0) == "id 40 at [1, 1]: the table has 40 rows", "an id, though hidden");
    check(message(-1, 0, 0) == "id -1 at [1, 1]: the table has 40 rows", "a negative id");
    check(message(0, 2, 0) == "token type 2 at [1, 1]: the table has 2 rows", "a type");
    check(message(0, 0, PLACES) == "position 400 at [1, 1]: the table has 400 rows", "a position");
}

void arenas() {
    std::snprintf(subject, sizeof subject, "arenas");
    release_arenas();
    float* first;
    {
        const Arena arena(100);
        first = arena.data();
    }
    {
        const Arena again(90), other(100);
        check(again.data() == first && other.data() != first, "what was given back is lent again, and to one only");
    }
    { const Arena larger(200); }
    check(release_arenas() == (100 + 200) * 4, "what is kept is told, of which the larger one took a smaller one's place");
    check(release_arenas() == 0, "and is gone");
    { const Arena large(ARENA_KEPT_BYTES / 4 + 1); }
    check(release_arenas() == 0, "nothing above the bound is kept");
}

}  // namespace

void spicerack::test_plan(Random& random) {
    norms(random);
    plans(random);
    narrow_plans(random);
    failures_of_threads(random);
    refusals(random);
    arenas();
}
