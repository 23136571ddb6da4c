// See stored.h. Widths of 2, 4 and 8 bits are one plane: the tiles of a panel, as words of 32 bits [dword, row], are the
// rows' own words [row, dword] transposed, and within each word codes change places. All else goes through one tile of
// bytes, which stays in the first level.
#include "stored.h"

#include <cstring>

#include "../quantizers/pack.h"
#include "layout.h"

namespace spicerack {
namespace {

typedef uint32_t Words __attribute__((vector_size(16)));

constexpr int LINE = 16;  // words of a cache line: of each row as many are read at once

ALWAYS_INLINE Words all(uint32_t x) { return Words{x, x, x, x}; }

// Eight codes, four bits each, c0 lowest -> bytes j = 0..3 with c(j) and c(4 + j).
ALWAYS_INLINE Words apart(Words x) {
    x = (x | x << 8) & all(0x00ff00ff);
    return (x | x << 4) & all(0x0f0f0f0f);
}

// Bits of a word as the stream has them -> as a tile has them.
template <int BITS>
ALWAYS_INLINE Words placed(Words x) {
    if (BITS == 4) return apart(x & all(0xffff)) | apart(x >> 16) << 4;
    if (BITS == 2) {  // 16 codes c(4m + j), [m][j] -> [j][m]: a square of 4 x 4, transposed in two steps
        Words t = (x ^ x >> 12) & all(0x0000f0f0);
        x ^= t ^ t << 12;
        t = (x ^ x >> 6) & all(0x00cc00cc);
        x ^= t ^ t << 6;
    }
    return x;
}

// Bytes + add, each modulo 256.
ALWAYS_INLINE Words added(Words x, Words add) {
    const Words low = all(0x7f7f7f7f);
    return ((x & low) + (add & low)) ^ ((x ^ add) & ~low);
}

ALWAYS_INLINE Words load(const uint32_t* p) {
    Words x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Whole tiles of a panel: `count` rows of `dwords` words -> out [dwords, 16]. -> all bits that were set in both bits of a
// code of two.
template <int BITS>
uint32_t pack_words(const uint8_t* rows, int64_t stride, int count, int64_t dwords, int add, uint8_t* out) {
    uint32_t block[PANEL][LINE] = {};
    Words threes = all(0);
    const Words more = all(0x01010101u * uint8_t(add));
    for (int64_t first = 0; first < dwords; first += LINE) {
        const int width = dwords - first < LINE ? int(dwords - first) : LINE;  // BITS divide it or it is whole
        for (int r = 0; r < count; r++) std::memcpy(block[r], rows + r * stride + first * 4, size_t(width) * 4);
        for (int d = 0; d < width; d += 4) {
            for (int r = 0; r < PANEL; r += 4) {
                Words w[4];
                for (int i = 0; i < 4; i++) {
                    w[i] = load(block[r + i] + d);
                    if (BITS == 8) w[i] = r + i < count ? added(w[i], more) : w[i];
                    if (BITS == 2) threes |= w[i] & w[i] >> 1;
                }
                const Words a = __builtin_shufflevector(w[0], w[1], 0, 4, 1, 5), b = __builtin_shufflevector(w[0], w[1], 2, 6, 3, 7);
                const Words c = __builtin_shufflevector(w[2], w[3], 0, 4, 1, 5), e = __builtin_shufflevector(w[2], w[3], 2, 6, 3, 7);
                const Words column[4] = {
                    __builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                    __builtin_shufflevector(b, e, 0, 1, 4, 5), __builtin_shufflevector(b, e, 2, 3, 6, 7)};
                for (int i = 0; i < 4 && d + i < width; i++) {
                    const Words x = placed<BITS>(column[i]);
                    std::memcpy(out + ((first + d + i) * PANEL + r) * 4, &x, sizeof x);
                }
            }
        }
    }
    return (threes[0] | threes[1] | threes[2] | threes[3]) & 0x55555555;
}

// One tile, a byte for each code u, as rows and columns there are; zeros beyond. -> the largest u.
uint8_t fetch(const StoredCodes& s, int64_t row, int64_t column, uint8_t* tile) {
    const int64_t columns = s.k - column < TILE ? s.k - column : TILE;
    std::memset(tile, 0, BYTE_TILE);
    for (int64_t r = 0; r < PANEL && row + r < s.n; r++) {
        uint8_t line[TILE] = {};
        const int64_t n = row + r;
        if (s.order == Order::stream) {
            unpack(s.data + n * s.stride() + column / 8 * s.bits, 1, columns, s.bits, 0, line);
        } else if (s.order == Order::bytes) {
            const uint8_t* from = s.data + n * s.k + column;
            for (int64_t c = 0; c < columns; c++) line[c] = uint8_t(from[c] + s.offset);
        } else {
            const uint8_t* from = s.data + n % s.rows() * s.k + column;
            const int low = int(n / s.rows()) * 2;
            for (int64_t c = 0; c < columns; c++) line[c] = from[c] >> low & 3;
        }
        for (int q = 0; q < QUADS; q++) std::memcpy(tile + q * TILE_UNIT + r * 4, line + q * 4, 4);
    }
    uint8_t most = 0;
    for (int i = 0; i < BYTE_TILE; i++) most = tile[i] > most ? tile[i] : most;
    return most;
}

bool pack_trits(const StoredCodes& s, int64_t first, int64_t last, uint8_t* tiles) {
    const int64_t across = (s.k + TILE - 1) / TILE;
    int most = 0;
    for (int64_t bundle = first; bundle < last; bundle++) {
        for (int64_t t = 0; t < across; t++) {
            uint8_t* sum = tiles + (bundle * across + t) * BYTE_TILE;
            std::memset(sum, 0, BYTE_TILE);
            for (int p = BUNDLE - 1; p >= 0; p--) {
                uint8_t tile[BYTE_TILE];
                const int largest = fetch(s, (bundle * BUNDLE + p) * PANEL, t * TILE, tile);
                most = largest > most ? largest : most;
                for (int i = 0; i < BYTE_TILE; i++) sum[i] = uint8_t(3 * sum[i] + tile[i]);
            }
        }
    }
    return most <= s.most;
}

}  // namespace

bool pack_stored(const StoredCodes& s, int bits, int64_t first, int64_t last, uint8_t* tiles) {
    if (bits == TRITS) return pack_trits(s, first, last, tiles);
    const bool one_plane = s.bits == bits && (bits == 2 || bits == 4 || bits == 8);
    // In words a code is only looked at where it has two bits.
    const bool in_words = one_plane && (s.order == Order::stream || (s.order == Order::bytes && bits == 8)) &&
                          (bits == 2 ? s.most >= 2 : s.most == (1 << bits) - 1);
    const int64_t across = (s.k + TILE - 1) / TILE, whole = in_words ? s.k / TILE : 0;
    const int tile_bytes = bits * TILE_UNIT;
    bool good = true;
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t row = panel * PANEL;
        uint8_t* out = tiles + panel * across * tile_bytes;
        if (whole) {
            const int count = s.n - row < PANEL ? int(s.n - row) : PANEL;
            const uint8_t* rows = s.data + row * s.stride();
            const int add = s.order == Order::bytes ? s.offset : 0;
            const auto words = bits == 2 ? pack_words<2> : bits == 4 ? pack_words<4> : pack_words<8>;
            if (words(rows, s.stride(), count, whole * bits, add, out) && s.most < 3) good = false;
        }
        for (int64_t t = whole; t < across; t++) {
            uint8_t tile[BYTE_TILE];
            if (fetch(s, row, t * TILE, tile) > s.most) good = false;
            squeeze_tile(tile, bits, out + t * tile_bytes);
        }
    }
    return good;
}

void to_lanes(const uint8_t* values, int64_t rows, int64_t groups, int size, int add, int64_t n, int64_t first,
              int64_t last, uint8_t* lanes) {
    for (int64_t panel = first; panel < last; panel++) {
        uint8_t* out = lanes + panel * groups * PANEL * size;
        for (int64_t r = 0; r < PANEL; r++) {
            const int64_t row = panel * PANEL + r;
            const uint8_t* from = values + (rows == 1 ? 0 : row) * groups * size;
            for (int64_t g = 0; g < groups; g++) {
                uint8_t* to = out + (g * PANEL + r) * size;
                if (row >= n) {
                    std::memset(to, 0, size_t(size));
                } else if (size == 1) {
                    *to = uint8_t(from[g] + add);
                } else if (size == 2) {
                    std::memcpy(to, from + g * 2, 2);
                } else {
                    std::memcpy(to, from + g * 4, 4);
                }
            }
        }
    }
}

}  // namespace spicerack
