// From codes as folders store them to the panels that kernel.h describes, with no byte for each code in between.
//
// Exact, one thread, the same code on any processor; unpack_panels is the way back.
#pragma once

#include "kernel.h"

namespace spicerack {

// How codes [N, K] lie in a folder.
enum class Order : int {
    stream,    // rows of ceil(K * bits / 32) words: u as little-endian bits (quantizers/pack.h); what fills up may be anything
    bytes,     // [N, K]: u - offset, modulo 256
    quarters,  // [N/4, K]: u of rows r, r + N/4, r + N/2, r + 3N/4, two bits each, the first lowest
};

struct StoredCodes {
    const uint8_t* data;
    Order order;
    int64_t n, k;
    int bits;    // of a code: u is below 2^bits
    int offset;  // of bytes
    int most;    // the largest u that is a level

    ALWAYS_INLINE int64_t stride() const { return order == Order::stream ? (k * bits + 31) / 32 * 4 : k; }
    ALWAYS_INLINE int64_t rows() const { return order == Order::quarters ? n / 4 : n; }
};

// Bundles (or panels) first..last of the tiles, `bits` as in Weights, to `tiles`, where all of the matrix begins;
// rows and columns that fill the last tiles up are zeros. False if a code is larger than `most`: the tiles are then of no
// use.
bool pack_stored(const StoredCodes& codes, int bits, int64_t first, int64_t last, uint8_t* tiles);

// Values [rows, groups] of `size` bytes, one for each output row, or of one row for all -> lanes [panels, groups, 16] of
// panels first..last; rows beyond n are zeros. add: to values of one byte.
void to_lanes(const uint8_t* values, int64_t rows, int64_t groups, int size, int add, int64_t n, int64_t first,
              int64_t last, uint8_t* lanes);

}  // namespace spicerack
