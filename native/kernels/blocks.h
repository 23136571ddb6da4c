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

// Calls new_block(block), new_group(group) and body(tile) where these begin, all counted from the chunk's beginning. Half
// tiles: each has two groups, of which new_group gets the first.
template <class Block, class Group, class Body>
INLINE void for_each_tile(const Panels& w, int halves, const Block& new_block, const Group& new_group, const Body& body) {
    const int64_t block_tiles = w.block_tiles ? w.block_tiles : w.tiles;
    const int64_t group_tiles = halves == 2 ? 1 : w.group_tiles ? w.group_tiles : w.tiles;
    for (int64_t tile = 0, group = 0, block = 0; tile < w.tiles; block++) {
        new_block(block);
        const int64_t end = tile + block_tiles < w.tiles ? tile + block_tiles : w.tiles;
        for (; tile < end; group += halves) {
            new_group(group);
            for (int64_t i = 0; i < group_tiles; i++, tile++) body(tile);
        }
    }
}

// Scales and minima of a tile, for all vectors.
template <int BITS, int P, int HALVES>
struct Steps {
    using S = Vectors<BITS, P>;
    static constexpr int V = S::count;

    vf outer[2 * V]{}, steps[HALVES * 2 * V]{};

    INLINE void new_block(const Panels& w, int pass, int64_t block) {
        const int count = w.minima ? 2 * V : V;
#pragma GCC unroll 1
        for (int i = 0; i < count; i++) {
            outer[i] = outer_at(w, S::panel(i % V), block, i / V, S::row(i % V, pass));
        }
    }
    INLINE void new_group(const Panels& w, int pass, int64_t group) {
#pragma GCC unroll STEPS_UNROLLED
        for (int i = 0; i < HALVES * 2 * V; i++) {
            const int kind = i / V % 2;
            if (kind && !w.minima) continue;
            const vf stored = step_at(w, S::panel(i % V), group + i / (2 * V), kind, S::row(i % V, pass));
            steps[i] = stored * outer[kind * V + i % V];
        }
    }
    INLINE vf at(int half, int kind, int v) const { return steps[(half * 2 + kind) * V + v]; }
};

// A tile's first or second half, or all of it, added to the sums t of one pass by add(m, v, a, b): t += a b.
template <int BITS, int M, int P, int HALVES, int HALF, class Add>
INLINE void add_piece(const Panels& w, const Strip& x, int64_t tile, int pass, const Steps<BITS, P, HALVES>& steps,
                      const Add& add) {
    constexpr int V = Vectors<BITS, P>::count;
    const int64_t first = (tile * HALVES + HALF) * M;
    const int8_t* a = x.codes + tile * SPAN_BYTES<BITS> * M;
    const int32_t* start = x.start + first;
    const float* s_a = x.scale + tile * M;
    const auto begin = [&](int m, int) FLAT { return four_bytes(start + m); };
    vi i[M][V];
    sum_tile<BITS, M, P, HALVES, HALF>(w, tile * w.step, pass, a, begin, i);
    for (int v = 0; v < V; v++) {
        for (int m = 0; m < M; m++) add(m, v, to_float(i[m][v]) * splat(s_a[m]), steps.at(HALF, 0, v));
    }
    if (!w.minima) return;
    const float* sum = x.sum + first;
    for (int v = 0; v < V; v++) {
        for (int m = 0; m < M; m++) add(m, v, splat(sum[m]), steps.at(HALF, 1, v));
    }
}

// Sums [M, rows of P panels], in float32, of the rows that one pass has vectors for.
template <int BITS, int M, int P, int HALVES>
INLINE void blocks_pass(const Panels& w, const Strip& x, float* sums, int pass) {
    using S = Vectors<BITS, P>;
    constexpr int V = S::count;
    constexpr bool near = M * V < SUMS_IN_REGISTERS;  // as in scaled_pass
    const auto sum = [&](int m, int v) FLAT { return sums + m * S::rows + S::place(v, pass); };
    vf t[M][V] = {};
    Steps<BITS, P, HALVES> steps;
    if constexpr (near) for_each<M, V>([&](int m, int v) FLAT { t[m][v] = load<vf>(sum(m, v)); });
    const auto add = [&](int m, int v, vf a, vf b) FLAT {
        if constexpr (near) t[m][v] = fused(a, b, t[m][v]);
        if constexpr (!near) store(sum(m, v), fused(a, b, load<vf>(sum(m, v))));
    };
    const auto new_block = [&](int64_t block) FLAT { steps.new_block(w, pass, block); };
    const auto new_group = [&](int64_t group) FLAT { steps.new_group(w, pass, group); };
    for_each_tile(w, HALVES, new_block, new_group, [&](int64_t tile) FLAT {
        if constexpr (prefetches<BITS, M, P>(READ_ONCE.panels_scaled)) prefetch<BITS, P>(w, tile * w.step);
        add_piece<BITS, M, P, HALVES, 0>(w, x, tile, pass, steps, add);
        if constexpr (HALVES == 2) add_piece<BITS, M, P, HALVES, 1>(w, x, tile, pass, steps, add);
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
    const vf z = splat(float(w.offset));
    for (int part = 0; part < PARTS; part++) {
        const int row = part * LANES;
        vf outer[2]{}, scale[2]{}, least[2]{};  // of each half; without minima the least stay 0
        const auto new_block = [&](int64_t block) FLAT {
            for (int kind = 0; kind < 1 + w.minima; kind++) outer[kind] = outer_at(w, 0, block, kind, row);
        };
        const auto new_group = [&](int64_t group) FLAT {
#pragma GCC unroll 1
            for (int half = 0; half < 2; half++) {
                scale[half] = step_at(w, 0, group + half * w.halves, 0, row) * outer[0];
                if (w.minima) least[half] = step_at(w, 0, group + half * w.halves, 1, row) * outer[1];
            }
        };
        for_each_tile(w, 1 + w.halves, new_block, new_group, [&](int64_t tile) FLAT {
            const float* a = x.floats + tile * TILE * M;
            vf t[M][4] = {};
#pragma GCC unroll QUADS_UNROLLED
            for (int quad = 0; quad < QUADS; quad++) {
                const vi u = codes<BITS>(w.codes[0] + tile * w.step, quad, part, w.table);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const vf level = to_float((vi)((vu)u >> 8 * j) & 0xff) - z;
                    const vf value = level * scale[quad / (QUADS / 2)] + least[quad / (QUADS / 2)];
                    for (int m = 0; m < M; m++) t[m][j] = fused(splat(a[m * TILE + quad * 4 + j]), value, t[m][j]);
                }
            }
            for (int m = 0; m < M; m++) {
                float* sum = sums + m * PANEL + row;
                store(sum, load<vf>(sum) + ((t[m][0] + t[m][1]) + (t[m][2] + t[m][3])));
            }
        });
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
