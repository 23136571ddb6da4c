// Products by one thread: every width, way of scaling and number of rows; every code; long rows.
#include "products.h"

using namespace spicerack;

namespace {

// Each body, by each way to it: for 1 to 24 rows codes are unpacked in registers, read once for more rows, and from
// bytes, in strips of every height that there is.
void every_body(Random& random) {
    const struct {
        int64_t group;
        Activations how;
    } scalings[] = {{0, Activations::spans}, {32, Activations::spans}, {64, Activations::tokens},
                    {0, Activations::tokens}, {0, Activations::floats}};
    for (int bits = TRITS; bits <= 8; bits++) {
        for (const auto& scaling : scalings) {
            for (int64_t rows = 1; rows <= 24; rows++) {
                const Kind kind = bits == TRITS ? symmetric : Kind(rows % KINDS);
                const int64_t n = bits == TRITS ? 85 : 40;
                const Matrix m = make({n, 64, scaling.group, bits, kind, TYPES[rows % 3], false, false}, random);
                const Input x = input(rows, 64, Float::f32, plain, random);
                check_engines("every body", m, x, nullptr, {scaling.how});
            }
        }
    }
}

void random_shapes(Random& random) {
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        for (int turn = 0; turn < 2; turn++) {
            const Float type = TYPES[random.below(3)];
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
            check_one_row(m, x, with, s, y, random);
        }
    });
}

// What comes in blocks: minima, bytes for scales, half tiles. Looked up or not, each body, by each way to it.
struct Block {
    int64_t group;
    bool minima;
    ScaleType bytes;
    int64_t block;
};
const Block BLOCKS[] = {{32, true, ScaleType::f32, 0},     {32, true, ScaleType::int8, 128}, {16, true, ScaleType::int8, 64},
                        {16, false, ScaleType::int8, 128}, {16, false, ScaleType::f32, 0},   {16, false, ScaleType::e4m3, 0},
                        {64, true, ScaleType::f32, 0},     {0, true, ScaleType::f32, 0},     {32, false, ScaleType::int8, 0},
                        {0, false, ScaleType::e4m3, 0}};

void blocks_of(int bits, const Block& b, int64_t rows, int64_t k, Activations how, Random& random) {
    const Matrix m = make({random.between(1, 40), k, b.group, bits, symmetric, TYPES[random.below(3)], random.below(8) == 0, false,
                           -1, b.minima, b.bytes, b.block}, random);
    const Input x = input(rows, k, TYPES[random.below(3)], Spread(random.below(SPREADS)), random);
    const Exact bias = bias_of(m.weights.n, x.type, random);
    const Exact* with = random.below(2) ? &bias : nullptr;
    const Setting s{how, float(0.005 + 0.03 * random.unit())};
    check_one_row(m, x, with, s, check_engines("blocks", m, x, with, s), random);
}

void blocks(Random& random) {
    for (int bits = 2; bits <= LOOKED_UP; bits++) {
        for (int64_t rows = 1; rows <= 24; rows++) {
            for (int halves = 0; halves < 2; halves++) {
                const Block& b = BLOCKS[halves ? 2 + random.below(4) : random.below(2)];
                blocks_of(bits, b, rows, 128, Activations::spans, random);
            }
            if (rows < 6) blocks_of(bits, BLOCKS[random.below(6)], rows, 128, Activations::floats, random);
        }
        for (const Block& b : BLOCKS) {
            if (once) break;
            for (const Activations how : HOWS) {
                const int64_t unit = std::max({b.group, b.block, TILE + int64_t(0)}), rows = random.between(1, 30);
                blocks_of(bits, b, rows, unit * random.between(1, 3), how, random);
                blocks_of(bits, b, rows, 1152, how, random);
            }
        }
        for (const Activations how : HOWS) {  // tables have scales of tiles, groups and rows, too
            if (bits != LOOKED_UP) break;
            for (const int64_t group : GROUPS) {
                for (int64_t rows = 1; rows <= 24; rows++) blocks_of(bits, {group, false, ScaleType::f32, 0}, rows, 128, how, random);
            }
        }
    }
}

// Several chunks of columns, and sums that go from one to the next.
void long_rows(Random& random) {
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        if (kind != (bits == TRITS ? symmetric : both) || group == 64) return;
        for (const int64_t rows : {4, 30}) {
            const int64_t k = group ? 1152 : 1100;
            const Matrix m = make({20, k, group, bits, kind, Float::f32, false, false}, random);
            const Input x = input(rows, k, Float::f32, plain, random);
            const Setting s{how, 0.02f};
            check_one_row(m, x, nullptr, s, check_engines("long rows", m, x, nullptr, s), random);
        }
    });
}

// Each code, at each of 32 * 32 places, comes back through a unit vector: (u - z) * 127 with nothing rounded.
void every_code(Random& random) {
    for (int bits = TRITS; bits <= 8; bits++) {
        const int64_t steps = std::max(1 << bits >> 5, 1), turns = bits == TRITS ? 12 : bits < 5 ? 1 << bits : 16;
        for (int64_t turn = 0; turn < turns; turn++) {
            const Activations how = HOWS[turn % 4];
            const Kind kind = bits == TRITS ? symmetric : Kind(turn / 4 % KINDS);
            const auto codes = [&](int64_t n, int64_t k) { return n * steps + k * 5 + turn; };
            const Form form{32, TILE, turn % 2 ? TILE : 0, bits, kind, Float::f32, false, true};
            const Matrix m = make(form, random, codes);
            const Input x = input(TILE, TILE, Float::f32, [](int64_t row, int64_t k) { return row == k ? 127.0 : 0.0; });
            const Setting s{how, 1.0f};
            const std::vector<double> y = check_engines("every code", m, x, nullptr, s);
            bool equal = true;
            for (int64_t k = 0; k < TILE; k++) {
                for (int64_t n = 0; n < 32; n++) equal = equal && y[k * 32 + n] == 127 * m.level(n, k) * m.scale_of(n, k);
            }
            check(equal, "y is 127 times the weight");
        }
    }
}

// Every byte of five trits, and many shapes: additions and subtractions give what multiplications by 2-bit codes give.
void trits(Random& random) {
    for (int turn = 0; turn < (once ? 4 : 24); turn++) {
        const bool all = turn < 4;
        Form form{all ? 80 : random.between(1, 200), all ? 243 : 64 * random.between(1, 6), 0, TRITS, symmetric,
                  TYPES[random.below(3)], true, false, int(random.below(2))};
        if (!all) form.group = GROUPS[random.below(3)];
        std::vector<int> u(form.n * form.k);
        for (int64_t i = 0; i < form.n * form.k; i++) {
            const int power[] = {1, 3, 9, 27, 81};
            u[i] = int(all ? i % form.k / power[i / form.k / PANEL] % 3 : random.below(3));
        }
        const auto codes = [&](int64_t n, int64_t k) { return u[n * form.k + k]; };
        const Random same = random;
        const Matrix fives = make(form, random, codes);
        random = same;
        form.bits = 2;
        const Matrix crumbs = make(form, random, codes);
        const Setting s{HOWS[turn % 4], 0.02f};
        const int64_t rows = turn % 3 ? random.between(1, 12) : random.between(13, 40);
        const Input x = input(rows, form.k, TYPES[turn % 3], plain, random);
        const std::vector<double> want = run(scalar_engine(), x, crumbs, nullptr, s).values;
        for (const Engine& engine : engines()) {
            name("trits", fives, x, s, engine.isa);
            check(equal(run(engine, x, fives, nullptr, s).values, want), "the same bits as 2-bit codes");
        }
    }
}

// The greatest and the least codes by activations of one sign or of both, as large as they get: what engines add in 16
// bits must not reach their end.
void greatest_sums(Random& random) {
    for (int bits = TRITS; bits <= 8; bits++) {
        const int64_t last = bits == TRITS ? 2 : (1 << bits) - 1;
        for (const int64_t rows : {1, 2, 4, 7, 9, 20}) {
            for (const Activations how : {Activations::spans, Activations::tokens}) {
                const auto codes = [&](int64_t n, int64_t k) {
                    return n % 3 == 0 ? last : n % 3 == 1 ? 0 : k % 2 * last;
                };
                const Matrix m = make({32, 256, 0, bits, symmetric, Float::f32, false, true, 0}, random, codes);
                const auto values = [](int64_t row, int64_t k) {
                    return row % 3 == 2 ? k % 2 * 254.0 - 127.0 : 127.0 - row % 3 * 254.0;
                };
                check_engines("greatest sums", m, input(rows, 256, Float::f32, values), nullptr, {how});
            }
        }
    }
}

// The longest rows that one scale may have, codes and activations as large as they get.
void longest_rows(Random& random) {
    for (const Kind kind : {symmetric, zeros}) {
        const int64_t k = MAX_EXACT_COLUMNS;
        const auto codes = [](int64_t n, int64_t) { return n ? 255 : 0; };
        Matrix m = make({2, k, 0, 8, kind, Float::f32, true, true, 0}, random, codes);
        if (kind == zeros) m.zero.data()[0] = 255, m.zero.data()[1] = 0;
        for (int64_t i = 0; i < 2 * k; i++) m.levels[i] = i < k ? (kind == zeros ? -255 : 0) : 255;
        const Input x = input(2, k, Float::f32, [](int64_t row, int64_t) { return row ? -1.0 : 1.0; });
        check_engines("longest rows", m, x, nullptr, {Activations::tokens});
    }
}

}  // namespace

void spicerack::test_bodies(Random& random) {
    every_body(random);
    blocks(random);
    trits(random);
    if (once) return;
    every_code(random);
    greatest_sums(random);
    random_shapes(random);
    long_rows(random);
    longest_rows(random);
}
