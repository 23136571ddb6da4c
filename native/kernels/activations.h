// x as bodies read it: strips of its rows, in int8 with their scales and sums, or in float32. Part of linear.cpp.
//
// A row of x is quantized by one thread, its spans of 32 columns from left to right; codes are q = round(a / s), half
// to even, within -127..127, with s = largest magnitude / 127 of the span or the row, or a given one.
#pragma once

#include <cstring>

#include "buffer.h"
#include "dot.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr float LARGEST = 127.0f;         // codes are -127..127, of equal reach to both sides
constexpr float FLUSH = 0x1p-100f;        // a span below this counts as zeros: from 2^-121 down 1 / scale would overflow
constexpr int32_t INFINITE = 0x7f800000;  // the bits of infinity; those of NaN are above
constexpr int VECTORS_A_SPAN = TILE / LANES;

// Rows in parts of nearly equal size, none larger than `most`: the first `longer` have one row more than the others.
struct EvenParts {
    int64_t count, each, longer;

    INLINE EvenParts(int64_t rows, int64_t most)
        : count((rows + most - 1) / most), each(rows / count), longer(rows - each * count) {}
    INLINE int64_t first(int64_t part) const { return part * each + least(part, longer); }
    INLINE int64_t size(int64_t part) const { return each + (part < longer); }
};

// Some rows of x, [rows, K], as the bodies read them. The strip that begins with row r begins at r * spans * 32
// (codes, floats) and r * spans (scale, sums); in it all rows' values for a span lie together.
struct Slab {
    int64_t rows, k, spans;
    const char* x;
    Float type;
    int8_t* codes;
    int16_t* words;  // the codes once more, or null: of every four the even ones, then the odd ones
    float* scale;    // one for each span, or 1 where rows have their own
    int32_t* sums;   // of the codes of each span
    int32_t* low;    // of the first half of them, or null
    float* token;    // [rows], or null: the row's scale
    int32_t* total;  // [rows]: of all codes of a row
    float* floats;
    uint8_t* wild;   // [rows]: it holds a NaN or an infinity
};

// A row of the slab: the r-th of a strip of `height` rows that begins with row `first`.
struct SlabRow {
    int64_t first, height, r;

    INLINE int64_t row() const { return first + r; }
    // Of the row's first value among those that have one for each span.
    INLINE int64_t at(const Slab& s) const { return first * s.spans + r; }
    INLINE int64_t at_column(const Slab& s) const { return (first * s.spans + r) * TILE; }
};

INLINE vi magnitude(vf x) { return (vi)x & 0x7fffffff; }

// 32 activations, zeros beyond the row's end.
template <class T>
INLINE void load_span(const Slab& s, int64_t row, int64_t span, vf* x) {
    const typename T::value* at = (const typename T::value*)s.x + row * s.k + span * TILE;
    const int64_t left = s.k - span * TILE;
    if (left >= TILE) {
        for (int i = 0; i < VECTORS_A_SPAN; i++) x[i] = T::widen(at + i * LANES);
    } else {
        typename T::value some[TILE] = {};
        std::memcpy(some, at, left * sizeof *at);
        for (int i = 0; i < VECTORS_A_SPAN; i++) x[i] = T::widen(some + i * LANES);
    }
}

// The larger magnitudes of two, as integers, of which NaN is the largest.
INLINE vi larger(const vf* x, vi most) {
    for (int i = 0; i < VECTORS_A_SPAN; i++) most = vmax(magnitude(x[i]), most);
    return most;
}

// 127 / largest, and the scale itself; both 0 for (nearly) nothing, and for what is not finite.
struct Step {
    float scale = 0, inverse = 0;

    INLINE Step() {}
    // largest: the bits of the largest magnitude.
    INLINE explicit Step(int32_t largest) {
        float most;
        std::memcpy(&most, &largest, 4);
        if (largest < INFINITE && most >= FLUSH) {
            scale = most / LARGEST;
            inverse = 1.0f / scale;
        }
    }
};

// -> the sum of the codes. Divided, a given scale has the codes that any other reader of it finds; a scale of our own
// costs a product, and needs no limits: 127 (1 + 2^-22) rounds to 127.
// low: where the sum of the first half goes, or null.
template <bool GIVEN>
INLINE int32_t round_span(const vf* x, const Step& step, int8_t* codes, int32_t* low) {
    if (!GIVEN && step.inverse == 0) {  // nothing, or NaN and infinities: what of them became would be no code
        std::memset(codes, 0, TILE);
        if (low) *low = 0;
        return 0;
    }
    vi q[VECTORS_A_SPAN], sum{};
    for (int i = 0; i < VECTORS_A_SPAN; i++) {
        if (GIVEN) {
            q[i] = round_to_int(vmin(vmax(x[i] / splat(step.scale), splat(-LARGEST)), splat(LARGEST)));
        } else {
            q[i] = round_to_int(x[i] * splat(step.inverse));
        }
        sum += q[i];
    }
    to_bytes(q, codes);
    if (low) {
        vi first = q[0];
        for (int i = 1; i < VECTORS_A_SPAN / 2; i++) first += q[i];
        *low = sum_across(first);
    }
    return sum_across(sum);
}

template <class T>
void quantize_row(const Slab& s, Activations how, float fixed_scale, const SlabRow& place) {
    const int64_t row = place.row();
    int8_t* codes = s.codes + place.at_column(s);
    float* scale = s.scale + place.at(s);
    int32_t *sums = s.sums + place.at(s), *low = s.low ? s.low + place.at(s) : nullptr;
    const bool given = how == Activations::fixed;
    int32_t worst = 0, total = 0;
    vf x[VECTORS_A_SPAN];
    Step step;
    if (how != Activations::spans) {
        vi most{};
        for (int64_t b = 0; b < s.spans; b++) {
            load_span<T>(s, row, b, x);
            most = larger(x, most);
        }
        worst = largest_across(most);
        step = Step(worst);
        if (given) step.scale = fixed_scale;
        s.token[row] = step.scale;
    }
    for (int64_t b = 0; b < s.spans; b++) {
        load_span<T>(s, row, b, x);
        if (how == Activations::spans) {
            const int32_t largest = largest_across(larger(x, vi{}));
            worst = largest > worst ? largest : worst;
            step = Step(largest);
        }
        *scale = how == Activations::spans ? step.scale : 1.0f;
        *sums = given ? round_span<true>(x, step, codes, low) : round_span<false>(x, step, codes, low);
        total += *sums;
        if (low) low += place.height;
        codes += TILE * place.height, scale += place.height, sums += place.height;
    }
    s.total[row] = total;
    s.wild[row] = worst >= INFINITE;
}

// `count` codes, a multiple of 32, as words in the order of Slab.
INLINE void words_of(const int8_t* codes, int64_t count, int16_t* words) {
    for (int64_t i = 0; i < count; i += 4) {
        words[i] = codes[i], words[i + 1] = codes[i + 2], words[i + 2] = codes[i + 1], words[i + 3] = codes[i + 3];
    }
}

template <class T>
void widen_row(const Slab& s, const SlabRow& place) {
    float* floats = s.floats + place.at_column(s);
    for (int64_t b = 0; b < s.spans; b++, floats += TILE * place.height) {
        vf x[VECTORS_A_SPAN];
        load_span<T>(s, place.row(), b, x);
        for (int i = 0; i < VECTORS_A_SPAN; i++) store(floats + i * LANES, x[i]);
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
