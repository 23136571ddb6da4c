// Bodies for groups in blocks, as kernel.h tells: with minima, with scales that are quantized themselves, of half a tile.
// Part of linear.cpp.
//
// A tile, or each half of one, is scaled by itself, however many share a scale: t += f s_w, and then t += (sum of x) m,
// each a fused multiply-add. Outer scales are loaded once for a block of groups.
#pragma once

#include "bodies.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// What a group's scale or minimum is stored as, as a number.
INLINE vf stored_at(const uint8_t* p, ScaleType type) {
    if (type == ScaleType::int8) return to_float(from_signed_bytes(p));
    if (type == ScaleType::e4m3) {
        const vi x = from_signed_bytes(p), code = x & 0x7f;
        const vi magnitude = code > 0x7e ? 0x7e : code;  // NaN counts as the largest
        const vi normal = (magnitude << 20) + (120 << 23);  // an exponent's bias of 7 becomes float32's
        return (vf)((magnitude < 8 ? (vi)(to_float(magnitude) * 0x1p-9f) : normal) | (x & INT32_MIN));
    }
    return widen(p, Float(type));
}

// The scale (kind 0) or minimum (1) of a group for LANES rows of a panel, or an outer one of a block.
INLINE vf step_at(const Panels& w, int panel, int64_t group, int kind, int row) {
    return stored_at(w.scale[panel] + ((group * (1 + w.minima) + kind) * PANEL + row) * size_of(w.type), w.type);
}
INLINE vf outer_at(const Panels& w, int panel, int64_t block, int kind, int row) {
    if (!w.outer[panel]) return splat(1.0f);
    return widen(w.outer[panel] + ((block * (1 + w.minima) + kind) * PANEL + row) * size_of(w.outer_type), w.outer_type);
}

// Calls body(tile, group, block) for the tiles of a chunk, all counted from its beginning; of half a tile: its first
// group. new_block(block) comes before the first tile of each.
template <int HALVES, class New, class Body>
INLINE void for_each_tile(const Panels& w, const New& new_block, const Body& body) {
    const int64_t block_tiles = w.block_tiles ? w.block_tiles : w.tiles;
    const int64_t group_tiles = HALVES == 2 ? 1 : w.group_tiles ? w.group_tiles : w.tiles;
    for (int64_t tile = 0, group = 0, block = 0; tile < w.tiles; block++) {
        new_block(block);
        const int64_t end = tile + block_tiles < w.tiles ? tile + block_tiles : w.tiles;
        for (; tile < end; group += HALVES) {
            for (int64_t i = 0; i < group_tiles; i++, tile++) body(tile, group);
        }
    }
}

// A tile's first or second half, or all of it, added to the sums t of one pass.
template <int BITS, int M, int P, int HALVES, int HALF>
struct Piece {
    using S = Vectors<BITS, P>;
    static constexpr int V = S::count;

    const Panels& w;
    const Strip& x;
    int64_t tile, group;
    int pass;
    const vf* outer;  // [2, V]

    INLINE vf step(int v, int kind) const {
        return step_at(w, S::panel(v), group + HALF, kind, S::row(v, pass)) * outer[kind * V + v];
    }
    // add(m, v, a, b): t += a b.
    template <class Add>
    INLINE void operator()(const Add& add) const {
        const int8_t* a = x.codes + tile * SPAN_BYTES<BITS> * M;
        const int32_t* start = x.start + (tile * HALVES + HALF) * M;
        const float* s_a = x.scale + tile * M;
        vi i[M][V];
        const auto begin = [&](int m, int) FLAT { return four_bytes(start + m); };
        sum_tile<BITS, M, P, HALVES, HALF>(w, tile * w.step, pass, a, begin, i);
        for (int v = 0; v < V; v++) {
            const vf s_w = step(v, 0);
            for (int m = 0; m < M; m++) add(m, v, to_float(i[m][v]) * splat(s_a[m]), s_w);
        }
        if (!w.minima) return;
        const float* sum = x.sum + (tile * HALVES + HALF) * M;
        for (int v = 0; v < V; v++) {
            const vf m_w = step(v, 1);
            for (int m = 0; m < M; m++) add(m, v, splat(sum[m]), m_w);
        }
    }
};

// Sums [M, rows of P panels], in float32, of the rows that one pass has vectors for.
template <int BITS, int M, int P, int HALVES>
INLINE void blocks_pass(const Panels& w, const Strip& x, float* sums, int pass) {
    using S = Vectors<BITS, P>;
    constexpr int V = S::count;
    constexpr bool near = M * V < SUMS_IN_REGISTERS;  // as in scaled_pass
    const auto sum = [&](int m, int v) FLAT { return sums + m * S::rows + S::place(v, pass); };
    vf t[M][V] = {}, outer[2 * V];
    if constexpr (near) for_each<M, V>([&](int m, int v) FLAT { t[m][v] = load<vf>(sum(m, v)); });
    const auto add = [&](int m, int v, vf a, vf b) FLAT {
        if constexpr (near) t[m][v] = fused(a, b, t[m][v]);
        if constexpr (!near) store(sum(m, v), fused(a, b, load<vf>(sum(m, v))));
    };
    const auto new_block = [&](int64_t block) FLAT {
        for (int v = 0; v < V; v++) {
            outer[v] = outer_at(w, S::panel(v), block, 0, S::row(v, pass));
            if (w.minima) outer[V + v] = outer_at(w, S::panel(v), block, 1, S::row(v, pass));
        }
    };
    for_each_tile<HALVES>(w, new_block, [&](int64_t tile, int64_t group) FLAT {
        if constexpr (prefetches<BITS, M, P>(READ_ONCE.panels_scaled)) prefetch<BITS, P>(w, tile * w.step);
        Piece<BITS, M, P, HALVES, 0>{w, x, tile, group, pass, outer}(add);
        if constexpr (HALVES == 2) Piece<BITS, M, P, HALVES, 1>{w, x, tile, group, pass, outer}(add);
        if constexpr (!near) forget_registers();
    });
    if constexpr (near) for_each<M, V>([&](int m, int v) FLAT { store(sum(m, v), t[m][v]); });
}

template <int BITS, int M, int P, int HALVES>
void blocks(const Panels& w, const Strip& x, float* sums) {
    for (int pass = 0; pass < Vectors<BITS, P>::passes; pass++) blocks_pass<BITS, M, P, HALVES>(w, x, sums, pass);
}

// One panel times floats: each weight as decoding rounds it, columns 4 q + j in the running sum j, which begins anew with
// each tile, so that it makes no difference where chunks end.
template <int BITS, int M>
void floating_blocks(const Panels& w, const Strip& x, float* sums) {
    const bool halves = w.halves;
    for (int part = 0; part < PARTS; part++) {
        const int row = part * LANES;
        const float* a = x.floats;
        const vf z = splat(float(w.offset));
        vf outer[2]{};
        const auto new_block = [&](int64_t block) FLAT {
            outer[0] = outer_at(w, 0, block, 0, row);
            if (w.minima) outer[1] = outer_at(w, 0, block, 1, row);
        };
        const auto tile = [&](int64_t number, int64_t group) FLAT {
            vf t[M][4] = {}, s_w{}, m_w{};
#pragma GCC unroll QUADS_UNROLLED
            for (int quad = 0; quad < QUADS; quad++) {
                if (quad % (QUADS / 2) == 0 && (quad == 0 || halves)) {
                    s_w = step_at(w, 0, group + (quad != 0), 0, row) * outer[0];
                    if (w.minima) m_w = step_at(w, 0, group + (quad != 0), 1, row) * outer[1];
                }
                const vi u = codes<BITS>(w.codes[0] + number * w.step, quad, part, w.table);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    vf value = (to_float((vi)((vu)u >> 8 * j) & 0xff) - z) * s_w;
                    if (w.minima) value = value + m_w;
                    for (int m = 0; m < M; m++) t[m][j] = fused(splat(a[m * TILE + quad * 4 + j]), value, t[m][j]);
                }
            }
            for (int m = 0; m < M; m++) {
                float* sum = sums + m * PANEL + row;
                store(sum, load<vf>(sum) + ((t[m][0] + t[m][1]) + (t[m][2] + t[m][3])));
            }
            a += TILE * M;
        };
        halves ? for_each_tile<2>(w, new_block, tile) : for_each_tile<1>(w, new_block, tile);
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
