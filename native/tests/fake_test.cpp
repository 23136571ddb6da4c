// Fake quantization against the formula, value by value: the same bits on every instruction set, sums to a bound.
#include "../quantizers/dispatch.h"
#include "support.h"

using namespace spicerack;

namespace {

struct Case {
    Float type, grad_type, out_type;
    int64_t n, k, rows, columns;
    Levels levels;  // zero: groups have zero points
    bool cells;
};

struct Inputs {
    Exact w, grad, scale, zero;
    Fake fake{};
};

Inputs inputs(const Case& c, Random& random) {
    const int64_t groups = c.n / c.rows * (c.k / c.columns);
    Inputs in{Exact(c.n * c.k, size_of(c.type)), Exact(c.n * c.k, size_of(c.grad_type)), Exact(groups, 4), Exact(groups, 4)};
    for (int64_t i = 0; i < c.n * c.k; i++) {
        put(in.w.data(), i, random.bell(), c.type);
        put(in.grad.data(), i, random.bell(), c.grad_type);
    }
    const double odd[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e9, -1e9, 0.25};
    for (const double x : odd) put(in.w.data(), random.below(c.n * c.k), x, c.type);
    for (int64_t i = 0; i < groups; i++) {
        put(in.scale.data(), i, (random.below(2) ? 1 : -1) * (0.05 + 0.3 * random.unit()), Float::f32);
        put(in.zero.data(), i, double(random.between(c.levels.lo, c.levels.hi)), Float::f32);
    }
    put(in.scale.data(), 0, 0.5, Float::f32);  // places in the middle between levels
    in.fake = {in.w.data(), c.type, c.n, c.k, c.rows, c.columns, (const float*)in.scale.data(),
               c.levels.zero ? (const float*)in.zero.data() : nullptr, c.levels};
    return in;
}

struct Results {
    std::vector<double> rounded, rounded_again, by_weight, by_scale, by_zero;
};

std::vector<double> values(const Exact& memory, int64_t count, Float type) {
    std::vector<double> all(count);
    for (int64_t i = 0; i < count; i++) all[i] = get(memory.data(), i, type);
    return all;
}

// `pieces` calls share the rows. A gradient in float32 is overwritten by that of the weights.
Results run(const Quantizers& q, const Case& c, const Inputs& in, int64_t pieces) {
    const int64_t count = c.n * c.k, segments = c.n * in.fake.across();
    const Exact out(count, size_of(c.out_type)), again(count, size_of(c.out_type)), grad(count, size_of(c.grad_type)),
        apart(count, 4);
    std::memcpy(grad.data(), in.grad.data(), grad.bytes());
    const Exact& by_weight = c.grad_type == Float::f32 ? grad : apart;
    std::vector<double> by_scale(segments), by_zero(segments);
    const Slopes slopes{grad.data(), c.grad_type, c.cells, (float*)by_weight.data(), by_scale.data(), by_zero.data(),
                        again.data(), c.out_type};
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t first = c.n * piece / pieces, last = c.n * (piece + 1) / pieces;
        q.fake(in.fake, first, last, out.data(), c.out_type);
        q.fake_gradients(in.fake, slopes, first, last);
    }
    return {values(out, count, c.out_type), values(again, count, c.out_type), values(by_weight, count, Float::f32),
            by_scale, by_zero};
}

void check_right(const Case& c, const Inputs& in, const Results& results) {
    bool rounded_right = true, weights_right = true, sums_right = true;
    for (int64_t row = 0; row < c.n; row++) {
        for (int64_t b = 0; b < in.fake.across(); b++) {
            const int64_t group = row / c.rows * in.fake.across() + b;
            const float scale = in.fake.scale[group];
            const float zero = in.fake.zero ? in.fake.zero[group] : c.levels.half ? -0.5f : 0.0f;
            const bool shifted = in.fake.zero || c.levels.half;
            double by_scale = 0, by_zero = 0, slopes = 0, grads = 0;
            for (int64_t i = row * c.k + b * c.columns; i < row * c.k + (b + 1) * c.columns; i++) {
                const float w = float(get(in.w.data(), i, c.type)), g = float(get(in.grad.data(), i, c.grad_type));
                float u = w * (1.0f / scale);
                if (shifted) u += zero;
                float q = std::nearbyint(u);
                if (q < c.levels.lo) q = c.levels.lo;
                if (q > c.levels.hi) q = c.levels.hi;
                const bool inside = c.cells ? std::fabs(q - u) <= 0.5f : u >= c.levels.lo && u <= c.levels.hi;
                const float kept = g * float(inside), slope = (q - (inside ? u : zero)) * g;
                const float value = (shifted ? q - zero : q) * scale;
                rounded_right &= same(results.rounded[i], rounded(value, c.out_type));
                weights_right &= same(results.by_weight[i], kept);
                by_scale += slope, slopes += std::fabs(slope), by_zero += kept - g, grads += std::fabs(g);
            }
            const double unit = 0x1p-24 * 70;  // 64 values in each of the sums side by side, and their own sum
            const double ours = results.by_scale[row * in.fake.across() + b];
            sums_right &= std::isnan(by_scale) ? std::isnan(ours) : std::fabs(ours - by_scale) <= slopes * unit;
            sums_right &= std::fabs(results.by_zero[row * in.fake.across() + b] - by_zero) <= grads * unit;
        }
    }
    check(rounded_right && equal(results.rounded, results.rounded_again), "rounded weights");
    check(weights_right, "gradients of weights");
    check(sums_right, "sums over groups");
}

void check_case(const Case& c, Random& random) {
    const Inputs in = inputs(c, random);
    const Results want = run(quantizers().back(), c, in, 1);
    for (const Quantizers& q : quantizers()) {
        std::snprintf(subject, sizeof subject, "fake: %s, %s, grad %s, out %s, %d x %d in %d x %d, levels %d..%d%s%s%s", q.isa,
                      TYPE_NAMES[int(c.type)], TYPE_NAMES[int(c.grad_type)], TYPE_NAMES[int(c.out_type)], int(c.n),
                      int(c.k), int(c.rows), int(c.columns), c.levels.lo, c.levels.hi, c.levels.half ? ", half" : "",
                      c.levels.zero ? ", zero" : "", c.cells ? ", cells" : "");
        const Results results = run(q, c, in, random.between(1, 3));
        check_right(c, in, results);
        check(equal(results.by_scale, want.by_scale) && equal(results.by_zero, want.by_zero), "the same sums as baseline");
    }
}

}  // namespace

void spicerack::test_fake(Random& random) {
    const Levels grids[] = {{-8, 7, false, false}, {0, 15, false, true}, {-2, 1, true, false}, {-1, 1, false, false},
                            {-128, 127, false, true}};
    const int64_t widths[] = {1, 3, 8, 15, 16, 17, 32, 33, 64, 1023, 1024, 1025, 2100};
    for (const int64_t columns : widths) {
        if (once && columns != 17 && columns != 1025) continue;
        for (const Levels& levels : grids) {
            const int64_t rows = random.between(1, 3);
            check_case({TYPES[random.below(3)], TYPES[random.below(3)], TYPES[random.below(3)], rows * random.between(1, 4),
                        columns * random.between(1, 3), rows, columns, levels, random.below(2) == 1},
                       random);
            check_case({Float::f32, Float::f32, Float::f32, rows * 2, columns, rows, columns, levels, true}, random);
        }
    }
}
