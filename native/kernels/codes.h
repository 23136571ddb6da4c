// Codes out of tiles, to one byte each: from bit planes, or from bytes of five trits. kernel.h tells how tiles lie.
//
// Part of linear.cpp. Bodies take a vector at a time in registers; for many rows of x whole tiles are unpacked before.
#pragma once

#include "dot.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// A shift to the right by `by`, or to the left by -by.
INLINE vi shift(vi x, int by) { return by >= 0 ? (vi)((vu)x >> by) : x << -by; }

// One vector of a tile: quad 0..7 of 4 columns, rows LANES * part and on, one byte a code. Of a tile of words: half a
// quad, 0..15. table: of those that are looked up.
template <int BITS>
INLINE vi codes(const uint8_t* tile, int quad, int part, const uint8_t* table) {
    if constexpr (BITS == LOOKED_UP) return look_up(codes<4>(tile, quad, part, nullptr), table);
    tile += part * VECTOR_BYTES;
    if constexpr (BITS == 8 || BITS >= UNPACKED) return load<vi>(tile + quad * TILE_UNIT);
    vi u{};
    int low = 0;
    if constexpr (BITS & 4) {
        u = shift(load<vi>(tile + quad / 2 * TILE_UNIT), 4 * (quad % 2)) & 0x0f0f0f0f;
        tile += 4 * TILE_UNIT;
        low = 4;
    }
    if constexpr (BITS & 2) {
        u |= shift(load<vi>(tile + quad / 4 * TILE_UNIT), 2 * (quad % 4) - low) & 0x03030303 << low;
        tile += 2 * TILE_UNIT;
        low += 2;
    }
    if constexpr (BITS & 1) u |= shift(load<vi>(tile), quad - low) & 0x01010101 << low;
    return u;
}

#if defined(__AVX512VBMI__)
// Of n = sum over p < 4 of u[p] * 3^p: the codes u[p], two bits each.
struct FourTrits {
    uint8_t bytes[128];
    constexpr FourTrits() : bytes{} {
        for (int n = 0; n < 81; n++) bytes[n] = uint8_t(n % 3 | n / 3 % 3 << 2 | n / 9 % 3 << 4 | n / 27 << 6);
    }
};
constexpr FourTrits FOUR_TRITS;
#endif

// Five codes 0, 1, 2 from every byte, the sum of u[p] * 3^p.
INLINE void split_trits(vi packed, vi* u) {
#if defined(__AVX512VBMI__) && defined(__GFNI__) && LANES == 16
    // 81 and 162 end in the bits 01 and 10: what subtracting them took away tells u[4].
    const __m512i v = raw(packed), last = _mm512_set1_epi8(81), two_bits = _mm512_set1_epi8(3);
    __m512i n = _mm512_min_epu8(v, _mm512_sub_epi8(v, last));
    n = _mm512_min_epu8(n, _mm512_sub_epi8(n, last));
    u[4] = (vi)_mm512_and_si512(_mm512_sub_epi8(v, n), two_bits);
    // The others, two bits each.
    const __m512i low = _mm512_loadu_si512(FOUR_TRITS.bytes), high = _mm512_loadu_si512(FOUR_TRITS.bytes + 64);
    const __m512i four = _mm512_permutex2var_epi8(low, n, high);
    u[0] = (vi)_mm512_and_si512(four, two_bits);
    // Matrices of bits that move bits 2-3, 4-5, 6-7 to 0-1 and clear the rest.
    u[1] = (vi)_mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x0408ll << 48), 0);
    u[2] = (vi)_mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x1020ll << 48), 0);
    u[3] = (vi)_mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x4080ll << 48), 0);
#else
    typedef uint8_t bytes __attribute__((vector_size(VECTOR_BYTES)));
    bytes left = (bytes)packed;
    for (int p = 4, power = 81; p > 0; p--, power /= 3) {
        const bytes once = (bytes)(left >= uint8_t(power)), twice = (bytes)(left >= uint8_t(2 * power));
        left -= (once & uint8_t(power)) + (twice & uint8_t(power));
        u[p] = (vi)(bytes{} - once - twice);
    }
    u[0] = (vi)left;
#endif
}

constexpr int WORD_TILE = 2 * BYTE_TILE;  // bytes of a tile with one word a code

// A tile of 8 bits to words, of every quad the even columns and then the odd ones.
template <int BITS>
void unpack_words(const uint8_t* tile, uint8_t* words, const uint8_t* table) {
    for (int quad = 0; quad < QUADS; quad++, words += 2 * TILE_UNIT) {
        for (int part = 0; part < PARTS; part++) {
            const vu bytes = (vu)codes<BITS>(tile, quad, part, table);
            store(words + part * VECTOR_BYTES, bytes & 0x00ff00ff);
            store(words + TILE_UNIT + part * VECTOR_BYTES, bytes >> 8 & 0x00ff00ff);
        }
    }
}

// A tile to one byte a code: BYTE_TILE bytes for each of its panels, a quad of 16 rows after the other.
template <int BITS>
void unpack_tile(const uint8_t* tile, uint8_t* bytes, const uint8_t* table) {
#pragma GCC unroll 8
    for (int quad = 0; quad < QUADS; quad++) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            const int at = quad * TILE_UNIT + part * VECTOR_BYTES;
            if constexpr (BITS == TRITS) {
                vi u[BUNDLE];
                split_trits(load<vi>(tile + at), u);
                for (int p = 0; p < BUNDLE; p++) store(bytes + p * BYTE_TILE + at, u[p]);
            } else {
                store(bytes + at, codes<BITS>(tile, quad, part, table));
            }
        }
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
