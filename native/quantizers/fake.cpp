// See fake.h. Row by row, group by group, in float32; rows of a group need not end with a vector.
#include "fake.h"

#include "../simd.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr int SUMS = 16;         // partial sums side by side, whatever the vectors' width
constexpr int64_t CHUNK = 1024;  // neighbours that are summed in float32, in so many sums

// Half to even; -0 and what is not finite stay.
INLINE vf round_even(vf x) {
    const vf size = vabs(x), whole = (size + 0x1p23f) - 0x1p23f;
    return (vf)((vu)(size < 0x1p23f ? whole : size) | ((vu)x & 0x80000000u));
}

// One group's numbers in every lane.
template <bool OFFSET>
struct Rounding {
    vf scale, inverse, zero, lo, hi;

    INLINE Rounding(const Fake& f, int64_t group)
        : scale(splat(f.scale[group])),
          inverse(splat(1.0f / f.scale[group])),
          zero(OFFSET ? splat(f.zero ? f.zero[group] : -0.5f) : vf{}),
          lo(splat(f.levels.lo)),
          hi(splat(f.levels.hi)) {}
    INLINE vf place(vf w) const { return OFFSET ? w * inverse + zero : w * inverse; }
    // NaN stays.
    INLINE vf code(vf place) const {
        const vf whole = round_even(place), above = whole < lo ? lo : whole;
        return above > hi ? hi : above;
    }
    INLINE vf decode(vf code) const { return (OFFSET ? code - zero : code) * scale; }
};

INLINE int64_t at_most(int64_t count, int64_t limit) { return count < limit ? count : limit; }

template <bool OFFSET>
INLINE void fake_rows(const Fake& f, int64_t first, int64_t last, void* out, Float type, Float out_type) {
    const int64_t across = f.across(), size = size_of(type), out_size = size_of(out_type);
    for (int64_t row = first; row < last; row++) {
        for (int64_t b = 0; b < across; b++) {
            const Rounding<OFFSET> r(f, row / f.rows * across + b);
            const int64_t start = row * f.k + b * f.columns;
            const char* w = (const char*)f.w + start * size;
            char* to = (char*)out + start * out_size;
            for (int64_t j = 0; j < f.columns; j += LANES) {
                const int64_t count = at_most(f.columns - j, LANES);
                const vf x = widen_some(w + j * size, type, count);
                narrow(r.decode(r.code(r.place(x))), out_type, to + j * out_size, count);
            }
        }
    }
}

// Lane 0 gets all, in pairs, those farthest apart first.
INLINE float sum_of_lanes(vf x) {
#if LANES == 16
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
    x += __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
    return x[0];
}

// A running sum in SUMS places.
struct Running {
    vf part[SUMS / LANES]{};

    // In pairs, those farthest apart first: here as far as they are in different vectors.
    INLINE double total() const {
        vf all[SUMS / LANES];
        std::memcpy(all, part, sizeof all);
        for (int half = SUMS / LANES / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; i++) all[i] += all[i + half];
        }
        return double(sum_of_lanes(all[0]));
    }
};

INLINE vf first_lanes(vf x, int64_t count) {
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < int32_t(count) ? x : vf{};
}

template <bool OFFSET>
INLINE void gradients_of_rows(const Fake& f, const Slopes& s, int64_t first, int64_t last, Float type, Float grad_type,
                              Float out_type) {
    const int64_t across = f.across(), size = size_of(type), grad_size = size_of(grad_type), out_size = size_of(out_type);
    for (int64_t row = first; row < last; row++) {
        for (int64_t b = 0; b < across; b++) {
            const Rounding<OFFSET> r(f, row / f.rows * across + b);
            const int64_t start = row * f.k + b * f.columns;
            const char *w = (const char*)f.w + start * size, *grad = (const char*)s.grad + start * grad_size;
            double by_scale = 0, by_zero = 0;
            for (int64_t chunk = 0; chunk < f.columns; chunk += CHUNK) {
                const int64_t end = at_most(f.columns, chunk + CHUNK);
                Running scale, zero;
                for (int64_t j = chunk; j < end; j += LANES) {
                    const int64_t count = at_most(end - j, LANES);
                    const vf g = widen_some(grad + j * grad_size, grad_type, count);
                    const vf u = r.place(widen_some(w + j * size, type, count)), q = r.code(u);
                    const vi inside = s.cells ? vabs(q - u) <= 0.5f : (u >= r.lo) & (u <= r.hi);
                    const vf kept = g * (inside ? splat(1.0f) : vf{});
                    vf slope = (q - (inside ? u : r.zero)) * g, shift = kept - g;
                    if (count < LANES) slope = first_lanes(slope, count), shift = first_lanes(shift, count);
                    const int part = int(j / LANES % (SUMS / LANES));
                    scale.part[part] += slope;
                    zero.part[part] += shift;
                    if (s.rounded) narrow(r.decode(q), out_type, (char*)s.rounded + (start + j) * out_size, count);
                    if (s.by_weight) narrow(kept, Float::f32, s.by_weight + start + j, count);
                }
                by_scale += scale.total();
                if (s.by_zero) by_zero += zero.total();
            }
            if (s.by_scale) s.by_scale[row * across + b] = by_scale;
            if (s.by_zero) s.by_zero[row * across + b] = by_zero;
        }
    }
}

}  // namespace

// Float32, the usual case, gets code of its own.
void fake(const Fake& f, int64_t first, int64_t last, void* out, Float out_type) {
    const bool plain = f.type == Float::f32 && out_type == Float::f32;
    if (f.zero || f.levels.half) {
        plain ? fake_rows<true>(f, first, last, out, Float::f32, Float::f32)
              : fake_rows<true>(f, first, last, out, f.type, out_type);
    } else {
        plain ? fake_rows<false>(f, first, last, out, Float::f32, Float::f32)
              : fake_rows<false>(f, first, last, out, f.type, out_type);
    }
}

void fake_gradients(const Fake& f, const Slopes& s, int64_t first, int64_t last) {
    const bool plain = f.type == Float::f32 && s.type == Float::f32 && s.rounded_type == Float::f32;
    if (f.zero || f.levels.half) {
        plain ? gradients_of_rows<true>(f, s, first, last, Float::f32, Float::f32, Float::f32)
              : gradients_of_rows<true>(f, s, first, last, f.type, s.type, s.rounded_type);
    } else {
        plain ? gradients_of_rows<false>(f, s, first, last, Float::f32, Float::f32, Float::f32)
              : gradients_of_rows<false>(f, s, first, last, f.type, s.type, s.rounded_type);
    }
}

}  // namespace spicerack::SPICERACK_ISA
