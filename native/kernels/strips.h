// Products of floats, a strip of rows at a time. Each number is one chain of fused multiply-adds over the depth, from
// first to last: results do not depend on how rows, columns and depth are cut.
#pragma once

#include "dot.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// Of a strip: rows, and vectors of columns, whose 6 x 4 (of 16 registers 6 x 2) sums stay in registers.
constexpr int STRIP_ROWS = 6, STRIP_VECTORS = LANES == 8 ? 2 : 4;

// out [M, V vectors] += a [M, depth] * b [depth, V vectors]; steps are from row to row.
template <int M, int V>
void multiply_some(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth, float* out, int64_t step) {
    vf t[M][V];
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) t[m][v] = load<vf>(out + m * step + v * LANES);
    }
    for (int64_t i = 0; i < depth; i++, b += b_step) {
        vf x[V];
        for (int v = 0; v < V; v++) x[v] = load<vf>(b + v * LANES);
        for (int m = 0; m < M; m++) {
            for (int v = 0; v < V; v++) t[m][v] = fused(splat(a[m * a_step + i]), x[v], t[m][v]);
        }
    }
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) store(out + m * step + v * LANES, t[m][v]);
    }
}

// The same for `width` columns, a multiple of LANES.
template <int M>
void multiply(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth, float* out, int64_t step,
              int64_t width) {
    int64_t column = 0;
    for (; column + STRIP_VECTORS * LANES <= width; column += STRIP_VECTORS * LANES) {
        multiply_some<M, STRIP_VECTORS>(a, a_step, b + column, b_step, depth, out + column, step);
    }
    if (column + STRIP_VECTORS / 2 * LANES <= width) {
        multiply_some<M, STRIP_VECTORS / 2>(a, a_step, b + column, b_step, depth, out + column, step);
        column += STRIP_VECTORS / 2 * LANES;
    }
    for (; column < width; column += LANES) multiply_some<M, 1>(a, a_step, b + column, b_step, depth, out + column, step);
}

// For so many rows, one less than the index.
constexpr decltype(&multiply<1>) MULTIPLY[STRIP_ROWS] = {multiply<1>, multiply<2>, multiply<3>,
                                                   multiply<4>, multiply<5>, multiply<6>};

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
