// Between rows of codes and the panels that kernel.h describes: packing, its inverse, and decoding single rows.
//
// Exact, one thread, the same code on any processor: it runs once a layer, so that plain loops are fast enough.
#pragma once

#include "kernel.h"

namespace spicerack {

// codes [N, K], one byte each -> tiles [bundles, tiles of a panel, bytes of a tile]. Of code + offset the low bits are
// kept; rows and columns that fill the last tiles up are zeros. bits: 2 to 8, or TRITS, whose codes plus
// offset are 0, 1 or 2.
void pack_panels(const uint8_t* codes, int64_t n, int64_t k, int bits, int offset, uint8_t* tiles);

// One tile of `bytes`, one a code u as plane 8 has them -> its planes of 2 to 8 bits, 64 * bits bytes.
void squeeze_tile(const uint8_t* bytes, int bits, uint8_t* tile);

// The inverse of pack_panels: codes get back minus offset, modulo 256.
void unpack_panels(const uint8_t* tiles, int64_t n, int64_t k, int bits, int offset, uint8_t* codes);

// out [count, K] = rows [count] of w, each in 0..N-1: scale * (u - z) in float32, rounded once, which is what
// numerics/codec.py's decode gives.
void decode_rows(const Weights& w, const int64_t* rows, int64_t count, float* out);

}  // namespace spicerack
