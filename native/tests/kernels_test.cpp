// The multiplying kernels without Python, so that sanitizers and emulators of other processors can run them.
//
// Every engine must give the scalar engine's bits. The scalar engine must equal a plain triple loop in float64 over
// activations that are quantized here once more, within a bound for each element:
//
//     |y - exact| <= (steps * 2^-24) * sum of |terms|,   then rounded to y's type
//
// int8 activations: the terms are scale * scale * exact integer sum, one for each block of 32 columns (one for each group
// where a whole row has one scale); float activations: the products. `steps` is how often a term and the sums that it is
// in are rounded to float32. Where scales are powers of two and sums are below 2^24 no rounding is left: y must be exact.
//
// All memory ends where its last value ends and begins on no more than its values' own alignment.
#include <chrono>

#include "support.h"

#include "../kernels/layout.h"

using namespace spicerack;

namespace {

// ---- matrices and inputs --------------------------------------------------------------------------------------------

enum Kind { symmetric, zeros, halves, both, KINDS };
const char* const KIND_NAMES[] = {"symmetric", "zeros", "halves", "zeros and halves"};

struct Form {
    int64_t n, k, group;
    int bits;
    Kind kind;
    Float scale_type;
    bool tensor;  // one scale for all
    bool powers;  // scales are powers of two
    int offset = -1;  // -1: one of those in use
};

struct Matrix {
    Weights weights{};
    std::vector<int> u;         // [N, K]
    std::vector<double> scale;  // [N, groups]
    std::vector<double> level0; // [N, groups]: what is subtracted from a code
    Exact tiles, scales, zero;

    int64_t columns() const { return weights.group == 0 ? weights.k : weights.group; }
    double scale_of(int64_t n, int64_t k) const { return scale[n * weights.groups() + k / columns()]; }
    double level(int64_t n, int64_t k) const { return u[n * weights.k + k] - level0[n * weights.groups() + k / columns()]; }
};

// codes(n, k) gives any integer, of which the codes are remainders.
template <class Codes>
Matrix make(const Form& f, Random& random, const Codes& codes) {
    Matrix m;
    Weights& w = m.weights;
    w.n = f.n;
    w.k = f.k;
    w.group = f.group;
    w.bits = f.bits;
    w.scale_type = f.scale_type;
    w.half = f.kind == halves || f.kind == both;
    const int offsets[] = {1 << (f.bits - 1), (1 << (f.bits - 1)) - 1, 0};
    w.offset = f.offset < 0 ? offsets[random.below(3)] : f.offset;
    const int count = f.bits == TRITS ? 3 : 1 << f.bits;
    std::vector<uint8_t> stored(f.n * f.k);
    m.u.resize(f.n * f.k);
    for (int64_t i = 0; i < f.n * f.k; i++) {
        m.u[i] = int((uint64_t(codes(i / f.k, i % f.k)) & 0xffffffffu) % count);
        stored[i] = uint8_t(m.u[i] - w.offset);
    }
    m.tiles = Exact(w.bundles() * w.blocks() * w.tile_bytes(), 1);
    pack_panels(stored.data(), f.n, f.k, f.bits, w.offset, m.tiles.data());
    std::vector<uint8_t> back(f.n * f.k);
    unpack_panels(m.tiles.data(), f.n, f.k, f.bits, w.offset, back.data());
    bool equal = true;
    for (int64_t i = 0; i < f.n * f.k; i++) equal = equal && back[i] == stored[i];
    std::snprintf(subject, sizeof subject, "packing: %d bits, N %d, K %d", f.bits, int(f.n), int(f.k));
    check(equal, "unpack_panels is the inverse of pack_panels");

    const int64_t lanes = w.panels() * w.groups() * PANEL;
    m.scales = Exact(lanes, size_of(w.scale_type));
    std::memset(m.scales.data(), 0, m.scales.bytes());
    const bool zero = f.kind == zeros || f.kind == both;
    if (zero) {
        m.zero = Exact(lanes, 1);
        std::memset(m.zero.data(), 0, m.zero.bytes());
    }
    const double first = f.powers ? 0.25 : 0.001 + 0.05 * random.unit();
    for (int64_t n = 0; n < f.n; n++) {
        for (int64_t g = 0; g < w.groups(); g++) {
            const int64_t at = (n / PANEL * w.groups() + g) * PANEL + n % PANEL;
            double s = first;
            if (!f.tensor) s = f.powers ? std::ldexp(1.0, int(random.between(-3, 2))) : first * (0.2 + random.unit());
            put(m.scales.data(), at, s, w.scale_type);
            m.scale.push_back(get(m.scales.data(), at, w.scale_type));
            int z = w.offset;
            if (zero) m.zero.data()[at] = uint8_t(z = int(random.between(0, count - 1)));
            m.level0.push_back(z - (w.half ? 0.5 : 0));
        }
    }
    w.codes = m.tiles.data();
    w.scale = m.scales.data();
    w.zero = zero ? m.zero.data() : nullptr;
    return m;
}

Matrix make(const Form& form, Random& random) {
    const int64_t mode = random.below(8);  // once in a while only the least and the greatest code
    const int64_t last = form.bits == TRITS ? 2 : (1 << form.bits) - 1;
    return make(form, random, [&](int64_t, int64_t) { return mode == 0 ? last * random.below(2) : int64_t(random.bits() >> 20); });
}

struct Input {
    int64_t m, k;
    Float type;
    Exact memory;
    double at(int64_t row, int64_t column) const { return get(memory.data(), row * k + column, type); }
};

template <class Values>
Input input(int64_t m, int64_t k, Float type, const Values& values) {
    Input x{m, k, type, Exact(m * k, size_of(type))};
    for (int64_t i = 0; i < m * k; i++) put(x.memory.data(), i, values(i / k, i % k), type);
    return x;
}

enum Spread { plain, outliers, integers, extremes, nothing, SPREADS };

Input input(int64_t m, int64_t k, Float type, Spread spread, Random& random) {
    return input(m, k, type, [&](int64_t, int64_t column) {
        switch (spread) {
            case outliers: return random.bell() * (random.below(20) == 0 ? 60 : 1);
            case integers: return column % BLOCK == 0 ? 127.0 : double(random.between(-127, 127));
            case extremes: return random.below(2) ? 3.0 : -3.0;
            case nothing: return random.below(3) ? 0.0 : (type == Float::f16 ? 0x1p-24 : 0x1p-110);
            default: return random.bell();
        }
    });
}

// ---- what is right --------------------------------------------------------------------------------------------------

// x as the kernels multiply it: code * scale[k / 32].
struct Quantized {
    std::vector<double> codes, scale;
};

constexpr double NEARLY_NOTHING = 0x1p-100;

// Nearest codes, half to even, in float32; the scale is the largest magnitude over 127, unless given.
Quantized quantize(const Input& x, int64_t row, Activations how, float fixed_scale) {
    Quantized q;
    const int64_t part = how == Activations::blocks ? BLOCK : x.k;
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
            if (k % BLOCK == 0) q.scale.push_back(scale);
        }
    }
    return q;
}

bool finite(const Input& x, int64_t row) {
    bool all = true;
    for (int64_t k = 0; k < x.k; k++) all = all && std::isfinite(x.at(row, k));
    return all;
}

struct Exactly {
    double value, bound;
};

Exactly exactly(const Matrix& m, const Input& x, int64_t row, int64_t n, Activations how, const Quantized* q, double bias) {
    const Weights& w = m.weights;
    const double rounding = 0x1p-24;
    double value = 0, terms = 0;
    bool whole = true;  // nothing is rounded
    if (how == Activations::floats) {
        for (int64_t k = 0; k < w.k; k++) {
            const double term = x.at(row, k) * m.level(n, k) * m.scale_of(n, k);
            value += term;
            terms += std::fabs(term);
        }
        whole = false;
    } else {
        const int64_t part = how != Activations::blocks ? m.columns() : BLOCK;
        for (int64_t begin = 0; begin < w.k; begin += part) {
            double sum = 0;
            for (int64_t k = begin; k < std::min(begin + part, w.k); k++) sum += m.level(n, k) * q->codes[k];
            const double scale = q->scale[begin / BLOCK] * m.scale_of(n, begin);
            int exponent;
            whole = whole && (scale == 0 || std::frexp(scale, &exponent) == 0.5);
            value += sum * scale;
            terms += std::fabs(sum * scale);
            // Of sums of several blocks with one scale a token, the blocks are the terms.
            if (how != Activations::blocks && w.group != 0) {
                terms -= std::fabs(sum * scale);
                for (int64_t at = begin; at < begin + part; at += BLOCK) {
                    double block = 0;
                    for (int64_t k = at; k < at + BLOCK; k++) block += m.level(n, k) * q->codes[k];
                    terms += std::fabs(block * scale);
                }
            }
        }
    }
    // A term of a group's sum, then of the row's; times both scales; the bias.
    const double steps = double(m.columns() / (how == Activations::floats ? 1 : BLOCK) + w.groups() + 8);
    whole = whole && terms < 0x1p20;
    const double tiniest = whole ? 0 : 0x1p-140 * double(w.k);
    return {value + bias, (whole ? 0 : steps * rounding * (terms + std::fabs(bias))) + tiniest};
}

// ---- running --------------------------------------------------------------------------------------------------------

struct Output {
    Exact y;
    std::vector<double> values;
};

struct Setting {
    Activations how;
    float fixed_scale = 0;
    int threads = 1;
    bool gelu = false;
};

std::vector<Output> run(const Engine& engine, const Input& x, const std::vector<const Matrix*>& matrices,
                        const std::vector<const Exact*>& biases, const Setting& s) {
    std::vector<Output> outputs;
    std::vector<Product> products;
    for (size_t i = 0; i < matrices.size(); i++) {
        const int64_t n = matrices[i]->weights.n;
        outputs.push_back({Exact(x.m * n, size_of(x.type)), {}});
        products.push_back({matrices[i]->weights, biases[i] ? biases[i]->data() : nullptr, outputs[i].y.data(),
                            s.gelu});
    }
    engine.linear({x.memory.data(), x.type, x.m, s.how, s.fixed_scale, products.data(), int(products.size()), s.threads});
    for (size_t i = 0; i < matrices.size(); i++) {
        for (int64_t j = 0; j < x.m * matrices[i]->weights.n; j++) {
            outputs[i].values.push_back(get(outputs[i].y.data(), j, x.type));
        }
    }
    return outputs;
}

Output run(const Engine& engine, const Input& x, const Matrix& matrix, const Exact* bias, const Setting& s) {
    return std::move(run(engine, x, {&matrix}, {bias}, s)[0]);
}

void check_right(const Matrix& m, const Input& x, const Exact* bias, const Setting& s, const std::vector<double>& y) {
    const int64_t n = m.weights.n;
    for (int64_t row = 0; row < x.m; row++) {
        const Activations how = finite(x, row) ? s.how : Activations::floats;
        Quantized q;
        if (how != Activations::floats) q = quantize(x, row, how, s.fixed_scale);
        bool right = true;
        for (int64_t i = 0; i < n; i++) {
            const double got = y[row * n + i];
            const Exactly e = exactly(m, x, row, i, how, &q, bias ? get(bias->data(), i, x.type) : 0);
            if (std::isfinite(e.value)) {
                right = right && rounded(e.value - e.bound, x.type) <= got && got <= rounded(e.value + e.bound, x.type);
            } else {
                right = right && (std::isnan(e.value) ? std::isnan(got) : got == e.value);
            }
        }
        check(right, "y is within the bound");
    }
}

const char* const HOW_NAMES[] = {"floats", "blocks", "tokens", "fixed"};

void name(const char* test, const Matrix& m, const Input& x, const Setting& s, const char* isa = "scalar") {
    const Weights& w = m.weights;
    std::snprintf(subject, sizeof subject, "%s: %s, %d bits, N %d, K %d, M %d, group %d, scales %s%s%s, offset %d, x %s as %s, %d threads",
                  test, isa, w.bits, int(w.n), int(w.k), int(x.m), int(w.group), TYPE_NAMES[int(w.scale_type)],
                  w.zero ? ", zeros" : "", w.half ? ", halves" : "", w.offset, TYPE_NAMES[int(x.type)], HOW_NAMES[int(s.how)],
                  s.threads);
}

// The scalar engine is right, and all others give its bits.
std::vector<double> check_engines(const char* test, const Matrix& m, const Input& x, const Exact* bias, const Setting& s) {
    name(test, m, x, s);
    const Output want = run(scalar_engine(), x, m, bias, s);
    check_right(m, x, bias, s, want.values);
    for (const Engine& engine : engines()) {
        if (&engine == &scalar_engine()) continue;
        name(test, m, x, s, engine.isa);
        check(equal(run(engine, x, m, bias, s).values, want.values), "the same bits as scalar");
    }
    return want.values;
}

// ---- tests ----------------------------------------------------------------------------------------------------------

const int64_t GROUPS[] = {0, 32, 64, 128};
const Activations HOWS[] = {Activations::floats, Activations::blocks, Activations::tokens, Activations::fixed};

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

Exact bias_of(int64_t n, Float type, Random& random) {
    Exact bias(n, size_of(type));
    for (int64_t i = 0; i < n; i++) put(bias.data(), i, random.bell(), type);
    return bias;
}

void test_random_shapes(Random& random) {
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        for (int turn = 0; turn < 6; turn++) {
            const Float type = TYPES[turn % 3];
            const Spread spread = Spread(random.below(SPREADS));
            const int64_t k = group ? group * random.between(1, group == 32 ? 5 : 2) : random.between(1, 200);
            const bool powers = spread == integers || random.below(4) == 0;
            const int64_t most = bits == TRITS ? 200 : 40;
            const Matrix m = make({random.between(1, most), k, group, bits, kind, TYPES[random.below(3)],
                                   group == 0 && random.below(3) == 0, powers}, random);
            const int64_t rows = random.below(4) == 0 ? random.between(9, 20) : random.between(1, 8);
            const Input x = input(rows, k, type, spread, random);
            const Exact bias = bias_of(m.weights.n, type, random);
            const Exact* with = random.below(2) && spread != integers ? &bias : nullptr;
            const Setting s{how, spread == integers ? 1.0f : float(0.005 + 0.03 * random.unit())};
            const std::vector<double> y = check_engines("random shapes", m, x, with, s);

            // A row's result does not depend on the rows beside it.
            const int64_t row = random.below(rows);
            const Input one = input(1, k, type, [&](int64_t, int64_t column) { return x.at(row, column); });
            const Engine& engine = engines().first[random.below(engines().count)];
            name("one row", m, one, s, engine.isa);
            const auto begin = y.begin() + row * m.weights.n;
            check(equal(run(engine, one, m, with, s).values, {begin, begin + m.weights.n}), "the same bits as among others");
        }
    });
}

// Each code, at each of 32 * 32 places, comes back through a unit vector: (u - z) * 127 with nothing rounded.
void test_every_code(Random& random) {
    for (int bits = TRITS; bits <= 8; bits++) {
        const int64_t steps = std::max(1 << bits >> 5, 1), turns = bits == TRITS ? 12 : bits < 5 ? 1 << bits : 16;
        for (int64_t turn = 0; turn < turns; turn++) {
            const Activations how = HOWS[turn % 4];
            const Kind kind = bits == TRITS ? symmetric : Kind(turn / 4 % KINDS);
            const auto codes = [&](int64_t n, int64_t k) { return n * steps + k * 5 + turn; };
            const Form form{32, BLOCK, turn % 2 ? BLOCK : 0, bits, kind, Float::f32, false, true};
            const Matrix m = make(form, random, codes);
            const Input x = input(BLOCK, BLOCK, Float::f32, [](int64_t row, int64_t k) { return row == k ? 127.0 : 0.0; });
            const Setting s{how, 1.0f};
            const std::vector<double> y = check_engines("every code", m, x, nullptr, s);
            bool equal = true;
            for (int64_t k = 0; k < BLOCK; k++) {
                for (int64_t n = 0; n < 32; n++) equal = equal && y[k * 32 + n] == 127 * m.level(n, k) * m.scale_of(n, k);
            }
            check(equal, "y is 127 times the weight");
        }
    }
}

void test_decoded_rows(Random& random) {
    for_each_family([&](int bits, int64_t group, Kind kind, Activations) {
        const int64_t k = group ? group * random.between(1, 3) : random.between(1, 100), n = random.between(1, bits == TRITS ? 200 : 40);
        const Matrix m = make({n, k, group, bits, kind, TYPES[random.below(3)], false, false}, random);
        std::vector<int64_t> which;
        for (int64_t i = 0; i < 5; i++) which.push_back(random.below(n));
        const Exact out(5 * k, 4);
        decode_rows(m.weights, which.data(), 5, (float*)out.data());
        bool equal = true;
        for (int64_t i = 0; i < 5 * k; i++) {
            const int64_t row = which[i / k], column = i % k;
            equal = equal && get(out.data(), i, Float::f32) == double(float(m.scale_of(row, column) * m.level(row, column)));
        }
        std::snprintf(subject, sizeof subject, "rows: %d bits, group %d, %s", bits, int(group), KIND_NAMES[kind]);
        check(equal, "decoded weights are rounded once");
    });
}

// Long rows, in several chunks, and each way of sharing the work: every thread prepares all of x, or some of it and then
// waits, or it has rows of its own.
void test_threads(Random& random) {
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        if ((bits + group / 32 + kind + int(how)) % 16) return;
        for (const int64_t rows : {3, 23, 70}) {
            const int64_t n = rows == 3 ? 450 : random.between(70, 90);
            const int64_t k = rows == 70 ? group ? 2 * std::max<int64_t>(group, 64) : 141 : 640;
            const Matrix m = make({n, k, group, bits, kind, Float::f32, false, false}, random);
            const Input x = input(rows, k, Float::f32, plain, random), other = input(rows, k, Float::f32, plain, random);
            Setting s{how, 0.02f};
            const std::vector<double> y = check_engines("threads", m, x, nullptr, s);
            for (s.threads = 2; s.threads <= 3; s.threads++) {
                for (const Engine& engine : engines()) {
                    name("threads", m, x, s, engine.isa);
                    run(engine, other, m, nullptr, s);  // leaves other values in the scratch memory
                    check(equal(run(engine, x, m, nullptr, s).values, y), "the same bits as with one thread");
                }
            }
        }
    });
}

// Every byte of five trits, and many shapes: additions and subtractions give what multiplications by 2-bit codes give.
void test_trits(Random& random) {
    for (int turn = 0; turn < 60; turn++) {
        const bool all = turn < 4;
        Form form{all ? 80 : random.between(1, 400), all ? 243 : 64 * random.between(1, 12), 0, TRITS, symmetric,
                  TYPES[random.below(3)], true, false, int(random.below(2))};
        if (!all) form.group = GROUPS[random.below(3)];
        std::vector<int> u(form.n * form.k);
        for (int64_t i = 0; i < form.n * form.k; i++) {
            const int power[] = {1, 3, 9, 27, 81};
            u[i] = int(all ? i % form.k / power[i / form.k / PANEL] % 3 : random.below(3));
        }
        const auto codes = [&](int64_t n, int64_t k) { return u[n * form.k + k]; };
        const Random same = random;
        const Matrix trits = make(form, random, codes);
        random = same;
        form.bits = 2;
        const Matrix crumbs = make(form, random, codes);
        const Setting s{HOWS[turn % 4], 0.02f};
        const Input x = input(turn % 3 ? random.between(1, 12) : random.between(13, 70), form.k, TYPES[turn % 3], plain, random);
        for (const Engine& engine : engines()) {
            name("trits", trits, x, s, engine.isa);
            const std::vector<double> y = run(engine, x, trits, nullptr, s).values;
            check(equal(y, run(scalar_engine(), x, crumbs, nullptr, s).values), "the same bits as 2-bit codes");
        }
    }
}

// Matrices of every form that share x.
void test_products(Random& random) {
    for (int turn = 0; turn < 48; turn++) {
        const Activations how = HOWS[turn % 4];
        const Float type = TYPES[turn % 3];
        const int64_t k = turn % 2 ? 128 : 384;
        std::vector<Matrix> matrices;
        std::vector<Exact> biases;
        const int64_t count = random.between(2, 4);
        for (int64_t i = 0; i < count; i++) {
            const bool trits = turn % 3 == 2;  // they share x only among themselves
            const Form form{random.between(1, trits ? 200 : 50), k, GROUPS[random.below(4)],
                            trits ? TRITS : int(random.between(2, 8)), trits ? symmetric : Kind(random.below(KINDS)),
                            TYPES[random.below(3)], false, false};
            matrices.push_back(make(form, random));
            biases.push_back(bias_of(form.n, type, random));
        }
        const Input x = input(random.between(1, 20), k, type, plain, random);
        std::vector<const Matrix*> these;
        std::vector<const Exact*> with;
        for (int64_t i = 0; i < count; i++) {
            these.push_back(&matrices[i]);
            with.push_back(i % 2 ? nullptr : &biases[i]);
        }
        const Setting s{how, 0.02f, int(random.between(1, 3))};
        for (const Engine& engine : engines()) {
            const std::vector<Output> together = run(engine, x, these, with, s);
            for (int64_t i = 0; i < count; i++) {
                name("products", matrices[i], x, s, engine.isa);
                check(equal(together[i].values, run(scalar_engine(), x, matrices[i], with[i], s).values), "as one by one");
            }
        }
    }
}

// Rows with NaN and infinities give what floats give; the rows beside them do not notice.
void test_not_finite(Random& random) {
    const double odd[] = {NAN, INFINITY, -INFINITY};
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        const Float type = TYPES[random.below(3)];
        const int64_t k = group ? 2 * group : random.between(1, 90), rows = random.between(2, 11);
        const Matrix m = make({random.between(1, 20), k, group, bits, kind, Float::f32, false, false}, random);
        Input x = input(rows, k, type, plain, random);
        for (int64_t row = 0; row < rows; row += 2) {
            for (int64_t i = random.below(3); i >= 0; i--) {
                put(x.memory.data(), row * k + random.below(k), odd[random.below(3)], type);
            }
        }
        check_engines("not finite", m, x, nullptr, {how, 0.02f});
    });
}

// y = scale, for scales that are awkward to round to y's type.
void test_rounding_of_results(Random& random) {
    const int64_t n = 20000;
    Form form{n, 1, 0, 8, symmetric, Float::f32, false, false};
    Matrix m = make(form, random, [](int64_t, int64_t) { return 1; });
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = uint32_t(random.bits());
        const int64_t kind = random.below(8);
        if (kind < 4) bits = (bits & 0x807fffffu) | uint32_t(random.between(127 - 27, 127 + 17)) << 23;  // about f16's range
        if (kind % 4 == 1) bits &= 0xfffff000u;                                                          // ties in f16
        if (kind % 4 == 2) bits &= 0xffff8000u;                                                          // ties in bf16
        std::memcpy(m.scales.data() + 4 * i, &bits, 4);
        m.scale[i] = get(m.scales.data(), i, Float::f32);
    }
    m.weights.offset = 0;
    for (const Float type : TYPES) {
        const Input x = input(1, 1, type, [](int64_t, int64_t) { return 1.0; });
        for (const Engine& engine : engines()) {
            name("rounding of results", m, x, {Activations::floats}, engine.isa);
            const Output y = run(engine, x, m, nullptr, {Activations::floats});
            int64_t wrong = 0;
            for (int64_t i = 0; i < n; i++) wrong += !same(y.values[i], rounded(m.scale[i], type));
            check(wrong == 0, "y is the scale, rounded half to even");
        }
    }
}

// The longest rows that one scale may have, codes and activations as large as they get.
void test_longest_rows(Random& random) {
    for (const Kind kind : {symmetric, zeros}) {
        const int64_t k = MAX_EXACT_COLUMNS;
        Matrix m = make({2, k, 0, 8, kind, Float::f32, true, true}, random, [](int64_t n, int64_t) { return n ? 255 : 0; });
        m.weights.offset = 0;
        if (kind == zeros) m.zero.data()[0] = 255, m.zero.data()[1] = 0;
        m.level0 = {kind == zeros ? 255.0 : 0.0, 0.0};
        const Input x = input(2, k, Float::f32, [](int64_t row, int64_t) { return row ? -1.0 : 1.0; });
        check_engines("longest rows", m, x, nullptr, {Activations::tokens});
    }
}

// More rows of x than are quantized at once.
void test_slabs(Random& random) {
    const Matrix m = make({2, 2, 0, 3, symmetric, Float::f32, false, false}, random);
    const Input x = input(140000, 2, Float::f32, [&](int64_t row, int64_t) { return row == 139000 ? NAN : random.bell(); });
    check_engines("slabs", m, x, nullptr, {Activations::tokens});
}

// Against the error function; every engine gives the scalar engine's bits, also for what is no number.
void test_gelu(Random& random) {
    const int64_t n = 37;
    const Matrix m = make({n, 32, 0, 8, symmetric, Float::f32, false, false}, random);
    std::vector<double> places = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-30, -1e-30, 7.0, -7.0, 7.1, -7.1, 1e30, -1e30};
    for (int i = 0; i < 4000; i++) places.push_back(i * 0.005 - 10);
    Exact bias(n, 4);
    const Input x = input(1, 32, Float::f32, [](int64_t, int64_t) { return 0.0; });
    for (size_t first = 0; first < places.size(); first += n) {
        for (int64_t i = 0; i < n; i++) put(bias.data(), i, places[(first + i) % places.size()], Float::f32);
        Setting s{Activations::tokens};
        s.gelu = true;
        name("gelu", m, x, s);
        const std::vector<double> want = run(scalar_engine(), x, m, &bias, s).values;
        for (int64_t i = 0; i < n; i++) {
            const double z = get(bias.data(), i, Float::f32), exact = z * 0.5 * std::erfc(-z * std::sqrt(0.5));
            if (!std::isfinite(z)) check(z > 0 ? want[i] == INFINITY : std::isnan(want[i]), "not finite");
            else check(std::fabs(want[i] - exact) <= 4e-7 * std::max(1.0, z), "GELU");
        }
        for (const Engine& engine : engines()) {
            name("gelu", m, x, s, engine.isa);
            check(equal(run(engine, x, m, &bias, s).values, want), "the same bits as scalar");
        }
    }
}

void test_limits() {
    for (const Engine& engine : engines()) {
        std::snprintf(subject, sizeof subject, "limits: %s", engine.isa);
        check(engine.spin(3) > 0, "spin counts its operations");
        const Exact memory(4099, 1);
        engine.read(memory.data(), memory.bytes());
    }
}

}  // namespace

int main() {
    std::printf("engines:");
    for (const Engine& engine : engines()) std::printf(" %s", engine.isa);
    std::printf("\n");
    std::fflush(stdout);
    Random random{7};
    auto begin = std::chrono::steady_clock::now();
    const auto timed = [&](const char* test) {
        const auto end = std::chrono::steady_clock::now();
        std::printf("%6.2f s  %s\n", std::chrono::duration<double>(end - begin).count(), test);
        begin = end;
    };
    test_limits();
    test_every_code(random);
    timed("every code");
    test_random_shapes(random);
    timed("random shapes");
    test_decoded_rows(random);
    timed("decoded rows");
    test_threads(random);
    timed("threads");
    test_trits(random);
    timed("trits");
    test_products(random);
    timed("products");
    test_not_finite(random);
    timed("not finite");
    test_rounding_of_results(random);
    timed("rounding of results");
    test_longest_rows(random);
    timed("longest rows");
    test_slabs(random);
    timed("slabs");
    test_gelu(random);
    test_attention(random);
    timed("attention");
    test_fake(random);
    timed("fake");
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
