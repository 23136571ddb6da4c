// y = x W^T for packed weights, compiled once per instruction set; kernel.h tells the layout.
//
// int8 activations. One block of 32 columns is eight integer dot products for every 16 rows; its exact sum becomes float32
// and is scaled:
//
//     t += float(sum over the block of (u - z) a) * s_a        one fused multiply-add for each block
//     y += t * s_w                                             another for each group, or one for the row
//
// With one scale for a token and one for a row nothing is scaled before the end. Float activations: the same with codes
// turned to floats, four running sums for a group. Blocks, groups and sums come in the same order wherever they are
// computed, so results do not depend on M, on threads, or on the instruction set.
//
// The work is cut into units of a few panels. A unit walks over its columns in chunks that stay in the first-level cache,
// and over the rows of x in tiles whose sums stay in registers. For many rows codes below 8 bits are unpacked once a chunk.
#include "buffer.h"
#include "functions.h"
#include "team.h"

namespace spicerack::SPICERACK_ISA {
namespace {

#if LANES == 16
constexpr int WIDE = 2, WIDER = 4, TALL = 6;  // panels of a tile (scaled by block; only summed), rows of x in it
constexpr int NARROW = 1, NARROWER = 2, TALLEST = 8;  // tiles that read each panel once for a few more rows of x
#else
constexpr int WIDE = 1, WIDER = 1, TALL = LANES == 8 ? 3 : 4;
constexpr int NARROW = 1, NARROWER = 1, TALLEST = TALL;
#endif
constexpr int TALL_TRITS = LANES == 16 ? 5 : 2;  // rows for a bundle of trits (only summed), unpacked before
constexpr int FEW_TRITS = LANES == 16 ? 3 : 1, FEWER_TRITS = LANES == 16 ? 4 : 2;  // the same, unpacked in registers
constexpr int WIDEST = BUNDLE;  // of all these tiles
constexpr int FEW = TALL < 4 ? TALL : 4;  // rows of x for which codes are unpacked in registers, for wide tiles
constexpr int FEW_ROWS = 2 * TALLEST;     // up to so many rows of x they are unpacked in registers at all; bytes: TALLEST
// The same for trits. The scalar engine never multiplies by one.
constexpr int64_t FEW_ROWS_TRITS = SCALAR ? INT64_MAX : 2 * FEW_TRITS;
constexpr int64_t FEW_ROWS_SUMMED_TRITS = SCALAR ? INT64_MAX : 2 * FEWER_TRITS;
constexpr int CHUNK = 512;           // columns
constexpr int LITTLE = 128;          // the same for bundles of trits and few rows of x
constexpr int64_t SLAB_BYTES = 1 << 18;  // of quantized x at once
constexpr int64_t SMALL = 1 << 18;   // multiply-adds that are worth a thread
constexpr int64_t EACH = 1 << 13;    // values of x that every thread quantizes for itself sooner than it waits for others
// Rows of x for each thread, from which every thread reads all weights and has some rows, so that none waits for another
// and what it reads and writes of x and y are its own: weights that fit its caches, and others.
constexpr int64_t NEAR_BYTES = 1 << 20, APART_NEAR = 16, APART = 128;
constexpr float LARGEST = 127.0f;    // int8 activations are -127..127
constexpr float FLUSH = 0x1p-100f;   // a block of activations below this counts as zeros: 1 / scale would overflow
constexpr int AHEAD = 4096;          // bytes to prefetch ahead of a panel's stream

// ---- codes ----------------------------------------------------------------------------------------------------------

// A shift to the right by `by`, or to the left by -by.
INLINE vi shift(vi x, int by) { return by >= 0 ? (vi)((vu)x >> by) : x << -by; }

// One vector of a tile: quad 0..7 of 4 columns, rows LANES * part and on. BITS 0 is a tile of bytes, unpacked before.
template <int BITS>
INLINE vi codes(const uint8_t* tile, int quad, int part) {
    tile += part * BYTES;
    if constexpr (BITS == 8 || BITS == 0) return load<vi>(tile + quad * 64);
    vi u{};
    int low = 0;
    if constexpr (BITS & 4) {
        u = shift(load<vi>(tile + quad / 2 * 64), 4 * (quad % 2)) & 0x0f0f0f0f;
        tile += 256;
        low = 4;
    }
    if constexpr (BITS & 2) {
        u |= shift(load<vi>(tile + quad / 4 * 64), 2 * (quad % 4) - low) & 0x03030303 << low;
        tile += 128;
        low += 2;
    }
    if constexpr (BITS & 1) u |= shift(load<vi>(tile), quad - low) & 0x01010101 << low;
    return u;
}

// To one byte a code: 512 bytes for each panel of the tile.
template <int BITS>
void unpack_tile(const uint8_t* tile, uint8_t* bytes) {
#pragma GCC unroll 8
    for (int quad = 0; quad < QUADS; quad++) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            const int at = quad * 64 + part * BYTES;
            if constexpr (BITS == TRITS) {
                vi u[BUNDLE];
                split_trits(load<vi>(tile + at), u);
                for (int p = 0; p < BUNDLE; p++) store(bytes + p * 8 * TILE_UNIT + at, u[p]);
            } else {
                store(bytes + at, codes<BITS>(tile, quad, part));
            }
        }
    }
}

// ---- one tile of x by a few panels, over a chunk of columns -----------------------------------------------------------

// Part of one matrix: where its panels begin at the chunk's first column.
struct Panels {
    const uint8_t* codes[WIDEST];  // step: bytes from tile to tile; trits: all in the first
    const uint8_t* scale[WIDEST];  // of the chunk's first group, in `type`
    const uint8_t* zero[WIDEST];   // null: none
    int64_t step;
    int64_t left, jump;           // bytes to a panel's end, and from there to the panel that its thread reads next
    int64_t blocks;               // of the chunk
    int which;                    // panel of a bundle of trits, where they are multiplied by floats
    int64_t group_blocks;         // 0: one scale a row, applied in the end
    Float type;
    int offset;
    bool half;
};

// A tile of x: for every block its M rows one after the other.
struct Inputs {
    const int8_t* codes;     // [blocks, M, 32]
    const float* scale;      // [blocks, M]
    const int32_t* start;    // [blocks, M]: -offset * sum of the codes; with zeros the sum itself, negated
    const float* half;       // [blocks, M]: half the sum of the codes, or null
    const float* floats;     // [blocks, M, 32], or null
};

// How the scales of weights change along a row.
enum Scales { one_a_row, one_a_block, one_a_group };

// A tile's vectors are V = P * parts: all parts of its panels at once, or one part of a bundle of trits.
template <int BITS, int P>
struct Shape {
    static constexpr bool trits = BITS == TRITS || P == BUNDLE;
    static constexpr int parts = trits ? 1 : PARTS, passes = PARTS / parts, vectors = P * parts, width = P * PANEL;
    static constexpr int panel(int v) { return v / parts; }
    // Where the vector's rows begin in a panel.
    static constexpr int row(int v, int pass) { return (v % parts + pass) * LANES; }
    static constexpr int place(int v, int pass) { return panel(v) * PANEL + row(v, pass); }
};

template <int BITS, int P>
INLINE void take(const Panels& w, int64_t at, int quad, int pass, vi* u) {
    using S = Shape<BITS, P>;
    if constexpr (BITS == TRITS) {
        split_trits(load<vi>(w.codes[0] + at + quad * 64 + pass * BYTES), u);
    } else {
        for (int v = 0; v < S::vectors; v++) u[v] = codes<BITS>(w.codes[S::panel(v)] + at, quad, v % S::parts + pass);
    }
}

// Into the second-level cache: the first has too few lines on their way at once, which cost a fifth of the bandwidth.
template <int BITS, int P>
INLINE void prefetch(const Panels& w, int64_t at) {
    constexpr int streams = BITS == TRITS ? 1 : P, lines = BITS == TRITS ? QUADS : BITS;
    at += at + AHEAD < w.left ? AHEAD : AHEAD + w.jump;
    for (int p = 0; p < streams; p++) {
        for (int line = 0; line < lines; line++) __builtin_prefetch(w.codes[p] + at + line * 64, 0, 2);
    }
}

INLINE vf scale_at(const Panels& w, int panel, int64_t group, int row) {
    return widen(w.scale[panel] + (group * PANEL + row) * size_of(w.type), w.type);
}

INLINE vi zero_at(const Panels& w, int panel, int64_t group, int row) {
    return from_bytes(w.zero[panel] + group * PANEL + row);
}

// Sums [M, WIDTH] in float32: of t with one scale a row, else of t s_w.
template <int BITS, int M, int P, Scales SCALES>
INLINE void scaled_pass(const Panels& w, const Inputs& x, float* sums, int pass) {
    using S = Shape<BITS, P>;
    constexpr int V = S::vectors;
    const int64_t group = SCALES == one_a_row ? w.blocks : SCALES == one_a_block ? 1 : w.group_blocks;
    const int8_t* a = x.codes;
    const float* s_a = x.scale;
    const int32_t* start = x.start;
    const float* half = x.half;
    vf t[M][V] = {};
    if constexpr (SCALES != one_a_group) {
        for (int m = 0; m < M; m++) {
            for (int v = 0; v < V; v++) t[m][v] = load<vf>(sums + m * S::width + S::place(v, pass));
        }
    }
    int64_t at = 0;
    for (int64_t g = 0; g * group < w.blocks; g++) {
        if constexpr (SCALES == one_a_group) {
            for (int m = 0; m < M; m++) {
                for (int v = 0; v < V; v++) t[m][v] = vf{};
            }
        }
        vi z[V] = {};
        if (w.zero[0]) {
            for (int v = 0; v < V; v++) {
                z[v] = small_factor(zero_at(w, S::panel(v), g, S::row(v, pass)) - SHIFT<BITS>);
            }
        }
        for (int64_t b = 0; b < group; b++, at += w.step, a += BLOCK * M, s_a += M, start += M) {
            vi i[M][V];
            for (int m = 0; m < M; m++) {
                for (int v = 0; v < V; v++) i[m][v] = four_bytes(start + m);
            }
            if (w.zero[0]) {
                for (int m = 0; m < M; m++) {
                    for (int v = 0; v < V; v++) i[m][v] = small_product(z[v], i[m][v]);
                }
            }
            if constexpr (BITS != 0 && (M <= FEW || P == NARROW)) prefetch<BITS, P>(w, at);
#pragma GCC unroll 8
            for (int quad = 0; quad < QUADS; quad++) {
                vi u[V];
                take<BITS, P>(w, at, quad, pass, u);
                for (int m = 0; m < M; m++) {
                    const vi four = four_bytes(a + m * BLOCK + quad * 4);
                    for (int v = 0; v < V; v++) i[m][v] = dot<BITS>(i[m][v], u[v], four);
                }
            }
            vf f[M][V];
            for (int m = 0; m < M; m++) {
                for (int v = 0; v < V; v++) f[m][v] = to_float(i[m][v]);
            }
            if (half) {
                for (int m = 0; m < M; m++) {
                    for (int v = 0; v < V; v++) f[m][v] = f[m][v] + splat(half[m]);
                }
                half += M;
            }
            for (int v = 0; v < V; v++) {
                const vf s_w = SCALES == one_a_block ? scale_at(w, S::panel(v), g, S::row(v, pass)) : vf{};
                for (int m = 0; m < M; m++) {
                    if constexpr (SCALES == one_a_block) {
                        t[m][v] = fused(f[m][v] * splat(s_a[m]), s_w, t[m][v]);
                    } else {
                        t[m][v] = fused(f[m][v], splat(s_a[m]), t[m][v]);
                    }
                }
            }
        }
        if constexpr (SCALES == one_a_group) {
            for (int v = 0; v < V; v++) {
                const vf s_w = scale_at(w, S::panel(v), g, S::row(v, pass));
                for (int m = 0; m < M; m++) {
                    float* sum = sums + m * S::width + S::place(v, pass);
                    store(sum, fused(t[m][v], s_w, load<vf>(sum)));
                }
            }
        }
    }
    if constexpr (SCALES != one_a_group) {
        for (int m = 0; m < M; m++) {
            for (int v = 0; v < V; v++) store(sums + m * S::width + S::place(v, pass), t[m][v]);
        }
    }
}

template <int BITS, int M, int P, Scales SCALES>
void scaled(const Panels& w, const Inputs& x, float* sums) {
    for (int pass = 0; pass < Shape<BITS, P>::passes; pass++) scaled_pass<BITS, M, P, SCALES>(w, x, sums, pass);
}

// Exact sums of u a alone, for one scale a token and one a row.
template <int BITS, int M, int P>
INLINE void summed_pass(const Panels& w, const Inputs& x, float* sums, int pass) {
    using S = Shape<BITS, P>;
    constexpr int V = S::vectors;
    vi i[M][V];
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) i[m][v] = load<vi>(sums + m * S::width + S::place(v, pass));
    }
    const int8_t* a = x.codes;
    for (int64_t b = 0, at = 0; b < w.blocks; b++, at += w.step, a += 32 * M) {
        if constexpr (BITS != 0 && (M <= FEW || P == NARROWER)) prefetch<BITS, P>(w, at);
#pragma GCC unroll 8
        for (int quad = 0; quad < QUADS; quad++) {
            vi u[V];
            take<BITS, P>(w, at, quad, pass, u);
            for (int m = 0; m < M; m++) {
                const vi four = four_bytes(a + m * BLOCK + quad * 4);
                for (int v = 0; v < V; v++) i[m][v] = dot<BITS>(i[m][v], u[v], four);
            }
        }
    }
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) store(sums + m * S::width + S::place(v, pass), i[m][v]);
    }
}

template <int BITS, int M, int P>
void summed(const Panels& w, const Inputs& x, float* sums) {
    for (int pass = 0; pass < Shape<BITS, P>::passes; pass++) summed_pass<BITS, M, P>(w, x, sums, pass);
}

// Float activations, one panel: (u - z) x for each column, columns 4 q + j in the running sum j.
template <int BITS, int M>
void floating(const Panels& w, const Inputs& x, float* sums) {
    const bool rows = w.group_blocks == 0;
    const int64_t group = rows ? w.blocks : w.group_blocks;
    for (int part = 0; part < PARTS; part++) {
        const float* a = x.floats;
        int64_t at = 0;
        for (int64_t g = 0; g * group < w.blocks; g++) {
            vf z = splat(float(w.offset));
            if (w.zero[0]) z = to_float(zero_at(w, 0, g, part * LANES));
            if (w.half) z = z - 0.5f;
            vf t[M][4] = {};
            for (int64_t b = 0; b < group; b++, at += w.step, a += 32 * M) {
#pragma GCC unroll 8
                for (int quad = 0; quad < QUADS; quad++) {
                    vi u;
                    if constexpr (BITS == TRITS) {
                        vi all[BUNDLE];
                        split_trits(load<vi>(w.codes[0] + at + quad * 64 + part * BYTES), all);
                        u = all[w.which];
                    } else {
                        u = codes<BITS>(w.codes[0] + at, quad, part);
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        const vf value = to_float((vi)((vu)u >> 8 * j) & 0xff) - z;
                        for (int m = 0; m < M; m++) t[m][j] = fused(splat(a[m * 32 + quad * 4 + j]), value, t[m][j]);
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

typedef void (*Body)(const Panels&, const Inputs&, float*);
typedef void (*Unpack)(const uint8_t*, uint8_t*);

// Bodies for tiles of so many rows, one less than the index.
struct Bodies {
    Body rows[TALLEST], blocks[TALLEST], groups[TALLEST], summed[TALLEST], floating[TALL];
    Unpack unpack;
};

// For LEAST to M rows, P panels (PS where only summed).
template <int BITS, int M, int LEAST, int P, int PS>
constexpr void add(Bodies& bodies) {
    bodies.rows[M - 1] = scaled<BITS, M, P, one_a_row>;
    bodies.blocks[M - 1] = scaled<BITS, M, P, one_a_block>;
    bodies.groups[M - 1] = scaled<BITS, M, P, one_a_group>;
    bodies.summed[M - 1] = summed<BITS, M, PS>;
    if constexpr (M <= TALL) bodies.floating[M - 1] = floating<BITS, M>;
    if constexpr (M > LEAST) add<BITS, M - 1, LEAST, P, PS>(bodies);
}

template <int BITS, int M>
constexpr Bodies wide_bodies() {
    Bodies bodies{{}, {}, {}, {}, {}, unpack_tile<BITS>};
    add<BITS, M, 1, WIDE, WIDER>(bodies);
    return bodies;
}

// For rows that are more than FEW, in tiles of nearly equal size.
template <int BITS>
constexpr Bodies narrow_bodies() {
    Bodies bodies{};
    add<BITS, TALLEST, (TALLEST + 1) / 2, NARROW, NARROWER>(bodies);
    return bodies;
}

template <int BITS, int M>
constexpr void add_summed(Bodies& bodies) {
    bodies.summed[M - 1] = summed<BITS, M, BUNDLE>;
    if constexpr (M > 1) add_summed<BITS, M - 1>(bodies);
}

// A bundle of trits, unpacked before (and only summed).
constexpr Bodies bundle_bodies() {
    Bodies bodies{{}, {}, {}, {}, {}, unpack_tile<TRITS>};
    add_summed<0, TALL>(bodies);  // tiles are that tall where another product that shares x is not only summed
    return bodies;
}

// The same, unpacked in registers.
constexpr Bodies few_bundle_bodies() {
    Bodies bodies{};
    add<TRITS, FEW_TRITS, 1, BUNDLE, BUNDLE>(bodies);
    add_summed<TRITS, FEWER_TRITS>(bodies);
    return bodies;
}

constexpr Bodies WIDE_BODIES[9] = {
    wide_bodies<0, TALL>(), {}, wide_bodies<2, FEW>(), wide_bodies<3, FEW>(), wide_bodies<4, FEW>(),
    wide_bodies<5, FEW>(), wide_bodies<6, FEW>(), wide_bodies<7, FEW>(), wide_bodies<8, TALL>()};
constexpr Bodies NARROW_BODIES[9] = {
    {}, {}, narrow_bodies<2>(), narrow_bodies<3>(), narrow_bodies<4>(),
    narrow_bodies<5>(), narrow_bodies<6>(), narrow_bodies<7>(), narrow_bodies<8>()};
constexpr Bodies BUNDLE_BODIES[2] = {bundle_bodies(), few_bundle_bodies()};

// ---- x ---------------------------------------------------------------------------------------------------------------

// Rows of x in tiles of nearly equal size, none larger than `tallest`.
struct Tiling {
    int64_t rows, tiles;

    INLINE Tiling(int64_t m, int64_t tallest) : rows(m), tiles((m + tallest - 1) / tallest) {}
    INLINE int64_t first(int64_t tile) const { return tile * (rows / tiles) + least(tile, rows % tiles); }
    INLINE int64_t height(int64_t tile) const { return rows / tiles + (tile < rows % tiles); }
};

// A slab of x as the bodies read it, in tiles. The tile that begins with row r begins at r * blocks * 32 (codes, floats)
// and r * blocks (scale, sums).
struct Slab {
    int64_t rows, k, blocks;
    const char* x;
    Float type;
    int8_t* codes;
    float* scale;    // one for each block, or 1 where tokens have their own
    int32_t* sums;   // of the codes of each block
    float* token;    // [rows], or null
    int32_t* total;  // [rows]: of all codes of a row
    float* floats;
    uint8_t* wild;   // [rows]: it holds a NaN or an infinity
};

INLINE int32_t across(vi x) {
    int32_t lanes[LANES], sum = 0;
    store(lanes, x);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

// The bits of the largest magnitude: those of infinity and NaN are above all others.
INLINE int32_t largest(vi magnitudes) {
    int32_t lanes[LANES], most = 0;
    store(lanes, magnitudes);
    for (int i = 0; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

#if LANES == 16
#define ACROSS(x) _mm512_reduce_add_epi32(raw(x))
#define LARGEST_OF(x) _mm512_reduce_max_epi32(raw(x))
#else
#define ACROSS(x) across(x)
#define LARGEST_OF(x) largest(x)
#endif

constexpr int32_t INFINITE = 0x7f800000;
constexpr int LOADS = BLOCK / LANES;

INLINE vi magnitude(vf x) { return (vi)x & 0x7fffffff; }

// 32 activations, zeros beyond the row's end.
template <class T>
INLINE void load_block(const Slab& s, int64_t row, int64_t block, vf* x) {
    const typename T::value* at = (const typename T::value*)s.x + row * s.k + block * BLOCK;
    const int64_t left = s.k - block * BLOCK;
    if (left >= BLOCK) {
        for (int i = 0; i < LOADS; i++) x[i] = T::widen(at + i * LANES);
    } else {
        typename T::value some[BLOCK] = {};
        std::memcpy(some, at, left * sizeof *at);
        for (int i = 0; i < LOADS; i++) x[i] = T::widen(some + i * LANES);
    }
}

// 127 / largest, and the scale itself; both 0 for a block of (nearly) nothing.
struct Step {
    float scale, inverse;
    INLINE explicit Step(float most) : scale(0), inverse(0) {
        if (most >= FLUSH) {
            scale = most / LARGEST;
            inverse = 1.0f / scale;
        }
    }
};

// Divided, a given scale has the codes that any other reader of it finds; a scale of our own costs a product.
template <bool DIVIDED>
INLINE int32_t round_block(const vf* x, const Step& step, int8_t* codes) {
    vi sum{};
    for (int i = 0; i < LOADS; i++) {
        const vf u = DIVIDED ? x[i] / splat(step.scale) : x[i] * step.inverse;
        const vi q = round_to_int(vmin(vmax(u, splat(-LARGEST)), splat(LARGEST)));
        sum += q;
        to_bytes(q, codes + i * LANES);
    }
    return ACROSS(sum);
}

// Row `row` of the slab, which is row r of a tile of `height` rows that begins with row `first`.
template <class T>
void quantize_row(const Slab& s, Activations how, float fixed_scale, int64_t first, int64_t height, int64_t r) {
    const int64_t row = first + r;
    int8_t* codes = s.codes + first * s.blocks * BLOCK + r * BLOCK;
    float* scale = s.scale + first * s.blocks + r;
    int32_t* sums = s.sums + first * s.blocks + r;
    const bool given = how == Activations::fixed;
    int32_t worst = 0, total = 0;
    vf x[LOADS];
    Step step(0);
    if (how != Activations::blocks) {
        vi most{};
        for (int64_t b = 0; b < s.blocks; b++) {
            load_block<T>(s, row, b, x);
            for (int i = 0; i < LOADS; i++) most = magnitude(x[i]) > most ? magnitude(x[i]) : most;
        }
        worst = LARGEST_OF(most);
        float value;
        std::memcpy(&value, &worst, 4);
        step = Step(worst < INFINITE ? value : 0);
        if (given) step.scale = fixed_scale;
        s.token[row] = step.scale;
    }
    for (int64_t b = 0; b < s.blocks; b++, codes += BLOCK * height, scale += height, sums += height) {
        load_block<T>(s, row, b, x);
        if (how == Activations::blocks) {
            vi most{};
            for (int i = 0; i < LOADS; i++) most = magnitude(x[i]) > most ? magnitude(x[i]) : most;
            const int32_t bits = LARGEST_OF(most);
            worst = bits > worst ? bits : worst;
            float value;
            std::memcpy(&value, &bits, 4);
            step = Step(bits < INFINITE ? value : 0);
        }
        *scale = how == Activations::blocks ? step.scale : 1.0f;
        *sums = given ? round_block<true>(x, step, codes) : round_block<false>(x, step, codes);
        total += *sums;
    }
    s.total[row] = total;
    s.wild[row] = worst >= INFINITE;
}

template <class T>
void widen_row(const Slab& s, int64_t first, int64_t height, int64_t r) {
    float* floats = s.floats + first * s.blocks * BLOCK + r * BLOCK;
    for (int64_t b = 0; b < s.blocks; b++, floats += BLOCK * height) {
        vf x[LOADS];
        load_block<T>(s, first + r, b, x);
        for (int i = 0; i < LOADS; i++) store(floats + i * LANES, x[i]);
    }
}

// ---- units -------------------------------------------------------------------------------------------------------------

// One slab, with what its products need besides.
struct Job {
    const Call* call;
    Activations how;
    int64_t row0;                  // the slab's first row in x and y
    bool few, narrow;              // rows of x; tiles
    Tiling tiling;
    Slab slab;
    const int64_t* first_unit;     // [count + 1]
    int32_t* const* starts;        // for each product: what its sums begin with, as in Inputs
    float* halves;                 // half the sums

    INLINE int64_t units() const { return first_unit[call->count]; }
};

struct Scratch {
    Buffer<uint8_t> bytes;
    Buffer<float> sums;
};

INLINE bool only_summed(Activations how, const Weights& w) {
    return how != Activations::floats && how != Activations::blocks && w.group == 0;
}

// Panels of a unit of work, and how many of them a body multiplies at once.
struct Cut {
    int unit, body;
};

INLINE Cut cut_of(Activations how, const Weights& w, bool few, bool narrow) {
    if (how == Activations::floats) return {1, 1};
    const bool summed = only_summed(how, w);
    if (w.bits == TRITS) {
        if (few || summed) return {BUNDLE, BUNDLE};
        return {2 * BUNDLE, WIDE};
    }
    const int panels = summed ? (narrow ? NARROWER : WIDER) : narrow ? NARROW : WIDE;
    return {panels, panels};
}

// What dot products leave out of every code.
INLINE int shift_of(const Weights& w) { return w.bits == 8 ? SHIFT<8> : w.bits == TRITS ? SHIFT<TRITS> : 0; }

// Where y of one tile will be written: its rows lie apart, so that no processor foresees it.
INLINE void expect(const Job& job, const Product& product, int64_t panel, int width, int64_t first, int64_t rows) {
    const int64_t size = size_of(job.call->type), line = product.weights.n * size;
    const char* y = (const char*)product.y + (job.row0 + first) * line + panel * PANEL * size;
    for (int64_t m = 0; m < rows; m++, y += line) {
        for (int64_t i = 0; i < width * PANEL * size; i += 64) __builtin_prefetch(y + i, 1);
    }
}

// y of one tile, `rows` rows from `first` on, from its sums [rows, width].
INLINE void finish(const Job& job, const Product& product, int64_t panel, int width, bool integers, int64_t first,
                   int64_t rows, const float* sums) {
    const Weights& w = product.weights;
    const Slab& s = job.slab;
    const Float type = job.call->type;
    const int shift = shift_of(w);
    const int64_t last = least(panel + width, w.panels());
    for (int64_t p = panel; p < last; p++) {
        for (int part = 0; part < PARTS; part++) {
            const int64_t n = p * PANEL + part * LANES, count = least(w.n - n, LANES);
            if (count <= 0) break;
            const int64_t at = p * PANEL + part * LANES;  // with one scale a row
            vf s_w = splat(1.0f), bias{};
            vi zero = splat_int(w.offset);
            if (w.group == 0) s_w = widen((const char*)w.scale + at * size_of(w.scale_type), w.scale_type);
            if (w.group == 0 && w.zero) zero = from_bytes(w.zero + at);
            if (product.bias) bias = widen_some((const char*)product.bias + n * size_of(type), type, count);
            char* y = (char*)product.y + ((job.row0 + first) * w.n + n) * size_of(type);
            const float* sum = sums + (p - panel) * PANEL + part * LANES;
            for (int64_t m = first; m < first + rows; m++, y += w.n * size_of(type), sum += width * PANEL) {
                vf value;
                if (integers) {
                    value = to_float(load<vi>(sum) - (zero - shift) * s.total[m]);
                    if (w.half) value = value + splat(0.5f * float(s.total[m]));
                } else {
                    value = load<vf>(sum);
                }
                value = value * s_w;
                if (s.token) value = value * splat(s.token[m]);
                if (product.bias) value = value + bias;
                if (product.gelu) value = gelu(value);
                narrow(value, type, y, count);
            }
        }
    }
}

// Fetches the next chunk of some panels, a part at a time, while this one is multiplied: of these panels, or the first
// chunk of those that follow.
struct Ahead {
    const char* at[WIDEST]{};
    int64_t left, each;
    int width;

    // bundle: the first of `count`, of one panel each but for trits. block: where the next chunk begins, or their end.
    INLINE Ahead(const Weights& w, int64_t bundle, int count, int64_t block, int64_t chunk, int64_t steps) : width(count) {
        if (block == w.blocks()) {
            bundle += count;
            block = 0;
        }
        if (bundle + count > w.bundles()) width = 0;
        left = least(chunk, w.blocks() - block) * w.tile_bytes();
        each = (left / steps + 63) / 64 * 64;
        for (int p = 0; p < width; p++) at[p] = (const char*)w.tile(bundle + p, block);
    }
    INLINE void step() {
        const int64_t count = least(each, left);
        for (int p = 0; p < width; p++) {
            for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(at[p] + i, 0, 2);
            at[p] += count;
        }
        left -= count;
    }
};

void run_unit(const Job& job, int64_t unit, Scratch& scratch) {
    int which = 0;
    while (unit >= job.first_unit[which + 1]) which++;
    const Product& product = job.call->products[which];
    const Weights& w = product.weights;
    const Slab& s = job.slab;
    const bool floats = job.how == Activations::floats;
    const bool integers = only_summed(job.how, w), trits = w.bits == TRITS;
    const bool direct = w.bits == 8 || job.few;
    const Cut cut = cut_of(job.how, w, job.few, job.narrow);
    const int64_t panel = (unit - job.first_unit[which]) * cut.unit;
    const int64_t bundle = trits ? panel / BUNDLE : panel;
    const int bundles = trits && !floats ? cut.unit / BUNDLE : cut.unit;
    const Bodies& bodies = cut.body == BUNDLE ? BUNDLE_BODIES[direct]
                           : job.narrow       ? NARROW_BODIES[w.bits]
                                              : WIDE_BODIES[direct ? w.bits : 0];
    const Body* body = floats             ? (trits ? BUNDLE_BODIES[1] : bodies).floating
                       : integers           ? bodies.summed
                       : w.group == 0       ? bodies.rows
                       : w.group == BLOCK   ? bodies.blocks
                                            : bodies.groups;
    const Unpack unpack = trits ? BUNDLE_BODIES[0].unpack : WIDE_BODIES[w.bits].unpack;
    // Those of a body's panels lie together.
    float* sums = scratch.sums.need(s.rows * cut.unit * PANEL);
    std::memset(sums, 0, s.rows * cut.unit * PANEL * sizeof(float));
    const int64_t body_sums = s.rows * cut.body * PANEL;
    const int64_t group = w.group / BLOCK;
    int64_t chunk = job.tiling.tiles == 1 && direct ? s.blocks
                    : trits && s.rows <= 4 * TALL          ? LITTLE / BLOCK
                                                           : CHUNK / BLOCK;
    if (group) chunk = most(chunk / group, 1) * group;
    for (int64_t b = 0; b < s.blocks; b += chunk) {
        Panels part{};
        part.blocks = least(chunk, s.blocks - b);
        part.group_blocks = group;
        part.type = w.scale_type;
        part.offset = w.offset;
        part.half = w.half;
        part.step = direct ? w.tile_bytes() : cut.unit * 8 * TILE_UNIT;
        part.left = (s.blocks - b) * w.tile_bytes();
        part.jump = (bundles - 1) * s.blocks * w.tile_bytes();
        part.which = int(panel % BUNDLE);
        uint8_t* bytes = direct ? nullptr : scratch.bytes.need(chunk * part.step);
        for (int i = 0; i < bundles && !direct; i++) {
            const uint8_t* tile = w.tile(least(bundle + i, w.bundles() - 1), b);  // beyond the last, it again
            uint8_t* to = bytes + i * (trits ? BUNDLE : 1) * 8 * TILE_UNIT;
            for (int64_t j = 0; j < part.blocks; j++, tile += w.tile_bytes(), to += part.step) unpack(tile, to);
        }
        Ahead ahead(w, bundle, bundles, b + chunk < s.blocks ? b + chunk : s.blocks, chunk,
                    job.tiling.tiles * (cut.unit / cut.body));
        for (int done = 0; done < cut.unit; done += cut.body) {
            for (int p = 0; p < cut.body; p++) {
                const int64_t from = least(panel + done + p, w.panels() - 1), at = from * w.groups() + (group ? b / group : 0);
                part.codes[p] = direct ? w.tile(trits ? bundle : from, b) : bytes + (done + p) * 8 * TILE_UNIT;
                part.scale[p] = (const uint8_t*)w.scale + at * PANEL * size_of(w.scale_type);
                part.zero[p] = w.zero ? w.zero + at * PANEL : nullptr;
            }
            for (int64_t t = 0; t < job.tiling.tiles; t++) {
                const int64_t first = job.tiling.first(t), height = job.tiling.height(t);
                const int64_t at = first * s.blocks + b * height;
                if (!job.few) ahead.step();
                Inputs x{};
                if (floats) {
                    x.floats = s.floats + at * BLOCK;
                } else {
                    x.codes = s.codes + at * BLOCK;
                    x.scale = s.scale + at;
                    x.start = integers ? nullptr : job.starts[which] + at;
                    x.half = w.half && !integers ? job.halves + at : nullptr;
                }
                const bool last = b + chunk >= s.blocks;
                if (last) expect(job, product, panel + done, cut.body, first, height);
                float* tile = sums + done / cut.body * body_sums + first * cut.body * PANEL;
                body[height - 1](part, x, tile);
                if (last) finish(job, product, panel + done, cut.body, integers, first, height, tile);
            }
        }
    }
}

// Tiles first..last of x become what the bodies read.
template <class T>
void prepare_as(const Job& job, int64_t first_tile, int64_t last_tile) {
    const Slab& s = job.slab;
    for (int64_t t = first_tile; t < last_tile; t++) {
        const int64_t first = job.tiling.first(t), height = job.tiling.height(t);
        if (job.how == Activations::floats) {
            for (int64_t r = 0; r < height; r++) widen_row<T>(s, first, height, r);
            continue;
        }
        for (int64_t r = 0; r < height; r++) quantize_row<T>(s, job.how, job.call->fixed_scale, first, height, r);
        const int64_t begin = first * s.blocks, end = begin + height * s.blocks;
        for (int i = 0; i < job.call->count; i++) {
            const Weights& w = job.call->products[i].weights;
            // With zeros: minus the sums. Without: minus offset times the sums.
            const int32_t factor = w.zero ? 1 : w.offset - shift_of(w);
            for (int64_t at = begin; at < end; at++) job.starts[i][at] = -factor * s.sums[at];
        }
        if (job.halves) {
            for (int64_t at = begin; at < end; at++) job.halves[at] = 0.5f * float(s.sums[at]);
        }
    }
}

void prepare(const Job& job, int64_t first_tile, int64_t last_tile) {
    switch (job.call->type) {
        case Float::f32: return prepare_as<F32>(job, first_tile, last_tile);
        case Float::f16: return prepare_as<F16>(job, first_tile, last_tile);
        case Float::bf16: return prepare_as<BF16>(job, first_tile, last_tile);
    }
}

// The units of one member of a team. Each takes its own in order, so that a layer's weights stay in the caches where they
// were; who is done takes from the others.
struct alignas(64) Share {
    int64_t next, last;
};

// The memory of one thread's slab.
struct Arena {
    Buffer<int8_t> codes;
    Buffer<float> scale, token, floats, halves;
    Buffer<int32_t> sums, total, starts;
    Buffer<uint8_t> wild;
    Buffer<int32_t*> start_of;
    Buffer<int64_t> first_unit;
    Buffer<Share> shares;
    Scratch scratch;
};

INLINE Arena& own_arena() {
    static thread_local Arena arena;
    return arena;
}

Job make_job(const Call& call, Activations how, int64_t row0, int64_t rows, Arena& arena) {
    const Weights& w0 = call.products[0].weights;
    bool bytes = false, summed = true;
    for (int i = 0; i < call.count; i++) {
        bytes |= call.products[i].weights.bits == 8;
        summed &= only_summed(how, call.products[i].weights);
    }
    bool few, narrow = false;
    int height;
    if (w0.bits == TRITS) {  // then all are
        few = rows <= (summed ? FEW_ROWS_SUMMED_TRITS : FEW_ROWS_TRITS) || how == Activations::floats;
        height = how == Activations::floats ? 1 : few ? (summed ? FEWER_TRITS : FEW_TRITS) : summed ? TALL_TRITS : TALL;
    } else {
        few = rows <= (bytes ? TALLEST : FEW_ROWS);
        narrow = few && rows > FEW && how != Activations::floats;
        height = narrow ? TALLEST : few ? FEW : TALL;
    }
    Job job{&call, how, row0, few, narrow, Tiling(rows, height), {}, nullptr, nullptr, nullptr};
    Slab& s = job.slab;
    s.rows = rows;
    s.k = w0.k;
    s.blocks = w0.blocks();
    s.x = (const char*)call.x + row0 * s.k * size_of(call.type);
    s.type = call.type;
    int64_t* first_unit = arena.first_unit.need(call.count + 1);
    job.first_unit = first_unit;
    first_unit[0] = 0;
    bool half = false;
    for (int i = 0; i < call.count; i++) {
        const Weights& w = call.products[i].weights;
        const int width = cut_of(how, w, few, narrow).unit;
        first_unit[i + 1] = first_unit[i] + (w.panels() + width - 1) / width;
        half |= w.half;
    }
    const int64_t count = rows * s.blocks;
    if (how == Activations::floats) {
        s.floats = arena.floats.need(count * BLOCK);
        return job;
    }
    s.codes = arena.codes.need(count * BLOCK);
    s.scale = arena.scale.need(count);
    s.sums = arena.sums.need(count);
    s.total = arena.total.need(rows);
    s.wild = arena.wild.need(rows);
    if (how != Activations::blocks) s.token = arena.token.need(rows);
    if (half) job.halves = arena.halves.need(count);
    int32_t* starts = arena.starts.need(count * call.count);
    int32_t** start_of = arena.start_of.need(call.count);
    for (int i = 0; i < call.count; i++) start_of[i] = starts + i * count;
    job.starts = start_of;
    return job;
}

// Rows `row0` and on, by one thread alone.
void run_alone(const Call& call, Activations how, int64_t row0, int64_t rows);

// Rows that int8 cannot hold are what float arithmetic makes of them.
void redo_wild(const Job& job) {
    if (job.how == Activations::floats) return;
    for (int64_t m = 0; m < job.slab.rows; m++) {
        if (job.slab.wild[m]) run_alone(*job.call, Activations::floats, job.row0 + m, 1);
    }
}

void run_alone(const Call& call, Activations how, int64_t row0, int64_t rows) {
    Arena& arena = own_arena();
    const Job job = make_job(call, how, row0, rows, arena);
    prepare(job, 0, job.tiling.tiles);
    for (int64_t unit = 0; unit < job.units(); unit++) run_unit(job, unit, arena.scratch);
    redo_wild(job);
}

// All threads on one slab, each with some of the units.
struct Together {
    const Job* job;
    Share* shares;
    int count;       // of shares
    bool each;       // prepares x for itself, rather than wait for the others
};

void work_together(void* context, Member me) {
    const Together& all = *(const Together*)context;
    Arena& arena = own_arena();
    Job job = *all.job;
    if (all.each) {
        if (me.index != 0) job = make_job(*job.call, job.how, job.row0, job.slab.rows, arena);
        prepare(job, 0, job.tiling.tiles);
    } else {
        const int64_t tiles = job.tiling.tiles;
        prepare(job, tiles * me.index / me.count, tiles * (me.index + 1) / me.count);
        wait_for_all(me);
    }
    for (int i = 0; i < all.count; i++) {
        Share& share = all.shares[(me.index + i) % all.count];
        for (int64_t unit; (unit = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.last;) {
            run_unit(job, unit, arena.scratch);
        }
    }
}

void run_together(const Call& call, int64_t row0, int64_t rows, int threads) {
    Arena& arena = own_arena();
    const Job job = make_job(call, call.activations, row0, rows, arena);
    Together all{&job, arena.shares.need(threads), threads, rows * job.slab.k <= EACH};
    for (int i = 0; i < threads; i++) {
        all.shares[i] = {job.units() * i / threads, job.units() * (i + 1) / threads};
    }
    run_team(threads, work_together, &all);
    redo_wild(job);
}

// Rows cut into parts, one for each thread, which takes them slab by slab.
struct Apart {
    const Call* call;
    int64_t slab;
};

void work_apart(void* context, Member me) {
    const Apart& all = *(const Apart*)context;
    const Call& call = *all.call;
    const Tiling parts(call.m, (call.m + me.count - 1) / me.count);
    if (me.index >= parts.tiles) return;
    const int64_t first = parts.first(me.index), last = first + parts.height(me.index);
    for (int64_t row = first; row < last; row += all.slab) {
        run_alone(call, call.activations, row, least(all.slab, last - row));
    }
}

}  // namespace

void linear(const Call& call) {
    const Weights& w0 = call.products[0].weights;
    int64_t n = 0, bytes = 0;
    for (int i = 0; i < call.count; i++) {
        const Weights& w = call.products[i].weights;
        n += w.n;
        bytes += w.bundles() * w.blocks() * w.tile_bytes();
    }
    const int64_t slab = most(SLAB_BYTES / (w0.blocks() * BLOCK) / TALL * TALL, 16 * TALL);
    const int64_t useful = call.m * w0.k * n / SMALL + 1;
    const int threads = int(least(call.threads, useful));
    const int64_t rows = call.m / threads;
    if (threads == 1 || rows >= (bytes <= NEAR_BYTES ? APART_NEAR : APART)) {
        Apart all{&call, slab};
        run_team(threads, work_apart, &all);
    } else {
        for (int64_t row = 0; row < call.m; row += slab) run_together(call, row, least(slab, call.m - row), threads);
    }
}

int64_t spin(int64_t rounds) {
    constexpr int CHAINS = 12;
    vi acc[CHAINS] = {}, u = splat_int(0x01020304), a = splat_int(0x04030201);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) {
            acc[c] = dot<4>(acc[c], u, a);
#if defined(__x86_64__)
            __asm__ volatile("" : "+v"(acc[c]), "+v"(u));
#elif defined(__aarch64__)
            __asm__ volatile("" : "+w"(acc[c]), "+w"(u));
#endif
        }
    }
    return rounds * CHAINS * LANES * 4 * 2;
}

int64_t read(const void* data, int64_t bytes) {
    const char* at = (const char*)data;
    vi acc[8] = {};
    for (int64_t i = 0; i + 8 * BYTES <= bytes; i += 8 * BYTES) {
        for (int j = 0; j < 8; j++) acc[j] ^= load<vi>(at + i + j * BYTES);
    }
    for (int j = 1; j < 8; j++) acc[0] ^= acc[j];
    return ACROSS(acc[0]);
}

}  // namespace spicerack::SPICERACK_ISA
