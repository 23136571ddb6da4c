// Vectors as wide as the instruction set that this file is compiled for, in GCC's and Clang's portable notation.
//
// Files that include it are compiled once per instruction set, each time in its own namespace SPICERACK_ISA, so that no
// inline code with wide instructions can end up in common code. For the same reason they use no templates of the
// standard library. Lanes never mix: results do not depend on how many there are.
#pragma once

#include <cstdint>
#include <cstring>

#include "number.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE ALWAYS_INLINE
#define FLAT __attribute__((always_inline))  // after a lambda's parameters

namespace spicerack::SPICERACK_ISA {

#if defined(__AVX512F__) && !defined(SPICERACK_256_BITS)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vu16 __attribute__((vector_size(LANES * 2)));
typedef int64_t vl __attribute__((vector_size(LANES * 4)));
typedef double vd __attribute__((vector_size(LANES * 4)));
typedef float vf_half __attribute__((vector_size(LANES * 2)));
typedef int32_t vi_half __attribute__((vector_size(LANES * 2)));

INLINE vf splat(float x) { return vf{} + x; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vabs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

// Half to even, for |x| < 2^22.
constexpr float ROUNDER = 12582912.0f;
INLINE vf round_small(vf x) { return (x + ROUNDER) - ROUNDER; }

template <class V>
INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

#if LANES == 16
#define FIRST_HALF 0, 1, 2, 3, 4, 5, 6, 7
#define SECOND_HALF 8, 9, 10, 11, 12, 13, 14, 15
#elif LANES == 8
#define FIRST_HALF 0, 1, 2, 3
#define SECOND_HALF 4, 5, 6, 7
#else
#define FIRST_HALF 0, 1
#define SECOND_HALF 2, 3
#endif

// Any lane of a mask (lanes are all ones or all zeros) is set.
INLINE bool any(vi mask) {
    uint64_t words[LANES / 2], all = 0;
    std::memcpy(words, &mask, sizeof mask);
    for (const uint64_t word : words) all |= word;
    return all != 0;
}

// A mask for each lane of a Wide.
struct WideMask {
    vl low, high;

    INLINE WideMask(vl l, vl h) : low(l), high(h) {}
    INLINE explicit WideMask(vi mask)
        : low(__builtin_convertvector(__builtin_shufflevector(mask, mask, FIRST_HALF), vl)),
          high(__builtin_convertvector(__builtin_shufflevector(mask, mask, SECOND_HALF), vl)) {}
    INLINE vi narrow() const {
        return __builtin_shufflevector(__builtin_convertvector(low, vi_half), __builtin_convertvector(high, vi_half),
                                       FIRST_HALF, SECOND_HALF);
    }
};

// A float64 for each lane, in two vectors.
struct Wide {
    vd low{}, high{};

    Wide() = default;
    INLINE Wide(vd l, vd h) : low(l), high(h) {}
    INLINE explicit Wide(double x) : low(vd{} + x), high(vd{} + x) {}
    INLINE explicit Wide(vf x)
        : low(__builtin_convertvector(__builtin_shufflevector(x, x, FIRST_HALF), vd)),
          high(__builtin_convertvector(__builtin_shufflevector(x, x, SECOND_HALF), vd)) {}
    INLINE vf narrow() const {
        return __builtin_shufflevector(__builtin_convertvector(low, vf_half), __builtin_convertvector(high, vf_half),
                                       FIRST_HALF, SECOND_HALF);
    }
    INLINE void add(vf x) { *this = *this + Wide(x); }
    INLINE double operator[](int lane) const { return lane < LANES / 2 ? low[lane] : high[lane - LANES / 2]; }

    friend INLINE Wide operator+(const Wide& a, const Wide& b) { return {a.low + b.low, a.high + b.high}; }
    friend INLINE Wide operator-(const Wide& a, const Wide& b) { return {a.low - b.low, a.high - b.high}; }
    friend INLINE Wide operator*(const Wide& a, const Wide& b) { return {a.low * b.low, a.high * b.high}; }
    friend INLINE Wide operator/(const Wide& a, const Wide& b) { return {a.low / b.low, a.high / b.high}; }
    friend INLINE WideMask operator<(const Wide& a, const Wide& b) { return {a.low < b.low, a.high < b.high}; }
};

INLINE Wide select(const WideMask& mask, const Wide& a, const Wide& b) {
    return {mask.low ? a.low : b.low, mask.high ? a.high : b.high};
}

// Interleaving the first and second half of the rows log2(LANES) times transposes a LANES x LANES square.
INLINE void transpose(vf* rows) {
    for (int step = 1; step < LANES; step *= 2) {
        vf mixed[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            const vf a = rows[i], b = rows[i + LANES / 2];
#if LANES == 16
            mixed[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            mixed[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LANES == 8
            mixed[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            mixed[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
            mixed[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            mixed[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
        }
        for (int i = 0; i < LANES; i++) rows[i] = mixed[i];
    }
}

// ---- number types -------------------------------------------------------------------------------------------------

struct F32 {
    typedef float value;
    static INLINE vf widen(const value* p) { return load<vf>(p); }
};
struct BF16 {
    typedef uint16_t value;
    static INLINE vf widen(const value* p) { return (vf)(__builtin_convertvector(load<vu16>(p), vu) << 16); }
};
struct F16 {
    typedef uint16_t value;
    static INLINE vf widen(const value* p) {
#if LANES == 16
        return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
        return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#else
        const vu bits = __builtin_convertvector(load<vu16>(p), vu);
        const vu magnitude = (bits & 0x7fffu) << 13;
        const vf finite = (vf)magnitude * 0x1p112f;  // moves the exponent's bias; exact, subnormals included
        const vu special = magnitude | 0x7f800000u;
        return (vf)((magnitude >= 0x0f800000u ? special : (vu)finite) | (bits & 0x8000u) << 16);
#endif
    }
};

INLINE vf widen(const void* p, Float type) {
    if (type == Float::f32) return load<vf>(p);
    return type == Float::bf16 ? BF16::widen((const uint16_t*)p) : F16::widen((const uint16_t*)p);
}

INLINE vu16 to_bf16(vf x) {
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const vu nan = bits >> 16 | 0x40u;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, vu16);
}

INLINE vu16 to_f16(vf x) {
#if LANES == 16
    return (vu16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (vu16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const vu bits = (vu)x, sign = bits >> 16 & 0x8000u;
    const vf magnitude = vabs(x);
    const vu even = (vu)magnitude >> 13 & 1u;
    const vu normal = ((vu)magnitude + 0xfffu + even - 0x38000000u) >> 13;  // moves the exponent's bias by 112
    const vu subnormal = (vu)(magnitude + 0.5f) - 0x3f000000u;               // float32's spacing at 1/2 is the smallest f16
    vu half = magnitude < 0x1p-14f ? subnormal : normal;
    half = magnitude >= 65520.0f ? vu{} + 0x7c00u : half;
    half = (vu)magnitude > 0x7f800000u ? ((vu)magnitude >> 13 & 0x3ffu) | 0x7e00u : half;
    return __builtin_convertvector(half | sign, vu16);
#endif
}

// `count` <= LANES values to p.
INLINE void narrow(vf x, Float type, void* p, int64_t count) {
    if (count <= 0) return;
    if (type == Float::f32) {
        count == LANES ? store(p, x) : (void)std::memcpy(p, &x, count * 4);
    } else {
        const vu16 half = type == Float::bf16 ? to_bf16(x) : to_f16(x);
        count == LANES ? store(p, half) : (void)std::memcpy(p, &half, count * 2);
    }
}

// `count` <= LANES values from p; zeros beyond.
INLINE vf widen_some(const void* p, Float type, int64_t count) {
    if (count == LANES) return widen(p, type);
    alignas(64) unsigned char some[LANES * 4] = {};
    if (count > 0) std::memcpy(some, p, count * size_of(type));
    return widen(some, type);
}

// The nearest value of the stored type (half to even); 0 below 2^-126, where 1/scale would overflow.
INLINE vf stored(vf s, Float type) {
    const vu sign = (vu)s & 0x80000000u;
    vf magnitude = vabs(s);
    if (type == Float::bf16) {
        const vu even = ((vu)magnitude >> 16) & 1u;
        magnitude = (vf)(((vu)magnitude + even + 0x7fffu) & 0xffff0000u);
    } else if (type == Float::f16) {
        const vu even = ((vu)magnitude >> 13) & 1u;
        const vf rounded = (vf)(((vu)magnitude + even + 0xfffu) & 0xffffe000u);
        const vf normal = rounded > 65504.0f ? splat(__builtin_inff()) : rounded;
        const vf subnormal = (magnitude + 0.5f) - 0.5f;  // float32's spacing at 1/2 is the smallest f16
        magnitude = magnitude < 0x1p-14f ? subnormal : normal;
    }
    magnitude = magnitude < 0x1p-126f ? vf{} : magnitude;
    return (vf)((vu)magnitude | sign);
}

}  // namespace spicerack::SPICERACK_ISA
