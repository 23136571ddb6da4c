#include "layout.h"

#include <cmath>
#include <cstring>

namespace spicerack {
namespace {

constexpr int VECTOR = TILE_UNIT;
constexpr int POWERS_OF_3[BUNDLE] = {1, 3, 9, 27, 81};

// The planes of a code, widest first: `codes` bytes [8 quads, 64] <-> `tile`. Work on one plane, `bits` wide, whose
// codes begin at bit `low`; quads v * per .. v * per + per - 1 share vector v.
void squeeze(const uint8_t* codes, int bits, int low, uint8_t* plane) {
    const int per = 8 / bits, mask = (1 << bits) - 1;
    for (int v = 0; v < QUADS / per; v++) {
        for (int i = 0; i < VECTOR; i++) {
            int packed = 0;
            for (int q = 0; q < per; q++) packed |= (codes[(v * per + q) * VECTOR + i] >> low & mask) << (q * bits);
            plane[v * VECTOR + i] = uint8_t(packed);
        }
    }
}

void spread(const uint8_t* plane, int bits, int low, uint8_t* codes) {
    const int per = 8 / bits, mask = (1 << bits) - 1;
    for (int quad = 0; quad < QUADS; quad++) {
        const uint8_t* vector = plane + quad / per * VECTOR;
        for (int i = 0; i < VECTOR; i++) codes[quad * VECTOR + i] |= (vector[i] >> (quad % per * bits) & mask) << low;
    }
}

template <class Plane>
void planes(int bits, const Plane& plane) {
    int low = 0;
    for (int width = 8; width > 0; width /= 2) {
        if (bits & width) {
            plane(width, low);
            low += width;
        }
    }
}

// Where row r, column c of a tile is among its bytes.
int place(int64_t r, int64_t c) { return int(c / 4 * VECTOR + r * 4 + c % 4); }

// A tile with one byte a code.
struct Tile {
    uint8_t bytes[BYTE_TILE] = {};

    void to(uint8_t* codes, int64_t n, int64_t k, int offset, int64_t row, int64_t column) const {
        for (int64_t r = 0; r < PANEL && row + r < n; r++) {
            uint8_t* out = codes + (row + r) * k + column;
            for (int64_t c = 0; c < TILE && column + c < k; c++) out[c] = uint8_t(bytes[place(r, c)] - offset);
        }
    }
};

void unpack_trits(const uint8_t* tiles, int64_t n, int64_t k, int offset, uint8_t* codes) {
    for (int64_t row = 0; row < n; row += BUNDLE * PANEL) {
        for (int64_t column = 0; column < k; column += TILE, tiles += BYTE_TILE) {
            uint8_t left[BYTE_TILE];
            std::memcpy(left, tiles, BYTE_TILE);
            for (int p = 0; p < BUNDLE; p++) {
                Tile tile;
                for (int i = 0; i < BYTE_TILE; i++) {
                    tile.bytes[i] = left[i] % 3;
                    left[i] /= 3;
                }
                tile.to(codes, n, k, offset, row + p * PANEL, column);
            }
        }
    }
}

}  // namespace

void squeeze_tile(const uint8_t* bytes, int bits, uint8_t* tile) {
    planes(bits, [&](int width, int low) {
        squeeze(bytes, width, low, tile);
        tile += width * TILE_UNIT;
    });
}

void unpack_panels(const uint8_t* tiles, int64_t n, int64_t k, int bits, int offset, uint8_t* codes) {
    if (bits == TRITS) return unpack_trits(tiles, n, k, offset, codes);
    for (int64_t row = 0; row < n; row += PANEL) {
        for (int64_t column = 0; column < k; column += TILE) {
            Tile tile;
            planes(bits, [&](int width, int low) {
                spread(tiles, width, low, tile.bytes);
                tiles += width * TILE_UNIT;
            });
            tile.to(codes, n, k, offset, row, column);
        }
    }
}

namespace {

float as_float(const void* p, int64_t i, Float type) {
    if (type == Float::f32) return ((const float*)p)[i];
    const uint32_t bits = ((const uint16_t*)p)[i];
    uint32_t wide = bits << 16;
    float value;
    if (type == Float::f16) {
        const uint32_t magnitude = (bits & 0x7fffu) << 13;
        std::memcpy(&value, &magnitude, 4);
        value *= 0x1p112f;  // moves the exponent's bias; exact, subnormals included
        std::memcpy(&wide, &value, 4);
        if (magnitude >= 0x0f800000u) wide = magnitude | 0x7f800000u;
        wide |= (bits & 0x8000u) << 16;
    }
    std::memcpy(&value, &wide, 4);
    return value;
}

float as_float(const void* p, int64_t i, ScaleType type) {
    if (type == ScaleType::int8) return ((const int8_t*)p)[i];
    if (type != ScaleType::e4m3) return as_float(p, i, Float(type));
    const int code = ((const uint8_t*)p)[i], magnitude = code % 128 > 0x7e ? 0x7e : code % 128;
    const int exponent = magnitude >> 3, fraction = magnitude & 7;
    const float value = exponent ? std::ldexp(8.0f + float(fraction), exponent - 10) : std::ldexp(float(fraction), -9);
    return code >= 128 ? -value : value;
}

// The scale (kind 0) or the minimum (1) of a row of a panel at a column.
float step_of(const Weights& w, int64_t panel, int64_t r, int64_t column, int kind) {
    const int64_t group = w.group == 0 ? 0 : column / w.group, block = w.block == 0 ? 0 : column / w.block;
    const float step = as_float(w.scale, ((panel * w.groups() + group) * w.kinds() + kind) * PANEL + r, w.scale_type);
    if (!w.outer) return step;
    return step * as_float(w.outer, ((panel * w.blocks() + block) * w.kinds() + kind) * PANEL + r, w.outer_type);
}

}  // namespace

void decode_rows(const Weights& w, const int64_t* rows, int64_t count, float* out) {
    const int64_t group = w.group == 0 ? w.k : w.group, piece = group < TILE ? group : int64_t(TILE);
    const int bits = w.bits == LOOKED_UP ? 4 : w.bits;
    for (int64_t i = 0; i < count; i++) {
        const int64_t panel = rows[i] / PANEL, r = rows[i] % PANEL;
        const uint8_t* tile = w.tile(w.bits == TRITS ? panel / BUNDLE : panel, 0);
        for (int64_t column = 0; column < w.k; column += TILE, tile += w.tile_bytes()) {
            const int64_t at = (panel * w.groups() + column / group) * PANEL + r;
            const float zero = float(w.zero ? w.zero[at] : w.offset) - (w.half ? 0.5f : 0.0f);
            uint8_t codes[TILE] = {};
            const uint8_t* plane = tile;
            if (w.bits == TRITS) {
                for (int64_t c = 0; c < TILE; c++) codes[c] = tile[place(r, c)] / POWERS_OF_3[panel % BUNDLE] % 3;
            } else {
                planes(bits, [&](int width, int low) {
                    const int per = 8 / width, mask = (1 << width) - 1;
                    for (int quad = 0; quad < QUADS; quad++) {
                        const uint8_t* four = plane + quad / per * VECTOR + r * 4;
                        for (int j = 0; j < 4; j++) codes[quad * 4 + j] |= (four[j] >> (quad % per * width) & mask) << low;
                    }
                    plane += width * TILE_UNIT;
                });
            }
            float scale = 0, least = 0;
            for (int64_t c = 0; c < TILE && column + c < w.k; c++) {
                if (c % piece == 0) {
                    scale = step_of(w, panel, r, column + c, 0);
                    least = w.minima ? step_of(w, panel, r, column + c, 1) : 0.0f;
                }
                const float value = scale * (float(w.bits == LOOKED_UP ? w.table[codes[c]] : codes[c]) - zero);
                *out++ = w.minima ? value + least : value;
            }
        }
    }
}

}  // namespace spicerack
