// The innermost loops: a strip of x, which is some of its rows, times a few panels of W, over a chunk of columns. Part of
// linear.cpp.
//
// A body is compiled for each width of codes, number of rows, number of panels, and way of scaling. Loops over rows and
// vectors have constant counts, so that all sums stay in registers. Every body adds the same terms in the same order.
#pragma once

#include "codes.h"
#include "sizes.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// What a body adds to its sums.
enum Scaling {
    scale_of_row,    // float32: t, of spans times their scales of x; W has one scale a row, which comes in the end
    scale_of_tile,  // float32: t s_w, with a scale for each tile of W
    scale_of_group,  // float32: t s_w, with a scale for several tiles of W
    unscaled,        // int32: u a, where x has one scale a row and W has, too
    of_floats,       // float32: (u - z) x, or s_w (u - z) x where groups of W have scales
    of_blocks,       // float32: t s_w + m x, of tiles (blocks.h)
    of_half_blocks,  // the same of half tiles
    of_block_floats, // float32: (s_w (u - z) + m) x
    SCALINGS
};

constexpr int FOLD_TILES = 512 / TILE;
static_assert(COLUMNS % (FOLD_TILES * TILE) == 0, "a chunk of float sums ends where they are folded");

// Panels of one matrix, from the chunk's first column on.
struct Panels {
    const uint8_t* codes[PANELS_MOST];  // step: bytes from tile to tile; trits in bundles: all in the first
    const uint8_t* scale[PANELS_MOST];  // of the chunk's first group, in `type`
    const uint8_t* outer[PANELS_MOST];  // of its first block, in `outer_type`; null: none
    const uint8_t* zero[PANELS_MOST];   // null: none
    int64_t step;
    int64_t left, jump;    // bytes to a panel's end, and from there to the panel that its thread reads next
    int64_t tiles;         // of the chunk, in each panel
    int which;             // panel of a bundle of trits, where they are multiplied by floats
    int64_t group_tiles;   // 0: one scale a row, applied in the end, or groups of half a tile
    bool halves;           // these
    int64_t block_tiles;   // of an outer scale; 0: all
    ScaleType type;
    Float outer_type;
    int offset;
    bool half, minima;
    const uint8_t* table;  // of codes that are looked up
};

// A strip of x: for every span of the chunk its M rows one after the other.
//
// Of groups of half a tile each span has two of `start` and `sum`: [spans, 2, M].
struct Strip {
    const int8_t* codes;   // [spans, M, 32], or for products of words their bytes, [spans, M, 64]
    const float* scale;    // [spans, M]
    const int32_t* start;  // [spans, M]: -offset * sum of the codes; with zeros the sum itself, negated
    const float* half;     // [spans, M]: half the sum of the codes, or null
    const float* sum;      // [spans, M]: the sum of the codes times their scale, or null
    const float* floats;   // [spans, M, 32], or null
};

// How the rows of P panels lie in vectors: P * parts of them at once, all parts of the panels or one of a bundle of
// trits.
template <int BITS, int P>
struct Vectors {
    static constexpr bool trits = BITS == TRITS || P == BUNDLE;
    static constexpr int parts = trits ? 1 : PARTS, passes = PARTS / parts, count = P * parts, rows = P * PANEL;
    static constexpr int panel(int v) { return v / parts; }
    // Where the vector's rows begin in a panel, and among the rows of all panels.
    static constexpr int row(int v, int pass) { return (v % parts + pass) * LANES; }
    static constexpr int place(int v, int pass) { return panel(v) * PANEL + row(v, pass); }
};

// How many times four bytes of x, a quad or half of it in words, a body multiplies for a tile; bytes of a row's span.
template <int BITS>
constexpr int STEPS = in_words(BITS) ? 2 * QUADS : QUADS;
template <int BITS>
constexpr int SPAN_BYTES = 4 * STEPS<BITS>;

// Steps whose sums of pairs of columns fit in 16 bits: (2^bits - 1) * 127 * 2 * steps < 2^15. With 1 nothing is summed
// before it is widened to 32.
template <int BITS>
constexpr int SHORT_STEPS = !PAIRS || in_words(BITS) || bits_of(BITS) > 6 ? 1
                            : bits_of(BITS) == 6                          ? 2
                            : bits_of(BITS) == 5                          ? 4
                                                                          : QUADS;

// The codes of one step, for all vectors.
template <int BITS, int P>
INLINE void take(const Panels& w, int64_t at, int quad, int pass, vi* u) {
    using S = Vectors<BITS, P>;
    if constexpr (BITS == TRITS) {
        split_trits(load<vi>(w.codes[0] + at + quad * TILE_UNIT + pass * VECTOR_BYTES), u);
    } else {
        for (int v = 0; v < S::count; v++) {
            u[v] = codes<BITS>(w.codes[S::panel(v)] + at, quad, v % S::parts + pass, w.table);
        }
    }
}

// Into the second-level cache: the first has too few lines on their way at once, which cost a fifth of the bandwidth.
template <int BITS, int P>
INLINE void prefetch(const Panels& w, int64_t at) {
    constexpr int streams = BITS == TRITS ? 1 : P, lines = BITS == TRITS ? QUADS : BITS == LOOKED_UP ? 4 : BITS;
    at += at + PREFETCH_BYTES < w.left ? PREFETCH_BYTES : PREFETCH_BYTES + w.jump;
    for (int p = 0; p < streams; p++) {
        for (int line = 0; line < lines; line++) __builtin_prefetch(w.codes[p] + at + line * TILE_UNIT, 0, 2);
    }
}

// Bodies that read packed codes prefetch for few rows of x, which leave memory no time otherwise.
template <int BITS, int M, int P>
constexpr bool prefetches(int panels_read_once) {
    return BITS < UNPACKED && (M <= IN_REGISTERS.rows || P == panels_read_once);
}

INLINE vf scale_at(const Panels& w, int panel, int64_t group, int row) {
    return widen(w.scale[panel] + (group * PANEL + row) * size_of(w.type), Float(w.type));
}

INLINE vi zero_at(const Panels& w, int panel, int64_t group, int row) {
    return from_bytes(w.zero[panel] + group * PANEL + row);
}

// Calls body(m, v) for each row of x and vector; unrolled, so that m and v are constants.
template <int M, int V, class Body>
INLINE void for_each(const Body& body) {
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) body(m, v);
    }
}

// i = begin(m, v) + u a of one span, in int32, or of one piece of CUT. `at`: bytes to its tile in each panel; a [M, 32].
template <int BITS, int M, int P, int CUT = 1, int PIECE = 0, class Begin>
INLINE void sum_tile(const Panels& w, int64_t at, int pass, const int8_t* a, const Begin& begin,
                     vi (&i)[M][Vectors<BITS, P>::count]) {
    constexpr int V = Vectors<BITS, P>::count, COUNT = STEPS<BITS> / CUT, FIRST = PIECE * COUNT;
    constexpr int SHORT = SHORT_STEPS<BITS> < COUNT ? SHORT_STEPS<BITS> : COUNT;
    if constexpr (SHORT < COUNT) for_each<M, V>([&](int m, int v) FLAT { i[m][v] = begin(m, v); });
    if constexpr (SHORT == 1) {
#pragma GCC unroll QUADS_UNROLLED
        for (int step = FIRST; step < FIRST + COUNT; step++) {
            vi u[V];
            take<BITS, P>(w, at, step, pass, u);
            for (int m = 0; m < M; m++) {
                const vi four = four_bytes(a + m * SPAN_BYTES<BITS> + step * 4);
                for (int v = 0; v < V; v++) i[m][v] = dot<BITS>(i[m][v], u[v], four);
            }
        }
    } else {
        vi h[M][V];
#pragma GCC unroll 8
        for (int step = FIRST; step < FIRST + COUNT; step++) {
            vi u[V];
            take<BITS, P>(w, at, step, pass, u);
            for (int m = 0; m < M; m++) {
                const vi four = four_bytes(a + m * TILE + step * 4);
                for (int v = 0; v < V; v++) {
                    const vi products = pairs(u[v], four);
                    h[m][v] = step % SHORT ? add_pairs(h[m][v], products) : products;
                }
            }
            if (step % SHORT == SHORT - 1) {
                for_each<M, V>([&](int m, int v) FLAT {
                    i[m][v] = add_widened(SHORT < COUNT ? i[m][v] : begin(m, v), h[m][v]);
                });
            }
        }
    }
}

// Sums [M, rows of P panels], in float32, of the rows that one pass has vectors for. PLAIN: without zeros and halves.
template <int BITS, int M, int P, Scaling SCALING, bool PLAIN>
INLINE void scaled_pass(const Panels& w, const Strip& x, float* sums, int pass) {
    using S = Vectors<BITS, P>;
    constexpr int V = S::count;
    constexpr bool by_group = SCALING == scale_of_group, by_tile = SCALING == scale_of_tile;
    const int64_t group = by_group ? w.group_tiles : by_tile ? 1 : w.tiles;
    const auto sum = [&](int m, int v) FLAT { return sums + m * S::rows + S::place(v, pass); };
    const int8_t* a = x.codes;
    const float* s_a = x.scale;
    const int32_t* start = x.start;
    const float* half = x.half;
    // Sums stay where they come from if registers are short: a tile's own products need them.
    constexpr bool near = by_group || M * V < SUMS_IN_REGISTERS;
    vf t[M][V] = {};
    if constexpr (!by_group && near) for_each<M, V>([&](int m, int v) FLAT { t[m][v] = load<vf>(sum(m, v)); });
    const bool zeros = !PLAIN && w.zero[0];
    int64_t at = 0;
    for (int64_t g = 0; g * group < w.tiles; g++) {
        if constexpr (by_group) for_each<M, V>([&](int m, int v) FLAT { t[m][v] = vf{}; });
        vi z[V] = {};
        if (zeros) {
            for (int v = 0; v < V; v++) {
                z[v] = small_factor(zero_at(w, S::panel(v), g, S::row(v, pass)) - SHIFT<BITS>);
            }
        }
        for (int64_t b = 0; b < group; b++, at += w.step, a += SPAN_BYTES<BITS> * M, s_a += M, start += M) {
            const auto begin = [&](int m, int v) FLAT {
                return zeros ? small_product(z[v], four_bytes(start + m)) : four_bytes(start + m);
            };
            vi i[M][V];
            if constexpr (prefetches<BITS, M, P>(READ_ONCE.panels_scaled)) prefetch<BITS, P>(w, at);
            sum_tile<BITS, M, P>(w, at, pass, a, begin, i);
            vf f[M][V];
            for_each<M, V>([&](int m, int v) FLAT { f[m][v] = to_float(i[m][v]); });
            if (!PLAIN && half) {
                for_each<M, V>([&](int m, int v) FLAT { f[m][v] = f[m][v] + splat(half[m]); });
                half += M;
            }
            for (int v = 0; v < V; v++) {
                const vf s_w = by_tile ? scale_at(w, S::panel(v), g, S::row(v, pass)) : vf{};
                for (int m = 0; m < M; m++) {
                    const vf before = near ? t[m][v] : load<vf>(sum(m, v));
                    t[m][v] = by_tile ? fused(f[m][v] * splat(s_a[m]), s_w, before)
                                       : fused(f[m][v], splat(s_a[m]), before);
                    if constexpr (!near) store(sum(m, v), t[m][v]);
                }
            }
            if constexpr (!near) forget_registers();
        }
        if constexpr (by_group) {
            for (int v = 0; v < V; v++) {
                const vf s_w = scale_at(w, S::panel(v), g, S::row(v, pass));
                for (int m = 0; m < M; m++) store(sum(m, v), fused(t[m][v], s_w, load<vf>(sum(m, v))));
            }
        }
    }
    if constexpr (!by_group && near) for_each<M, V>([&](int m, int v) FLAT { store(sum(m, v), t[m][v]); });
}

template <int BITS, int M, int P, Scaling SCALING>
void scaled(const Panels& w, const Strip& x, float* sums) {
    for (int pass = 0; pass < Vectors<BITS, P>::passes; pass++) {
        if constexpr (PAIRS) {  // 16 registers, of which zeros and halves would take some even where there are none
            if (!w.zero[0] && !x.half) {
                scaled_pass<BITS, M, P, SCALING, true>(w, x, sums, pass);
                continue;
            }
        }
        scaled_pass<BITS, M, P, SCALING, false>(w, x, sums, pass);
    }
}

// Sums [M, rows of P panels] of u a, exact, in int32.
template <int BITS, int M, int P>
INLINE void summed_pass(const Panels& w, const Strip& x, float* sums, int pass) {
    using S = Vectors<BITS, P>;
    constexpr int V = S::count;
    const auto sum = [&](int m, int v) FLAT { return sums + m * S::rows + S::place(v, pass); };
    vi i[M][V];
    for_each<M, V>([&](int m, int v) FLAT { i[m][v] = load<vi>(sum(m, v)); });
    const int8_t* a = x.codes;
    for (int64_t b = 0, at = 0; b < w.tiles; b++, at += w.step, a += SPAN_BYTES<BITS> * M) {
        if constexpr (prefetches<BITS, M, P>(READ_ONCE.panels_summed)) prefetch<BITS, P>(w, at);
        sum_tile<BITS, M, P>(w, at, pass, a, [&](int m, int v) FLAT { return i[m][v]; }, i);
    }
    for_each<M, V>([&](int m, int v) FLAT { store(sum(m, v), i[m][v]); });
}

template <int BITS, int M, int P>
void summed(const Panels& w, const Strip& x, float* sums) {
    for (int pass = 0; pass < Vectors<BITS, P>::passes; pass++) summed_pass<BITS, M, P>(w, x, sums, pass);
}

// One panel times floats: (u - z) x for each column, columns 4 q + j in the running sum j. Running sums begin anew with
// each group; of a row with one scale, every FOLD_TILES, so that it makes no difference where chunks end.
template <int BITS, int M>
void floating(const Panels& w, const Strip& x, float* sums) {
    const bool rows = w.group_tiles == 0;
    const int64_t fold = rows ? FOLD_TILES : w.group_tiles;
    for (int part = 0; part < PARTS; part++) {
        const float* a = x.floats;
        int64_t at = 0;
        for (int64_t first = 0; first < w.tiles; first += fold) {
            const int64_t g = rows ? 0 : first / fold, last = first + fold < w.tiles ? first + fold : w.tiles;
            vf z = splat(float(w.offset));
            if (w.zero[0]) z = to_float(zero_at(w, 0, g, part * LANES));
            if (w.half) z = z - 0.5f;
            vf t[M][4] = {};
            for (int64_t b = first; b < last; b++, at += w.step, a += TILE * M) {
#pragma GCC unroll QUADS_UNROLLED
                for (int quad = 0; quad < QUADS; quad++) {
                    vi u;
                    if constexpr (BITS == TRITS) {
                        vi all[BUNDLE];
                        take<BITS, BUNDLE>(w, at, quad, part, all);
                        u = all[w.which];
                    } else {
                        u = codes<BITS>(w.codes[0] + at, quad, part, w.table);
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        const vf value = to_float((vi)((vu)u >> 8 * j) & 0xff) - z;
                        for (int m = 0; m < M; m++) t[m][j] = fused(splat(a[m * TILE + quad * 4 + j]), value, t[m][j]);
                    }
                }
            }
            vf s_w = splat(1.0f);
            if (!rows) s_w = scale_at(w, 0, g, part * LANES);
            for (int m = 0; m < M; m++) {
                float* sum = sums + m * PANEL + part * LANES;
                store(sum, fused((t[m][0] + t[m][1]) + (t[m][2] + t[m][3]), s_w, load<vf>(sum)));
            }
        }
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
