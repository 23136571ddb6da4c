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
    Buffer<float> sums;
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
        bundles = trits && method.scaling != of_floats ? method.unit_panels / BUNDLE : method.unit_panels;
    }

    // Tiles that are walked over at once: all, where the codes of a single strip are unpacked in registers.
    INLINE int64_t chunk() const {
        const Slab& s = job.slab;
        const Weights& w = product.weights;
        const bool trits = w.bits == TRITS && work.method.scaling != of_floats;
        const int64_t group = w.group / TILE;
        const int64_t tiles = job.strips.count == 1 && !work.method.unpack ? s.spans
                              : (trits && s.rows <= ROWS_COLUMNS_TRITS ? COLUMNS_TRITS : COLUMNS) / TILE;
        return group ? most(tiles / group, 1) * group : tiles;
    }

    // Bytes from tile to tile of what bodies read.
    INLINE int64_t step() const {
        return work.method.unpack ? work.method.unit_panels * BYTE_TILE : product.weights.tile_bytes();
    }

    // Tiles first .. first + count, to bytes: [count, unit_panels, BYTE_TILE].
    INLINE void unpack(int64_t first, int64_t count, uint8_t* bytes) const {
        const Weights& w = product.weights;
        const int panels = w.bits == TRITS ? BUNDLE : 1;
        for (int i = 0; i < bundles; i++) {
            const uint8_t* tile = w.tile(least(bundle + i, w.bundles() - 1), first);  // beyond the last, it again
            uint8_t* to = bytes + i * panels * BYTE_TILE;
            for (int64_t j = 0; j < count; j++, tile += w.tile_bytes(), to += step()) work.method.unpack(tile, to);
        }
    }

    // What all bodies share of tiles first .. first + count.
    INLINE Panels of_chunk(int64_t first, int64_t count) const {
        const Weights& w = product.weights;
        Panels panels{};
        panels.tiles = count;
        panels.group_tiles = w.group / TILE;
        panels.type = w.scale_type;
        panels.offset = w.offset;
        panels.half = w.half;
        panels.step = step();
        panels.left = (job.slab.spans - first) * w.tile_bytes();
        panels.jump = (bundles - 1) * job.slab.spans * w.tile_bytes();
        panels.which = int(panel % BUNDLE);
        return panels;
    }

    // The panels of one body, the unit's `done` and on, from tile `first` on; bytes: what `unpack` made, or null.
    INLINE void point(Panels& panels, int done, int64_t first, const uint8_t* bytes) const {
        const Weights& w = product.weights;
        const int64_t group = panels.group_tiles;
        for (int p = 0; p < work.method.body_panels; p++) {
            const int64_t own = least(panel + done + p, w.panels() - 1);  // beyond the last, it again
            const int64_t at = (own * w.groups() + (group ? first / group : 0)) * PANEL;
            panels.codes[p] = bytes ? bytes + (done + p) * BYTE_TILE : w.tile(w.bits == TRITS ? bundle : own, first);
            panels.scale[p] = (const uint8_t*)w.scale + at * size_of(w.scale_type);
            panels.zero[p] = w.zero ? w.zero + at : nullptr;
        }
    }

    // A strip of `height` rows that begins with row `first`, from span `span` on.
    INLINE Strip strip(int64_t first, int64_t height, int64_t span) const {
        const Slab& s = job.slab;
        const int64_t at = first * s.spans + span * height;
        Strip x{};
        if (work.method.scaling == of_floats) {
            x.floats = s.floats + at * TILE;
            return x;
        }
        const bool integers = work.method.scaling == unscaled;
        x.codes = s.codes + at * TILE;
        x.scale = s.scale + at;
        x.start = integers ? nullptr : work.starts + at;
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
    for (int64_t b = 0; b < s.spans; b += chunk) {
        const int64_t tiles = least(chunk, s.spans - b);
        const bool last = b + chunk >= s.spans;
        uint8_t* bytes = method.unpack ? scratch.bytes.need(chunk * panels.step()) : nullptr;
        if (bytes) panels.unpack(b, tiles, bytes);
        NextChunk next(product.weights, panels.bundle, panels.bundles, b + tiles, chunk, steps);
        Panels w = panels.of_chunk(b, tiles);
        for (int done = 0; done < method.unit_panels; done += method.body_panels) {
            panels.point(w, done, b, bytes);
            for (int64_t t = 0; t < job.strips.count; t++) {
                const Patch patch{panels.panel + done, method.body_panels, job.strips.first(t), job.strips.size(t)};
                float* own = sums + done / method.body_panels * body_sums + patch.first * method.body_panels * PANEL;
                if (job.reading == Reading::from_bytes) next.step();
                if (last) expect(job, product, patch);
                method.bodies[patch.rows - 1](w, panels.strip(patch.first, patch.rows, b), own);
                if (last) finish(job, product, patch, method.scaling == unscaled, own);
            }
        }
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
