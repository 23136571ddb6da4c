// From a body's sums to y: scales, bias, GELU, and y's type. Part of linear.cpp.
#pragma once

#include "functions.h"
#include "job.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// Some rows of y by some panels: what one body leaves.
struct Patch {
    int64_t panel;
    int panels;
    int64_t first, rows;
};

// Fetches where y of a patch will be written: its rows lie apart, so that no processor foresees it. 1536 x 384, M =
// 4096: from 66 to 70 % of the peak.
INLINE void expect(const Job& job, const Product& product, const Patch& p) {
    const int64_t size = size_of(job.call->type), line = product.weights.n * size;
    const char* y = (const char*)product.y + (job.row0 + p.first) * line + p.panel * PANEL * size;
    for (int64_t m = 0; m < p.rows; m++, y += line) {
        for (int64_t i = 0; i < p.panels * PANEL * size; i += 64) __builtin_prefetch(y + i, 1);
    }
}

// y of a patch from its sums [rows, 16 panels].
INLINE void finish(const Job& job, const Product& product, const Patch& p, const Method& method, const float* sums) {
    const Weights& w = product.weights;
    const Slab& s = job.slab;
    const Float type = job.call->type;
    const bool integers = method.scaling == unscaled;  // what is not scaled yet
    const bool scaled_here = w.group == 0 && !in_blocks(method.scaling);
    const int64_t last = least(p.panel + p.panels, w.panels());
    for (int64_t panel = p.panel; panel < last; panel++) {
        for (int part = 0; part < PARTS; part++) {
            const int64_t n = panel * PANEL + part * LANES, count = least(w.n - n, LANES);
            if (count <= 0) break;
            vf s_w = splat(1.0f), bias{};
            vi zero = splat_int(w.offset);
            if (scaled_here) s_w = widen((const char*)w.scale + n * size_of(w.scale_type), Float(w.scale_type));
            if (w.group == 0 && w.zero) zero = from_bytes(w.zero + n);
            if (product.bias) bias = widen_some((const char*)product.bias + n * size_of(type), type, count);
            char* y = (char*)product.y + ((job.row0 + p.first) * w.n + n) * size_of(type);
            const float* sum = sums + (panel - p.panel) * PANEL + part * LANES;
            for (int64_t m = p.first; m < p.first + p.rows; m++) {
                vf value;
                if (integers) {
                    value = to_float(load<vi>(sum) - (zero - method.shift) * s.total[m]);
                    if (w.half) value = value + splat(0.5f * float(s.total[m]));
                } else {
                    value = load<vf>(sum);
                }
                value = value * s_w;
                if (s.token) value = value * splat(s.token[m]);
                if (product.bias) value = value + bias;
                if (product.gelu) value = gelu(value);
                narrow(value, type, y, count);
                y += w.n * size_of(type), sum += p.panels * PANEL;
            }
        }
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
