// Products with weights that stayed float against float64, element by element; all engines and numbers of threads give the
// same bits, and so does a row alone.
#include "support.h"

using namespace spicerack;

namespace {

Exact numbers(int64_t count, Float type, Random& random) {
    Exact memory(count, size_of(type));
    for (int64_t i = 0; i < count; i++) put(memory.data(), i, random.bell(), type);
    return memory;
}

struct Case {
    int64_t m, n, k;
    Float type;
    bool bias, gelu;
};

struct Inputs {
    Exact x, weights, bias;
    Case c;
};

// Rows first .. first + count - 1 of y.
std::vector<double> run(const Engine& engine, const Inputs& in, int64_t first, int64_t count, int threads) {
    const Case& c = in.c;
    Exact y(count * c.n, sizeof(float));
    engine.dense({(const float*)in.x.data() + first * c.k, in.weights.data(), c.type,
                  c.bias ? (const float*)in.bias.data() : nullptr, (float*)y.data(), count, c.n, c.k, c.gelu, threads});
    std::vector<double> values;
    for (int64_t i = 0; i < count * c.n; i++) values.push_back(get(y.data(), i, Float::f32));
    return values;
}

void check_right(const Inputs& in, const std::vector<double>& y) {
    const Case& c = in.c;
    bool right = true;
    for (int64_t i = 0; i < c.m * c.n; i++) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < c.k; k++) {
            const double term = get(in.x.data(), i / c.n * c.k + k, Float::f32) * get(in.weights.data(), i % c.n * c.k + k, c.type);
            sum += term;
            magnitude += std::fabs(term);
        }
        if (c.bias) sum += get(in.bias.data(), i % c.n, Float::f32);
        double bound = 0x1p-24 * (double(c.k) + 2) * (magnitude + std::fabs(sum));
        if (c.gelu) {
            sum *= std::erfc(-sum / std::sqrt(2.0)) / 2;
            bound = 1.2 * bound + 4e-7 * (1 + std::fabs(sum));  // the steepest slope, and its own
        }
        right = right && std::fabs(y[i] - sum) <= bound;
    }
    check(right, "y is within the bound");
}

void check_case(const Case& c, Random& random) {
    Inputs in{numbers(c.m * c.k, Float::f32, random), numbers(c.n * c.k, c.type, random), numbers(c.n, Float::f32, random), c};
    const auto name = [&](const char* isa, int threads) {
        std::snprintf(subject, sizeof subject, "dense: %s, %d x %d x %d, %s%s%s, %d threads", isa, int(c.m), int(c.n), int(c.k),
                      TYPE_NAMES[int(c.type)], c.bias ? ", bias" : "", c.gelu ? ", GELU" : "", threads);
    };
    name("scalar", 1);
    const std::vector<double> want = run(scalar_engine(), in, 0, c.m, 1);
    check_right(in, want);
    const int64_t row = random.below(c.m);
    const std::vector<double> own(want.begin() + row * c.n, want.begin() + (row + 1) * c.n);
    for (const Engine& engine : engines()) {
        for (int threads = 1; threads <= 3; threads++) {
            name(engine.isa, threads);
            check(equal(run(engine, in, 0, c.m, threads), want), "the same bits as scalar");
            check(equal(run(engine, in, row, 1, threads), own), "a row alone");
        }
    }
    put(in.x.data(), row * c.k, NAN, Float::f32);
    const std::vector<double> wild = run(engines().first[0], in, 0, c.m, 2);
    bool right = true;
    for (int64_t i = 0; i < c.m * c.n; i++) right = right && (i / c.n == row ? std::isnan(wild[i]) : same(wild[i], want[i]));
    check(right, "NaN stays in its row");
}

}  // namespace

void spicerack::test_dense(Random& random) {
    for (const int64_t k : {1, 7, 16, 40, 128, 129, 300}) {
        if (once && k != 129) continue;
        for (const Float type : TYPES) {
            check_case({random.between(1, 20), random.between(1, 140), k, type, random.below(2) != 0, random.below(2) != 0}, random);
        }
    }
    check_case({100, 70, 64, Float::f32, true, true}, random);
    check_case({230, 129, 48, Float::bf16, true, false}, random);
}
