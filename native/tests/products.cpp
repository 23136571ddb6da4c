// Matrices, inputs and runs of products.h.
#include "products.h"

#include "../kernels/stored.h"
#include "../quantizers/pack.h"

namespace spicerack {

namespace {

const char* const HOW_NAMES[] = {"floats", "spans", "tokens", "fixed"};
const char* const SCALE_NAMES[] = {"f32", "f16", "bf16", "int8", "e4m3"};

// Codes [N, K], one byte each, as tiles; plain loops, byte after byte.
void pack_panels(const Weights& w, const std::vector<uint8_t>& codes, uint8_t* tiles) {
    const int panels = w.bits == TRITS ? BUNDLE : 1;
    for (int64_t bundle = 0; bundle < w.bundles(); bundle++) {
        for (int64_t t = 0; t < w.tiles(); t++, tiles += w.tile_bytes()) {
            uint8_t sum[BYTE_TILE] = {};
            for (int p = panels - 1; p >= 0; p--) {
                for (int i = 0; i < BYTE_TILE; i++) {
                    const int64_t row = (bundle * panels + p) * PANEL + i % TILE_UNIT / 4;
                    const int64_t column = t * TILE + i / TILE_UNIT * 4 + i % 4;
                    const bool there = row < w.n && column < w.k;
                    sum[i] = uint8_t(3 * sum[i] + (there ? uint8_t(codes[row * w.k + column] + w.offset) : 0));
                }
            }
            if (w.bits == TRITS) std::memcpy(tiles, sum, BYTE_TILE);
            if (w.bits != TRITS) squeeze_tile(sum, w.bits, tiles);
        }
    }
}

// The same tiles from codes as folders store them: streams, whose rows are filled up with ones, and bytes.
void check_stored(const Weights& w, const std::vector<uint8_t>& codes, const Exact& tiles) {
    const int bits = w.bits == TRITS ? 2 : w.bits, most = w.bits == TRITS ? 2 : (1 << bits) - 1;
    StoredCodes s{nullptr, Order::stream, w.n, w.k, bits, w.offset, most};
    Exact words(w.n * s.stride(), 1), bytes(w.n * w.k, 1), out(tiles.bytes(), 1);
    pack(codes.data(), w.n, w.k, bits, w.offset, words.data());
    for (int64_t n = 0; n < w.n; n++) {
        for (int64_t bit = w.k * bits; bit < s.stride() * 8; bit++) {
            words.data()[n * s.stride() + bit / 8] |= uint8_t(1 << bit % 8);
        }
    }
    std::memcpy(bytes.data(), codes.data(), codes.size());
    for (const Order order : {Order::stream, Order::bytes}) {
        s.order = order;
        s.data = order == Order::stream ? words.data() : bytes.data();
        std::memset(out.data(), 0xff, out.bytes());
        const int64_t middle = w.bundles() / 2;
        const bool good = pack_stored(s, w.bits, 0, middle, out.data()) & pack_stored(s, w.bits, middle, w.bundles(), out.data());
        check(good && !std::memcmp(out.data(), tiles.data(), tiles.bytes()), "pack_stored makes what pack_panels makes");
        const bool any = std::any_of(codes.begin(), codes.end(), [&](uint8_t c) { return uint8_t(c + w.offset) > 2; });
        s.most = 2;
        check(pack_stored(s, w.bits, 0, w.bundles(), out.data()) == !any, "codes beyond the levels are noticed");
        s.most = most;
    }
}

// Codes [N, K], one byte each, as tiles; and back again.
Exact packed(const Weights& w, const std::vector<uint8_t>& codes) {
    Exact tiles(w.bundles() * w.tiles() * w.tile_bytes(), 1);
    pack_panels(w, codes, tiles.data());
    std::vector<uint8_t> back(codes.size());
    unpack_panels(tiles.data(), w.n, w.k, w.bits, w.offset, back.data());
    std::snprintf(subject, sizeof subject, "packing: %d bits, N %d, K %d", w.bits, int(w.n), int(w.k));
    check(back == codes, "unpack_panels is the inverse of pack_panels");
    check_stored(w, codes, tiles);
    return tiles;
}

}  // namespace

namespace {

// Scales [N, groups] of a group's kind 0, or its minima, to lanes; as they are, or bytes and outer ones.
void put_steps(Matrix& m, const Form& f, int kind, Random& random) {
    const Weights& w = m.weights;
    const double first = f.powers ? 0.25 : 0.001 + 0.05 * random.unit();
    std::vector<double>& steps = kind ? m.minima : m.scale;
    for (int64_t n = 0; n < f.n; n++) {
        for (int64_t g = 0; g < w.groups(); g++) {
            const int64_t at = ((n / PANEL * w.groups() + g) * w.kinds() + kind) * PANEL + n % PANEL;
            double s = first;
            if (!f.tensor) s = f.powers ? std::ldexp(1.0, int(random.between(-3, 2))) : first * (0.2 + random.unit());
            if (kind) s *= -3;
            if (!w.outer) {
                put(m.scales.data(), at, s, Float(w.scale_type));
                steps.push_back(get(m.scales.data(), at, Float(w.scale_type)));
                continue;
            }
            const int64_t b = w.block ? g * w.group / w.block : 0, place = ((n / PANEL * w.blocks() + b) * w.kinds() + kind) * PANEL;
            if (g == 0 || (w.block && g * w.group % w.block == 0)) put(m.outer.data(), place + n % PANEL, s, w.outer_type);
            const uint8_t byte = m.scales.data()[at] = uint8_t(random.bits());
            double value = int8_t(byte);
            if (w.scale_type == ScaleType::e4m3) {
                const int magnitude = std::min(byte & 0x7f, 0x7e), fraction = magnitude & 7;
                value = magnitude < 8 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, (magnitude >> 3) - 10);
                value = byte < 128 ? value : -value;
            }
            steps.push_back(float(value) * float(get(m.outer.data(), place + n % PANEL, w.outer_type)));
        }
    }
}

}  // namespace

Matrix make(const Form& f, Random& random, const std::function<int64_t(int64_t, int64_t)>& codes) {
    Matrix m;
    Weights& w = m.weights;
    w.n = f.n;
    w.k = f.k;
    w.group = f.group;
    w.bits = f.bits;
    w.scale_type = f.bytes == ScaleType::f32 ? ScaleType(f.scale_type) : f.bytes;
    w.minima = f.minima;
    w.block = f.block;
    w.outer_type = f.scale_type;
    w.half = f.kind == halves || f.kind == both;
    const bool looked_up = f.bits == LOOKED_UP;
    const int offsets[] = {1 << (f.bits - 1), (1 << (f.bits - 1)) - 1, 0};
    w.offset = f.offset < 0 ? looked_up ? 128 : offsets[random.below(3)] : f.offset;
    const int count = f.bits == TRITS ? 3 : looked_up ? TABLE : 1 << f.bits;
    for (uint8_t& u : w.table) u = uint8_t(random.bits());
    std::vector<uint8_t> stored(f.n * f.k);
    m.levels.resize(f.n * f.k);
    for (int64_t i = 0; i < f.n * f.k; i++) {
        const int u = int((uint64_t(codes(i / f.k, i % f.k)) & 0xffffffffu) % count);
        m.levels[i] = looked_up ? w.table[u] : u;
        stored[i] = uint8_t(u - (looked_up ? 0 : w.offset));
    }
    Weights plain = w;
    if (looked_up) plain.bits = 4, plain.offset = 0;
    m.tiles = packed(plain, stored);

    const int64_t lanes = w.panels() * w.groups() * PANEL;
    m.scales = Exact(lanes * w.kinds(), size_of(w.scale_type));
    std::memset(m.scales.data(), 0, m.scales.bytes());
    if (f.bytes != ScaleType::f32) {
        m.outer = Exact(w.panels() * w.blocks() * w.kinds() * PANEL, size_of(w.outer_type));
        std::memset(m.outer.data(), 0, m.outer.bytes());
        w.outer = m.outer.data();
    }
    const bool zero = f.kind == zeros || f.kind == both;
    if (zero) {
        m.zero = Exact(lanes, 1);
        std::memset(m.zero.data(), 0, m.zero.bytes());
    }
    for (int kind = 0; kind < w.kinds(); kind++) put_steps(m, f, kind, random);
    for (int64_t n = 0; n < f.n; n++) {
        for (int64_t g = 0; g < w.groups(); g++) {
            const int64_t at = (n / PANEL * w.groups() + g) * PANEL + n % PANEL;
            int z = w.offset;
            if (zero) m.zero.data()[at] = uint8_t(z = int(random.between(0, count - 1)));
            double* level = &m.levels[n * f.k + g * m.columns()];
            for (int64_t k = 0; k < m.columns(); k++) level[k] -= z - (w.half ? 0.5 : 0);
        }
    }
    w.codes = m.tiles.data();
    w.scale = m.scales.data();
    w.zero = zero ? m.zero.data() : nullptr;
    return m;
}

Matrix make(const Form& form, Random& random) {
    const int64_t mode = random.below(8);  // once in a while only the least and the greatest code
    const int64_t last = form.bits == TRITS ? 2 : form.bits == LOOKED_UP ? TABLE - 1 : (1 << form.bits) - 1;
    return make(form, random, [&](int64_t, int64_t) {
        return mode == 0 ? last * random.below(2) : int64_t(random.bits() >> 20);
    });
}

Input input(int64_t m, int64_t k, Float type, const std::function<double(int64_t, int64_t)>& values) {
    Input x{m, k, type, Exact(m * k, size_of(type)), std::vector<double>(m * k)};
    for (int64_t i = 0; i < m * k; i++) x.set(i / k, i % k, values(i / k, i % k));
    return x;
}

Input input(int64_t m, int64_t k, Float type, Spread spread, Random& random) {
    return input(m, k, type, [&](int64_t, int64_t column) {
        switch (spread) {
            case outliers: return random.bell() * (random.below(20) == 0 ? 60 : 1);
            case integers: return column % TILE == 0 ? 127.0 : double(random.between(-127, 127));
            case extremes: return random.below(2) ? 3.0 : -3.0;
            case nothing: return random.below(3) ? 0.0 : (type == Float::f16 ? 0x1p-24 : 0x1p-110);
            default: return random.bell();
        }
    });
}

Exact bias_of(int64_t n, Float type, Random& random) {
    Exact bias(n, size_of(type));
    for (int64_t i = 0; i < n; i++) put(bias.data(), i, random.bell(), type);
    return bias;
}

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
    const int count = int(products.size());
    engine.linear({x.memory.data(), x.type, x.m, s.how, s.fixed_scale, products.data(), count, s.threads});
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

void name(const char* test, const Matrix& m, const Input& x, const Setting& s, const char* isa) {
    const Weights& w = m.weights;
    std::snprintf(subject, sizeof subject,
                  "%s: %s, %d bits, N %d, K %d, M %d, group %d, scales %s%s%s%s, outer %s, block %d, offset %d, x %s as %s, %d threads", test, isa,
                  w.bits, int(w.n), int(w.k), int(x.m), int(w.group), SCALE_NAMES[int(w.scale_type)],
                  w.zero ? ", zeros" : "", w.half ? ", halves" : "", w.minima ? ", minima" : "",
                  w.outer ? TYPE_NAMES[int(w.outer_type)] : "none", int(w.block), w.offset, TYPE_NAMES[int(x.type)],
                  HOW_NAMES[int(s.how)], s.threads);
}

std::vector<double> check_engines(const char* test, const Matrix& m, const Input& x, const Exact* bias,
                                  const Setting& s) {
    name(test, m, x, s);
    const Output want = run(scalar_engine(), x, m, bias, s);
    if (!once) check_right(m, x, bias, s, want.values);
    for (const Engine& engine : engines()) {
        if (&engine == &scalar_engine()) continue;
        name(test, m, x, s, engine.isa);
        check(equal(run(engine, x, m, bias, s).values, want.values), "the same bits as scalar");
    }
    return want.values;
}

void check_one_row(const Matrix& m, const Input& x, const Exact* bias, const Setting& s, const std::vector<double>& y,
                   Random& random) {
    const int64_t row = random.below(x.m), n = m.weights.n;
    const Input one = input(1, x.k, x.type, [&](int64_t, int64_t column) { return x.at(row, column); });
    const Engine& engine = engines().first[random.below(engines().count)];
    name("one row", m, one, s, engine.isa);
    check(equal(run(engine, one, m, bias, s).values, {y.begin() + row * n, y.begin() + (row + 1) * n}),
          "the same bits as among others");
}

}  // namespace spicerack
