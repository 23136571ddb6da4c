// What the tests of products share: matrices and inputs, an engine's results, and what they must be (exact.cpp).
#pragma once

#include <functional>

#include "support.h"

#include "../kernels/layout.h"

namespace spicerack {

// ---- matrices and inputs --------------------------------------------------------------------------------------------

enum Kind { symmetric, zeros, halves, both, KINDS };

struct Form {
    int64_t n, k, group;
    int bits;
    Kind kind;
    Float scale_type;
    bool tensor;  // one scale for all
    bool powers;  // scales are powers of two
    int offset = -1;  // -1: one of those in use
    bool minima = false;
    ScaleType bytes = ScaleType::f32;  // int8 or e4m3: what outer scales multiply, which are of scale_type
    int64_t block = 0;
};

// A packed matrix, and the numbers that it holds.
struct Matrix {
    Weights weights{};
    std::vector<double> levels;  // [N, K]: codes minus their zero points, plus 1/2 if they are halves
    std::vector<double> scale, minima;  // [N, groups], as float32; minima may be empty
    Exact tiles, scales, outer, zero;

    int64_t columns() const { return weights.group == 0 ? weights.k : weights.group; }
    double scale_of(int64_t n, int64_t k) const { return scale[n * weights.groups() + k / columns()]; }
    double minimum_of(int64_t n, int64_t k) const {
        return weights.minima ? minima[n * weights.groups() + k / columns()] : 0;
    }
    double level(int64_t n, int64_t k) const { return levels[n * weights.k + k]; }
};

// codes(n, k) gives any integer, of which the codes are remainders; left out, codes are random.
Matrix make(const Form& form, Random& random, const std::function<int64_t(int64_t, int64_t)>& codes);
Matrix make(const Form& form, Random& random);

// x [M, K].
struct Input {
    int64_t m, k;
    Float type;
    Exact memory;
    std::vector<double> values;
    double at(int64_t row, int64_t column) const { return values[row * k + column]; }
    void set(int64_t row, int64_t column, double value) {
        put(memory.data(), row * k + column, value, type);
        values[row * k + column] = get(memory.data(), row * k + column, type);
    }
};

Input input(int64_t m, int64_t k, Float type, const std::function<double(int64_t, int64_t)>& values);

enum Spread { plain, outliers, integers, extremes, nothing, SPREADS };
Input input(int64_t m, int64_t k, Float type, Spread spread, Random& random);

Exact bias_of(int64_t n, Float type, Random& random);

// ---- running --------------------------------------------------------------------------------------------------------

struct Output {
    Exact y;
    std::vector<double> values;  // [M, N]
};

struct Setting {
    Activations how;
    float fixed_scale = 0;
    int threads = 1;
    bool gelu = false;
};

std::vector<Output> run(const Engine& engine, const Input& x, const std::vector<const Matrix*>& matrices,
                        const std::vector<const Exact*>& biases, const Setting& setting);
Output run(const Engine& engine, const Input& x, const Matrix& matrix, const Exact* bias, const Setting& setting);

// The subject of the checks that follow.
void name(const char* test, const Matrix& matrix, const Input& x, const Setting& setting, const char* isa = "scalar");

// y is within the bound of exact.cpp.
void check_right(const Matrix& matrix, const Input& x, const Exact* bias, const Setting& setting,
                 const std::vector<double>& y);

// The scalar engine is right, and all others give its bits, which are returned.
std::vector<double> check_engines(const char* test, const Matrix& matrix, const Input& x, const Exact* bias,
                                  const Setting& setting);

// A row's result does not depend on the rows beside it: some row of x alone, on some engine, gives its part of y.
void check_one_row(const Matrix& matrix, const Input& x, const Exact* bias, const Setting& setting,
                   const std::vector<double>& y, Random& random);

// ---- families -------------------------------------------------------------------------------------------------------

const int64_t GROUPS[] = {0, 32, 64, 128};
const Activations HOWS[] = {Activations::floats, Activations::spans, Activations::tokens, Activations::fixed};

// body(bits, group, kind, how) for every width, group, kind of levels and activations: every body is in one of them.
template <class Body>
void for_each_family(const Body& body) {
    for (int bits = TRITS; bits <= 8; bits++) {
        for (const int64_t group : GROUPS) {
            for (int kind = 0; kind < (bits == TRITS ? zeros : KINDS); kind++) {
                for (const Activations how : HOWS) body(bits, group, Kind(kind), how);
            }
        }
    }
}

}  // namespace spicerack
