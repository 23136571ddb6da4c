// Attention against softmax in float64, element by element; all engines and numbers of threads give the same bits.
//
// Rounding: a score is a sum of `width` products of numbers rounded once, a weight has a relative error of its score's
// absolute one and of the exponential's, and the result is a mean of values weighted so.
#include "support.h"

using namespace spicerack;

namespace {

struct Case {
    Float type;
    int64_t batch, heads, kv_heads, queries, keys, width, value_width;
    bool masked, causal;
    int64_t window = -1;
    bool biased = false;
};

// [batch, rows, heads, width], as projections make it.
struct Tensor {
    Exact memory;
    Strided strided;
    Float type;
    std::vector<double> values;

    Tensor() = default;
    Tensor(int64_t batch, int64_t rows, int64_t heads, int64_t width, Float t, Random& random)
        : memory(batch * rows * heads * width, size_of(t)), type(t), values(batch * rows * heads * width) {
        strided = {memory.data(), rows * heads * width, width, heads * width};
        for (int64_t i = 0; i < int64_t(values.size()); i++) set(i, random.bell());
    }
    void set(int64_t i, double x) {
        put(memory.data(), i, x, type);
        values[i] = get(memory.data(), i, type);
    }
    const double* row(int64_t batch, int64_t head, int64_t row) const {
        return &values[batch * strided.batch + head * strided.head + row * strided.row];
    }
};

struct Inputs {
    Tensor q, k, v;
    Exact mask;  // the same for all heads
    Exact bias;  // [heads, distances from 1 - queries on]
    Attention call{};
};

Inputs inputs(const Case& c, Random& random) {
    Inputs in;
    in.q = Tensor(c.batch, c.queries, c.heads, c.width, c.type, random);
    in.k = Tensor(c.batch, c.keys, c.kv_heads, c.width, c.type, random);
    in.v = Tensor(c.batch, c.keys, c.kv_heads, c.value_width, c.type, random);
    Attention& a = in.call;
    a.q = in.q.strided;
    a.k = in.k.strided;
    a.v = in.v.strided;
    if (c.masked) {
        in.mask = Exact(c.batch * c.queries * c.keys, 1);
        // The first query sees nothing.
        for (int64_t i = 0; i < in.mask.bytes(); i++) in.mask.data()[i] = i >= c.keys && random.below(3) != 0;
        a.mask = {in.mask.data(), c.queries * c.keys, 0, c.keys};
    }
    a.type = c.type;
    a.batch = c.batch, a.heads = c.heads, a.kv_heads = c.kv_heads;
    a.queries = c.queries, a.keys = c.keys, a.width = c.width, a.value_width = c.value_width;
    a.causal = c.causal;
    a.scale = 0.3f;
    a.window = c.window;
    if (c.biased) {
        a.bias_head = c.queries - 1 + c.keys + 15;
        in.bias = Exact(c.heads * a.bias_head, sizeof(float));
        for (int64_t i = 0; i < c.heads * a.bias_head; i++) put(in.bias.data(), i, random.bell(), Float::f32);
        a.bias = (const float*)in.bias.data() + c.queries - 1;
    }
    return in;
}

std::vector<double> run(const Engine& engine, const Inputs& in, int threads) {
    Attention call = in.call;
    const int64_t count = call.batch * call.queries * call.heads * call.value_width;
    Exact y(count, size_of(call.type));
    call.y = y.data();
    engine.attention(&call, 1, threads);
    std::vector<double> values(count);
    for (int64_t i = 0; i < count; i++) values[i] = get(y.data(), i, call.type);
    return values;
}

// exp(score - largest) for each key that one query of one head sees, else 0; and the rounding steps of its largest
// score.
struct Scored {
    std::vector<double> weights;
    double steps = 0, total = 0;
};

Scored scored(const Inputs& in, int64_t batch, int64_t head, int64_t query) {
    const Attention& a = in.call;
    const int64_t shared = head / (a.heads / a.kv_heads);
    const uint8_t* mask = (const uint8_t*)a.mask.data;
    Scored s{std::vector<double>(a.keys)};
    for (int64_t key = 0; key < a.keys; key++) {
        const double *q = in.q.row(batch, head, query), *k = in.k.row(batch, shared, key);
        const bool hidden = (mask && !mask[batch * a.mask.batch + query * a.mask.row + key]) ||
                            (a.causal && key > query) || (a.window >= 0 && std::abs(key - query) > a.window);
        double score = 0, magnitude = 0;
        for (int64_t column = 0; column < a.width; column++) {
            const double term = q[column] * k[column] * double(a.scale);
            score += term;
            magnitude += std::fabs(term);
        }
        if (a.bias) {
            const double bias = get(in.bias.data(), head * a.bias_head + a.queries - 1 + key - query, Float::f32);
            score += bias;
            magnitude += std::fabs(bias);
        }
        s.steps = std::max(s.steps, (double(a.width) + 4) * magnitude);
        s.weights[key] = hidden ? -INFINITY : score;
    }
    const double largest = *std::max_element(s.weights.begin(), s.weights.end());
    for (double& w : s.weights) s.total += w = largest == -INFINITY ? 0 : std::exp(w - largest);
    return s;
}

// Of long calls some rows, the first and the last among them: emulators and sanitizers take minutes for all.
void check_right(const Inputs& in, const std::vector<double>& y) {
    const Attention& a = in.call;
    const int64_t last = a.batch * a.queries * a.heads - 1, checked = std::min<int64_t>(last, 40);
    for (int64_t turn = 0; turn <= checked; turn++) {
        const int64_t i = checked ? last * turn / checked : 0;
        const int64_t head = i % a.heads, query = i / a.heads % a.queries, batch = i / a.heads / a.queries;
        const int64_t shared = head / (a.heads / a.kv_heads);
        const Scored s = scored(in, batch, head, query);
        bool right = true;
        for (int64_t column = 0; column < a.value_width; column++) {
            double sum = 0, magnitude = 0;
            for (int64_t key = 0; key < a.keys; key++) {
                const double term = s.weights[key] * in.v.row(batch, shared, key)[column];
                sum += term;
                magnitude += std::fabs(term);
            }
            const double exact = s.total ? sum / s.total : 0;
            const double bound = s.total ? magnitude / s.total * 0x1p-24 * (4 * s.steps + double(a.keys) + 16) : 0;
            const double got = y[i * a.value_width + column];
            right = right && rounded(exact - bound, a.type) <= got && got <= rounded(exact + bound, a.type);
        }
        check(right, "y is within the bound");
    }
}

void check_case(const Case& c, Random& random) {
    const Inputs in = inputs(c, random);
    const auto name = [&](const char* isa, int threads) {
        std::snprintf(subject, sizeof subject,
                      "attention: %s, %s, heads %d over %d, %d queries, %d keys, widths %d, %d%s%s%s, window %d, %d threads", isa,
                      TYPE_NAMES[int(c.type)], int(c.heads), int(c.kv_heads), int(c.queries), int(c.keys), int(c.width),
                      int(c.value_width), c.masked ? ", masked" : "", c.causal ? ", causal" : "",
                      c.biased ? ", biased" : "", int(c.window), threads);
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

}  // namespace

void spicerack::test_attention(Random& random) {
    for (const int64_t count : {1, 15, 16, 17, 64, 127, 128, 129, 300}) {
        if (once && count != 17 && count != 129) continue;
        for (int kind = 0; kind < 3; kind++) {
            const bool causal = kind == 1, large = causal && count > 64;
            const int64_t kv_heads = random.between(1, 2), heads = kv_heads * (large ? 1 : random.between(1, 3));
            const int64_t batch = large ? 1 : random.between(1, 2), widest = large ? 2 : 6;
            check_case({TYPES[random.below(3)], batch, heads, kv_heads, causal ? count : random.between(1, 9), count,
                        16 * random.between(1, widest), 16 * random.between(1, widest), kind == 2, causal}, random);
        }
    }
    // Windows and biases, by one block of keys and by several.
    for (const int64_t count : {1, 17, 129, 300}) {
        if (once && count != 129) continue;
        for (const int64_t window : {-1, 0, 5, 64, 200}) {
            if (once && window != 5) continue;
            for (int kind = 0; kind < 4; kind++) {
                const bool biased = kind & 1, causal = kind & 2;
                if ((window < 0 && !biased) || (count == 300 && kind % 3)) continue;
                const int64_t kv_heads = random.between(1, 2);
                check_case({TYPES[random.below(3)], 1, kv_heads * random.between(1, 2), kv_heads, count, count, 16, 32,
                            window == 5, causal, window, biased}, random);
            }
        }
    }
    // Calls of several shapes at once are what each of them is.
    std::vector<Inputs> several;
    for (const int64_t count : {3, 130, 17, 17, 1}) {
        several.push_back(inputs({Float::f32, random.between(1, 2), 4, 2, count, count, 32, 16, false, false}, random));
    }
    for (const Engine& engine : engines()) {
        std::vector<std::vector<double>> wanted;
        for (const Inputs& in : several) wanted.push_back(run(engine, in, 1));
        for (int threads = 1; threads <= 3; threads++) {
            std::snprintf(subject, sizeof subject, "attention: several, %s, %d threads", engine.isa, threads);
            std::vector<Attention> calls;
            std::vector<Exact> results;
            for (const Inputs& in : several) {
                results.emplace_back(in.call.batch * in.call.queries * in.call.heads * in.call.value_width, 4);
                calls.push_back(in.call);
                calls.back().y = results.back().data();
            }
            engine.attention(calls.data(), int64_t(calls.size()), threads);
            for (size_t i = 0; i < several.size(); i++) {
                std::vector<double> values;
                for (size_t j = 0; j < wanted[i].size(); j++) {
                    values.push_back(get(results[i].data(), int64_t(j), Float::f32));
                }
                check(equal(values, wanted[i]), "as one by one");
            }
            engine.attention(nullptr, 0, threads);
        }
    }
    // A NaN reaches the queries that see its key, and them alone.
    const Case c{Float::f32, 1, 2, 1, 40, 40, 32, 16, false, true};
    Inputs in = inputs(c, random);
    in.k.set(20 * c.width + 3, NAN);
    for (const Engine& engine : engines()) {
        std::snprintf(subject, sizeof subject, "attention: a NaN, %s", engine.isa);
        const std::vector<double> y = run(engine, in, 2);
        bool right = true;
        const int64_t row = c.heads * c.value_width;
        for (int64_t i = 0; i < int64_t(y.size()); i++) right &= std::isnan(y[i]) == (i / row >= 20);
        check(right, "where it is seen");
    }
}
