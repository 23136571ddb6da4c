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
};

struct Inputs {
    Exact q, k, v, mask;
    Attention call{};
};

// Memory as [batch, rows, heads, width], as projections make it; masks the same for all heads.
Strided placed(const Exact& memory, int64_t rows, int64_t heads, int64_t width) {
    return {memory.data(), rows * heads * width, width, heads * width};
}

Inputs made(const Case& c, Random& random) {
    const int size = size_of(c.type);
    Inputs in;
    const auto fill = [&](int64_t rows, int64_t heads, int64_t width) {
        Exact memory(c.batch * rows * heads * width, size);
        for (int64_t i = 0; i < c.batch * rows * heads * width; i++) put(memory.data(), i, random.bell(), c.type);
        return memory;
    };
    in.q = fill(c.queries, c.heads, c.width);
    in.k = fill(c.keys, c.kv_heads, c.width);
    in.v = fill(c.keys, c.kv_heads, c.value_width);
    Attention& a = in.call;
    a.q = placed(in.q, c.queries, c.heads, c.width);
    a.k = placed(in.k, c.keys, c.kv_heads, c.width);
    a.v = placed(in.v, c.keys, c.kv_heads, c.value_width);
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
    return in;
}

std::vector<double> run(const Engine& engine, const Inputs& in, int threads) {
    Attention call = in.call;
    const int64_t count = call.batch * call.queries * call.heads * call.value_width;
    Exact y(count, size_of(call.type));
    call.y = y.data();
    call.threads = threads;
    engine.attention(call);
    std::vector<double> values(count);
    for (int64_t i = 0; i < count; i++) values[i] = get(y.data(), i, call.type);
    return values;
}

double value(const Strided& t, Float type, int64_t batch, int64_t head, int64_t row, int64_t column) {
    return get(t.data, batch * t.batch + head * t.head + row * t.row + column, type);
}

// Of long calls some rows, the first and the last among them: emulators and sanitizers take minutes for all.
void check_right(const Inputs& in, const std::vector<double>& y) {
    const Attention& a = in.call;
    std::vector<double> weights(a.keys);
    const int64_t last = a.batch * a.queries * a.heads - 1, checked = std::min<int64_t>(last, 40);
    for (int64_t turn = 0; turn <= checked; turn++) {
        const int64_t i = checked ? last * turn / checked : 0;
        const int64_t head = i % a.heads, query = i / a.heads % a.queries, batch = i / a.heads / a.queries;
        const int64_t shared = head / (a.heads / a.kv_heads);
        double largest = -INFINITY, total = 0, steps = 0;
        for (int64_t key = 0; key < a.keys; key++) {
            const uint8_t* mask = (const uint8_t*)a.mask.data;
            const bool seen = (!mask || mask[batch * a.mask.batch + query * a.mask.row + key]) && (!a.causal || key <= query);
            double score = 0, magnitude = 0;
            for (int64_t column = 0; column < a.width; column++) {
                const double term = value(a.q, a.type, batch, head, query, column) *
                                    value(a.k, a.type, batch, shared, key, column) * double(a.scale);
                score += term;
                magnitude += std::fabs(term);
            }
            steps = std::max(steps, (double(a.width) + 4) * magnitude);
            weights[key] = seen ? score : -INFINITY;
            largest = std::max(largest, weights[key]);
        }
        for (double& w : weights) total += w = largest == -INFINITY ? 0 : std::exp(w - largest);
        bool right = true;
        for (int64_t column = 0; column < a.value_width; column++) {
            double sum = 0, magnitude = 0;
            for (int64_t key = 0; key < a.keys; key++) {
                const double term = weights[key] * value(a.v, a.type, batch, shared, key, column);
                sum += term;
                magnitude += std::fabs(term);
            }
            const double exact = total ? sum / total : 0;
            const double bound = total ? magnitude / total * 0x1p-24 * (4 * steps + double(a.keys) + 16) : 0;
            const double got = y[i * a.value_width + column];
            right = right && rounded(exact - bound, a.type) <= got && got <= rounded(exact + bound, a.type);
        }
        check(right, "y is within the bound");
    }
}

void check_case(const Case& c, Random& random) {
    const Inputs in = made(c, random);
    const auto name = [&](const char* isa, int threads) {
        std::snprintf(subject, sizeof subject, "attention: %s, %s, heads %d over %d, %d queries, %d keys, widths %d, %d%s%s, %d threads",
                      isa, TYPE_NAMES[int(c.type)], int(c.heads), int(c.kv_heads), int(c.queries), int(c.keys),
                      int(c.width), int(c.value_width), c.masked ? ", masked" : "", c.causal ? ", causal" : "", threads);
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
    const int64_t keys[] = {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300};
    for (const int64_t count : keys) {
        for (int kind = 0; kind < 4; kind++) {
            const bool causal = kind % 2, large = causal && count > 64;
            const int64_t kv_heads = random.between(1, 2), heads = kv_heads * (large ? 1 : random.between(1, 3));
            const int64_t batch = large ? 1 : random.between(1, 2), widest = large ? 2 : 6;
            check_case({TYPES[random.below(3)], batch, heads, kv_heads, causal ? count : random.between(1, 9), count,
                        16 * random.between(1, widest), 16 * random.between(1, widest), kind == 2, causal}, random);
        }
    }
    // A NaN reaches the queries that see its key, and them alone.
    const Case c{Float::f32, 1, 2, 1, 40, 40, 32, 16, false, true};
    Inputs in = made(c, random);
    put(in.k.data(), 20 * c.width + 3, NAN, c.type);
    for (const Engine& engine : engines()) {
        std::snprintf(subject, sizeof subject, "attention: a NaN, %s", engine.isa);
        const std::vector<double> y = run(engine, in, 2);
        bool right = true;
        for (int64_t i = 0; i < int64_t(y.size()); i++) right &= std::isnan(y[i]) == (i / (c.heads * c.value_width) >= 20);
        check(right, "where it is seen");
    }
}
