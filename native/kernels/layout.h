// From the panels that kernel.h describes back to codes, all of them or single rows decoded; and one tile of codes there.
//
// Exact, one thread, the same code on any processor: plain loops are fast enough.
#pragma once

#include "kernel.h"

namespace spicerack {

// One tile of `bytes`, one a code u as plane 8 has them -> its planes of 2 to 8 bits, 64 * bits bytes.
void squeeze_tile(const uint8_t* bytes, int bits, uint8_t* tile);

// Tiles [bundles, tiles of a panel, bytes of a tile] -> codes [N, K], one byte each: u minus offset, modulo 256. bits: 2
// to 8, or TRITS. stored.h has the way there.
void unpack_panels(const uint8_t* tiles, int64_t n, int64_t k, int bits, int offset, uint8_t* codes);

// out [count, K] = rows [count] of w, each in 0..N-1: scale * (u - z) in float32, plus the minimum, which is what
// numerics/codec.py's decode gives.
void decode_rows(const Weights& w, const int64_t* rows, int64_t count, float* out);

}  // namespace spicerack
