// How much of a product is done at once. Everything here was chosen for speed, and none of it changes a result. Part of
// linear.cpp.
//
// Figures are of two threads of an AMD EPYC (Zen 4); docs/kernels.md has them all, with what else was tried. Where a
// comment gives a reason and no figure, there is none.
#pragma once

#include "dot.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// ---- in registers ---------------------------------------------------------------------------------------------------

// What a body multiplies at once: rows of x by panels of W, whose sums stay in registers. A sum that is scaled by span
// needs two vectors, its integers and its floats; one that is scaled in the end needs one.
struct BodySize {
    int rows, panels_scaled, panels_summed;
};
#if LANES == 16
// 32 registers of one panel each. 6 x 2 x 2 or 6 x 4 sums leave 8 for codes, activations and scales.
constexpr BodySize FROM_BYTES{6, 2, 4};
// Codes take registers while they are unpacked, and a vector is unpacked again for each strip of rows.
constexpr BodySize IN_REGISTERS{4, 2, 4};
// 5 to 16 rows: reading a panel once for up to 8 rows is worth more than two panels for one load of activations. 4
// bits, groups of 128, 4096 x 4096, M = 12 and 16: 693 and 841 us, where unpacking to bytes took 1064 and 1231.
constexpr BodySize READ_ONCE{8, 1, 2};
#elif LANES == 8
// 16 registers (avx2, avxvnni; avx512vlvnni has 32 and the same source), a panel in two. 6 x 1 x 2 sums of a tile leave
// 4 for codes and activations; float sums stay in memory meanwhile. 1536 x 384, M = 128, on an Intel Sapphire Rapids with
// 3, 4, 5, 6 rows: 4 bits in groups of 32 on AVX2 -, 189, 202, 205 GOP/s, 8 bits -, 132, 133, 133; with VNNI 246, 247,
// 255, 265 and, one scale a token, 222, 271, 301, 331.
constexpr BodySize FROM_BYTES{6, 1, 1}, IN_REGISTERS{4, 1, 1}, READ_ONCE = IN_REGISTERS;
#else
// 32 registers on Arm, a panel in four: 4 x 1 x 4 x 2 are all of them.
constexpr BodySize FROM_BYTES{4, 1, 1}, IN_REGISTERS = FROM_BYTES, READ_ONCE = FROM_BYTES;
#endif
// Rows of x in a strip of floats, which have four running sums each. 16 registers, M = 128: 63 GFLOP/s with 3, 57 with 4.
constexpr int FLOAT_ROWS = LANES == 8 ? 3 : FROM_BYTES.rows;
// From so many vectors of float sums on they stay in memory while a tile is multiplied.
constexpr int SUMS_IN_REGISTERS = LANES == 8 ? 6 : 1 << 10;
// Bundles of trits are multiplied whole, a vector of each of their panels at a time: 3 x 5 x 2, 4 x 5 and 5 x 5 of 32
// registers.
constexpr int TRITS_ROWS_SCALED = LANES == 16 ? 3 : 1;           // unpacked in registers
constexpr int TRITS_ROWS_SUMMED = LANES == 16 ? 4 : 2;           // the same, scaled in the end
constexpr int TRITS_ROWS_SUMMED_FROM_BYTES = LANES == 16 ? 5 : 2;
// Quads that a body has code of their own for. Of the scalar engine's, which multiplies a vector of columns after the
// other, one is enough: a panel of 1024 columns of 4 bits took 5.1 us and not 6.4 with 1 row of x, 16.8 and not 26.8
// with 4 (Intel Sapphire Rapids, as for any x86-64, together with products by vectors), from a third of the code in
// half the compiler's time.
constexpr int QUADS_UNROLLED = SCALAR ? 1 : QUADS;
// Scales and minima of a tile that have code of their own: all. One for all was a third slower with AVX-512, 2 bits and
// minima of 16 columns, in the caches. The scalar engine, which has 16 of them to widen by several operations, has one.
constexpr int STEPS_UNROLLED = SCALAR ? 1 : 16;
// Of all these.
constexpr int ROWS_MOST = FROM_BYTES.rows > READ_ONCE.rows ? FROM_BYTES.rows : READ_ONCE.rows, PANELS_MOST = BUNDLE;

// ---- how codes become bytes -----------------------------------------------------------------------------------------

// Up to so many rows of x codes are unpacked in registers; beyond, to bytes, once for all rows. 8 bits need no
// unpacking, and larger strips are faster earlier: 8 bits with a scale a token, M = 12: 681 us, and 855 where panels
// are read once.
constexpr int64_t ROWS_IN_REGISTERS = 2 * READ_ONCE.rows;
// AVX2 unpacks 8 bits to words: 8 rows by 1536 x 4096 121 GOP/s from bytes and 106 from words, 16 rows 121 and 118.
constexpr int64_t ROWS_IN_REGISTERS_8_BITS = PAIRS ? ROWS_IN_REGISTERS : READ_ONCE.rows;
// Splitting a byte of trits costs more than unpacking bits. The scalar engine always does it in registers: with what it
// splits it adds and subtracts, and never multiplies.
constexpr int64_t ANY_ROWS = INT64_MAX / 2;
constexpr int64_t ROWS_IN_REGISTERS_TRITS_SCALED = SCALAR ? ANY_ROWS : 2 * TRITS_ROWS_SCALED;
constexpr int64_t ROWS_IN_REGISTERS_TRITS_SUMMED = SCALAR ? ANY_ROWS : 2 * TRITS_ROWS_SUMMED;

// ---- in caches ------------------------------------------------------------------------------------------------------

// Columns that a unit walks over at once, for one strip of x after the other: 8 KB of bytes for a panel, which stay in
// the first level. Of a unit of two bundles they are 80 KB: for few strips of x, fewer.
constexpr int COLUMNS = 512, COLUMNS_TRITS = 128;
constexpr int64_t ROWS_COLUMNS_TRITS = 4 * FROM_BYTES.rows;  // up to so many rows of x
// Bytes of quantized x at once. Between 32 KB and 4 MB there was no difference (1536 x 384, M = 4096).
constexpr int64_t SLAB_BYTES = 1 << 18;
constexpr int64_t SLAB_ROWS_LEAST = 16 * FROM_BYTES.rows;    // of long rows
// Bytes to prefetch ahead in a panel. 2, 4 and 8 KB showed no difference.
constexpr int PREFETCH_BYTES = 4096;

// ---- among threads --------------------------------------------------------------------------------------------------

// Multiply-adds that are worth a thread: 2.3 us to start and end a team.
constexpr int64_t PRODUCTS_A_THREAD = 1 << 18;
// What threads share moves between cores. 384 x 384, M = 32: one thread 33 us; two that shared x and took panels from
// one counter 39; two with panels or rows of their own 18.

// Up to so many values of x every thread quantizes all of it for itself, sooner than it waits for the others.
constexpr int64_t VALUES_EACH = 1 << 13;
// Rows of x for each thread, from which every thread reads all weights and has some rows, so that none waits for
// another and what it reads and writes of x and y are its own: of weights that fit a core's caches, and of others.
constexpr int64_t WEIGHT_BYTES_NEAR = 1 << 20, ROWS_APART_NEAR = 16, ROWS_APART = 128;

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
