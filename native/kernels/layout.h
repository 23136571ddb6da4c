// Between rows of codes and the panels that kernel.h describes. Exact, one thread, any processor.
#pragma once

#include "kernel.h"

namespace spicerack {

// codes [N, K], one byte each, of code + offset the low bits are kept -> the tiles of kernel.h.
void pack_panels(const uint8_t* codes, int64_t n, int64_t k, int bits, int offset, uint8_t* tiles);

// Its inverse: codes get back minus offset, modulo 256.
void unpack_panels(const uint8_t* tiles, int64_t n, int64_t k, int bits, int offset, uint8_t* codes);

// out [count, K] = the chosen rows, scale * (u - z) in float32, rounded once: what codec.decode gives. Rows are in 0..N-1.
void decode_rows(const Weights& w, const int64_t* rows, int64_t count, float* out);

}  // namespace spicerack
