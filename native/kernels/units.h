// What a thread does at a time. Part of linear.cpp.
//
// A unit is some panels of one product times a job's rows of x. It walks over its columns chunk by chunk; in a chunk,
// over its panels as many at once as a body takes; and for those over the strips of x. A strip's sums become y right
// behind its last chunk, while they are near.
#pragma once

#include "results.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// A thread's memory for one unit.
struct Scratch {
    Buffer<uint8_t> bytes;
    Buffer<float> scales, sums;
};

// Fetches the next chunk of some panels, a part at a time, while this one is multiplied: of these panels, or the first
// chunk of those that follow. 32 rows of x, 4 and 8 bits: 1976 and 1950 us without, 1750 both with it.
struct NextChunk {
    const char* at[PANELS_MOST]{};
    int64_t left, each;
    int width;

    // bundle: the first of `count`, of one panel each but for trits. tile: where the next chunk begins, or their end.
    INLINE NextChunk(const Weights& w, int64_t bundle, int count, int64_t tile, int64_t chunk, int64_t steps)
        : width(count) {
        if (tile == w.tiles()) {
            bundle += count;
            tile = 0;
        }
        if (bundle + count > w.bundles()) width = 0;
        left = least(chunk, w.tiles() - tile) * w.tile_bytes();
        each = (left / steps + 63) / 64 * 64;
        for (int p = 0; p < width; p++) at[p] = (const char*)w.tile(bundle + p, tile);
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

// The panels of a unit.
struct UnitPanels {
    const Job& job;
    const ProductWork& work;
    const Product& product;
    int64_t panel;   // the first
    int64_t bundle;  // the one it is in: the panel itself but for trits
    int bundles;

    INLINE UnitPanels(const Job& j, int which, int64_t unit)
        : job(j), work(j.work[which]), product(j.call->products[which]) {
        const Method& method = work.method;
        const bool trits = product.weights.bits == TRITS;
        panel = (unit - work.first_unit) * method.unit_panels;
        bundle = trits ? panel / BUNDLE : panel;
        bundles = trits && !takes_floats(method.scaling) ? method.unit_panels / BUNDLE : method.unit_panels;
    }

    // Tiles that are walked over at once: all, where the codes of a single strip are unpacked in registers.
    INLINE int64_t chunk() const {
        const Slab& s = job.slab;
        const Weights& w = product.weights;
        const bool trits = w.bits == TRITS && !takes_floats(work.method.scaling);
        const int64_t group = most(w.group, w.block) / TILE;
        const int64_t tiles = job.strips.count == 1 && !work.method.unpack ? s.spans
                               : (trits && s.rows <= ROWS_COLUMNS_TRITS ? COLUMNS_TRITS : COLUMNS) / TILE;
        return group ? most(tiles / group, 1) * group : tiles;
    }

    // Bytes from tile to tile of what bodies read.
    INLINE int64_t step() const {
        return work.method.unpack ? work.method.unit_panels * work.method.tile_bytes() : product.weights.tile_bytes();
    }

    // tiles first .. first + count, to bytes: [count, unit_panels, tile].
    INLINE void unpack(int64_t first, int64_t count, uint8_t* bytes) const {
        const Weights& w = product.weights;
        const int panels = w.bits == TRITS ? BUNDLE : 1;
        for (int i = 0; i < bundles; i++) {
            const uint8_t* tile = w.tile(least(bundle + i, w.bundles() - 1), first);  // beyond the last, it again
            uint8_t* to = bytes + i * panels * work.method.tile_bytes();
            for (int64_t j = 0; j < count; j++, tile += w.tile_bytes(), to += step()) {
                work.method.unpack(tile, to, w.table);
            }
        }
    }

    // Where the scales (and minima) of a panel begin that hold from a tile on; of the last panel, beyond it. Outer ones.
    INLINE int64_t first_scale(int64_t own, int64_t tile) const {
        const Weights& w = product.weights;
        return (least(own, w.panels() - 1) * w.groups() + (w.group ? tile * TILE / w.group : 0)) * w.kinds() * PANEL;
    }
    INLINE int64_t first_outer(int64_t own, int64_t tile) const {
        const Weights& w = product.weights;
        return (least(own, w.panels() - 1) * w.blocks() + (w.block ? tile * TILE / w.block : 0)) * w.kinds() * PANEL;
    }
    // Floats that `widen_scales` makes of so many tiles of a panel; 0 where they change with the row alone and come last.
    INLINE int64_t scales_of(int64_t tiles) const {
        const Weights& w = product.weights;
        return w.group || w.in_blocks() ? (w.group ? tiles * TILE / w.group : 1) * w.kinds() * PANEL : 0;
    }

    // Scales of tiles first .. first + count as floats, [unit_panels, groups, 16]: every strip of x reads them again.
    INLINE void widen_scales(int64_t first, int64_t count, float* scales) const {
        const Weights& w = product.weights;
        const int64_t groups = scales_of(count) / (w.kinds() * PANEL), a_block = w.block ? w.block / w.group : groups;
        for (int p = 0; p < work.method.unit_panels; p++) {
            const uint8_t* from = (const uint8_t*)w.scale + first_scale(panel + p, first) * size_of(w.scale_type);
            const char* outer = (const char*)w.outer;
            if (outer) outer += first_outer(panel + p, first) * size_of(w.outer_type);
            for (int64_t g = 0; g < groups; g++) {
                if (outer && g && g % a_block == 0) outer += w.kinds() * PANEL * size_of(w.outer_type);
                for (int i = 0; i < w.kinds() * PANEL; i += LANES, scales += LANES) {
                    vf value = stored_at(from, w.scale_type);
                    if (outer) value = value * widen(outer + i * size_of(w.outer_type), w.outer_type);
                    store(scales, value);
                    from += LANES * size_of(w.scale_type);
                }
            }
        }
    }

    // What all bodies share of tiles first .. first + count.
    INLINE Panels of_chunk(int64_t first, int64_t count) const {
        const Weights& w = product.weights;
        Panels panels{};
        panels.tiles = count;
        panels.group_tiles = w.group / TILE;
        panels.halves = w.group == TILE / 2;
        panels.block_tiles = w.block / TILE;
        panels.outer_type = w.outer_type;
        panels.offset = w.offset;
        panels.half = w.half;
        panels.minima = w.minima;
        panels.table = w.table;
        panels.step = step();
        panels.left = (job.slab.spans - first) * w.tile_bytes();
        panels.jump = (bundles - 1) * job.slab.spans * w.tile_bytes();
        panels.which = int(panel % BUNDLE);
        return panels;
    }

    // The panels of one body, the unit's `done` and on, from tile `first` on. bytes, scales: what `unpack` and
    // `widen_scales` made, or null.
    INLINE void point(Panels& panels, int done, int64_t first, const uint8_t* bytes, const float* scales) const {
        const Weights& w = product.weights;
        const int64_t values = scales_of(panels.tiles);
        panels.type = scales ? ScaleType::f32 : w.scale_type;
        for (int p = 0; p < work.method.body_panels; p++) {
            const int64_t own = panel + done + p, at = first_scale(own, first);
            const int64_t bundle_of_own = w.bits == TRITS ? bundle : least(own, w.panels() - 1);
            panels.codes[p] = bytes ? bytes + (done + p) * work.method.tile_bytes() : w.tile(bundle_of_own, first);
            panels.scale[p] = scales ? (const uint8_t*)(scales + (done + p) * values)
                                     : (const uint8_t*)w.scale + at * size_of(w.scale_type);
            panels.outer[p] = nullptr;
            if (w.outer && !scales) {
                panels.outer[p] = (const uint8_t*)w.outer + first_outer(own, first) * size_of(w.outer_type);
            }
            panels.zero[p] = w.zero ? w.zero + at : nullptr;
        }
    }

    // A strip of `height` rows that begins with row `first`, from span `span` on.
    INLINE Strip strip(int64_t first, int64_t height, int64_t span) const {
        const Slab& s = job.slab;
        const int64_t at = first * s.spans + span * height;
        Strip x{};
        if (takes_floats(work.method.scaling)) {
            x.floats = s.floats + at * TILE;
            return x;
        }
        const bool integers = work.method.scaling == unscaled;
        x.codes = work.method.words ? (const int8_t*)(s.words + at * TILE) : s.codes + at * TILE;
        x.scale = s.scale + at;
        const int halves = work.method.scaling == of_half_blocks ? 2 : 1;
        x.start = integers ? nullptr : work.starts + at * halves;
        x.sum = product.weights.minima ? job.spans[halves - 1] + at * halves : nullptr;
        x.half = product.weights.half && !integers ? job.halves + at : nullptr;
        return x;
    }
};

void run_unit(const Job& job, int64_t unit, Scratch& scratch) {
    int which = 0;
    while (unit >= job.work[which + 1].first_unit) which++;
    const UnitPanels panels(job, which, unit);
    const Product& product = panels.product;
    const Method& method = panels.work.method;
    const Slab& s = job.slab;
    // Those of a body's panels lie together.
    float* sums = scratch.sums.need(s.rows * method.unit_panels * PANEL);
    std::memset(sums, 0, s.rows * method.unit_panels * PANEL * sizeof(float));
    const int64_t body_sums = s.rows * method.body_panels * PANEL;
    const int64_t chunk = panels.chunk(), steps = job.strips.count * (method.unit_panels / method.body_panels);
    const int64_t widened = job.reading == Reading::from_bytes ? panels.scales_of(chunk) : 0;
    for (int64_t b = 0; b < s.spans; b += chunk) {
        const int64_t tiles = least(chunk, s.spans - b);
        const bool last = b + chunk >= s.spans;
        uint8_t* bytes = method.unpack ? scratch.bytes.need(chunk * panels.step()) : nullptr;
        if (bytes) panels.unpack(b, tiles, bytes);
        float* scales = nullptr;
        if (widened) {
            scales = scratch.scales.need(method.unit_panels * widened);
            panels.widen_scales(b, tiles, scales);
        }
        NextChunk next(product.weights, panels.bundle, panels.bundles, b + tiles, chunk, steps);
        Panels w = panels.of_chunk(b, tiles);
        for (int done = 0; done < method.unit_panels; done += method.body_panels) {
            panels.point(w, done, b, bytes, scales);
            for (int64_t t = 0; t < job.strips.count; t++) {
                const Patch patch{panels.panel + done, method.body_panels, job.strips.first(t), job.strips.size(t)};
                float* own = sums + done / method.body_panels * body_sums + patch.first * method.body_panels * PANEL;
                if (job.reading == Reading::from_bytes) next.step();
                if (last) expect(job, product, patch);
                method.bodies[patch.rows - 1](w, panels.strip(patch.first, patch.rows, b), own);
                if (last) finish(job, product, patch, method, own);
            }
        }
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
