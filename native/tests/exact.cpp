// What a product must be: a plain triple loop in float64, over activations that are quantized here once more.
//
//     |y - exact| <= (steps * 2^-24) * sum of |terms|,   then rounded to y's type
//
// int8 activations: the terms are scale * scale * exact integer sum, one for each span of 32 columns (one for each
// group where a whole row has one scale); float activations: the products. `steps` is how often a term and the sums
// that it is in are rounded to float32. Where scales are powers of two and sums are below 2^24 no rounding is left: y
// must be exact.
#include "products.h"

namespace spicerack {
namespace {

// x as the kernels multiply it: code * scale[k / 32].
struct Quantized {
    std::vector<double> codes, scale;
};

constexpr double NEARLY_NOTHING = 0x1p-100;

// Nearest codes, half to even, in float32; the scale is the largest magnitude over 127, unless given.
Quantized quantize(const Input& x, int64_t row, Activations how, float fixed_scale) {
    Quantized q;
    const int64_t part = how == Activations::spans ? TILE : x.k;
    for (int64_t begin = 0; begin < x.k; begin += part) {
        const int64_t end = std::min(begin + part, x.k);
        float most = 0;
        for (int64_t k = begin; k < end; k++) most = std::max(most, std::fabs(float(x.at(row, k))));
        float scale = most < NEARLY_NOTHING ? 0.0f : most / 127.0f;
        if (how == Activations::fixed) scale = fixed_scale;
        const float inverse = scale == 0 ? 0.0f : 1.0f / scale;
        for (int64_t k = begin; k < end; k++) {
            const float u = how == Activations::fixed ? float(x.at(row, k)) / scale : float(x.at(row, k)) * inverse;
            q.codes.push_back(std::nearbyint(std::min(std::max(u, -127.0f), 127.0f)));
            if (k % TILE == 0) q.scale.push_back(scale);
        }
    }
    return q;
}

// int8 cannot hold what is not.
bool finite(const Input& x, int64_t row) {
    bool all = true;
    for (int64_t k = 0; k < x.k; k++) all = all && std::isfinite(x.at(row, k));
    return all;
}

struct Exactly {
    double value, bound;
};

// What is added up for one element of y: its value, the sum of the terms' magnitudes, and whether no scale rounds
// anything.
struct Terms {
    double value = 0, magnitudes = 0;
    bool exact_scales = true;
};

Terms terms_of_floats(const Matrix& m, const Input& x, int64_t row, int64_t n) {
    Terms t;
    for (int64_t k = 0; k < x.k; k++) {
        const double term = x.at(row, k) * m.level(n, k) * m.scale_of(n, k);
        t.value += term;
        t.magnitudes += std::fabs(term);
        if (!m.weights.minima) continue;
        t.value += x.at(row, k) * m.minimum_of(n, k);
        t.magnitudes += std::fabs(x.at(row, k) * m.minimum_of(n, k));
    }
    t.exact_scales = false;
    return t;
}

// Parts of a row are what one product of scales belongs to.
Terms terms_of_codes(const Matrix& m, int64_t n, Activations how, const Quantized& q) {
    const int64_t columns = m.weights.k;
    const bool blocks = m.weights.in_blocks();
    const int64_t part = how == Activations::spans || blocks ? std::min<int64_t>(m.columns(), TILE) : m.columns();
    Terms t;
    t.exact_scales = !blocks;
    for (int64_t begin = 0; begin < columns; begin += part) {
        const double scale = q.scale[begin / TILE] * m.scale_of(n, begin);
        double sum = 0, spans = 0, all = 0;
        for (int64_t at = begin; at < std::min(begin + part, columns); at += TILE) {
            double span = 0;
            for (int64_t k = at; k < std::min({at + TILE, begin + part, columns}); k++) {
                span += m.level(n, k) * q.codes[k];
                all += q.codes[k];
            }
            sum += span;
            spans += std::fabs(span);
        }
        const double low = all * q.scale[begin / TILE] * m.minimum_of(n, begin);
        t.value += low;
        t.magnitudes += std::fabs(low);
        // A group's sum is of spans, each rounded to float32; a whole row's is of integers.
        t.magnitudes += (m.weights.group == 0 ? std::fabs(sum) : spans) * std::fabs(scale);
        t.value += sum * scale;
        int exponent;
        t.exact_scales = t.exact_scales && (scale == 0 || std::frexp(scale, &exponent) == 0.5);
    }
    return t;
}

Exactly exactly(const Matrix& m, const Input& x, int64_t row, int64_t n, Activations how, const Quantized& q,
                double bias) {
    const bool floats = how == Activations::floats;
    const Terms t = floats ? terms_of_floats(m, x, row, n) : terms_of_codes(m, n, how, q);
    if (t.exact_scales && t.magnitudes < 0x1p20) return {t.value + bias, 0};
    // A term of a group's sum, then of the row's; times both scales; the bias.
    double steps = double(m.columns() / (floats ? 1 : TILE) + m.weights.groups() + 8);
    if (m.weights.in_blocks()) steps = double(4 * m.weights.tiles() + 16);  // of each tile's halves, scales and minima
    const double tiniest = 0x1p-140 * double(x.k);  // of subnormal numbers
    return {t.value + bias, steps * 0x1p-24 * (t.magnitudes + std::fabs(bias)) + tiniest};
}

}  // namespace

void check_right(const Matrix& m, const Input& x, const Exact* bias, const Setting& s, const std::vector<double>& y) {
    const int64_t n = m.weights.n;
    for (int64_t row = 0; row < x.m; row++) {
        const Activations how = finite(x, row) ? s.how : Activations::floats;
        Quantized q;
        if (how != Activations::floats) q = quantize(x, row, how, s.fixed_scale);
        bool right = true;
        for (int64_t i = 0; i < n; i++) {
            const double got = y[row * n + i];
            const Exactly e = exactly(m, x, row, i, how, q, bias ? get(bias->data(), i, x.type) : 0);
            if (std::isfinite(e.value)) {
                right = right && rounded(e.value - e.bound, x.type) <= got && got <= rounded(e.value + e.bound, x.type);
            } else {
                right = right && (std::isnan(e.value) ? std::isnan(got) : got == e.value);
            }
        }
        check(right, "y is within the bound");
    }
}

}  // namespace spicerack
