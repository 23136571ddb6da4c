// What each instruction set brings to the kernels: 16 rows times a quad of 4 columns, and the few operations that
// portable vectors lack. Every function gives the same numbers on every instruction set.
#pragma once

#include "../simd.h"
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <cmath>

namespace spicerack::SPICERACK_ISA {

constexpr int PARTS = PANEL / LANES;  // vectors that hold a panel's 16 rows
constexpr int VECTOR_BYTES = LANES * 4;

#if LANES == 16
INLINE __m512i raw(vi x) { return (__m512i)x; }
#elif LANES == 8
INLINE __m256i raw(vi x) { return (__m256i)x; }
#endif

#if LANES == 4 && !defined(__ARM_FEATURE_DOTPROD)
constexpr bool SCALAR = true;  // no integer dot product
#else
constexpr bool SCALAR = false;
#endif

INLINE vi splat_int(int32_t x) { return vi{} + x; }

// Four bytes from memory, a quad of activations or an int32, for every row.
INLINE vi four_bytes(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return splat_int(four);
}

// acc + sum over four columns of (u - SHIFT<BITS>) a. Codes u are below 2^BITS (BITS 0: below 128), |a| <= 127.
//
// Instructions that multiply signed by signed, and AVX2's, which saturates above 15 bits, take 8-bit codes as u - 128.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
template <int BITS>
constexpr int SHIFT = 0;

template <int BITS>
INLINE vi dot(vi acc, vi u, vi a) {
#if LANES == 16
    return (vi)_mm512_dpbusd_epi32(raw(acc), raw(u), raw(a));
#elif defined(__AVX512VNNI__)
    return (vi)_mm256_dpbusd_epi32(raw(acc), raw(u), raw(a));
#else
    return (vi)_mm256_dpbusd_avx_epi32(raw(acc), raw(u), raw(a));
#endif
}
#else
template <int BITS>
constexpr int SHIFT = BITS == 8 ? 128 : BITS == TRITS && SCALAR ? 1 : 0;

template <int BITS>
INLINE vi dot(vi acc, vi u, vi a) {
#if defined(__AVX2__)
    __m256i pairs;  // |sum of two| <= 128 * 127 * 2 < 2^15
    if (BITS == 8) {
        const __m256i w = _mm256_xor_si256(raw(u), _mm256_set1_epi8(-128));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(raw(a), w));
    } else {
        pairs = _mm256_maddubs_epi16(raw(u), raw(a));
    }
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t w = (int8x16_t)(BITS == 8 ? u ^ (int32_t)0x80808080 : u);
    return (vi)vdotq_s32((int32x4_t)acc, w, (int8x16_t)a);
#else
    if constexpr (BITS == TRITS) {  // additions and subtractions alone
        for (int j = 0; j < 4; j++) {
            const vi code = u >> 8 * j & 0xff, value = a << (24 - 8 * j) >> 24;
            acc += value & (code == 2);
            acc -= value & (code == 0);
        }
        return acc;
    }
    for (int j = 0; j < 4; j++) acc += ((vi)((vu)u >> 8 * j & 0xff) - SHIFT<BITS>) * (a << (24 - 8 * j) >> 24);
    return acc;
#endif
}
#endif

// z * x in every row, for -256 < z < 256 and |x| < 2^15; z comes from `small_factor`.
#if LANES == 4
INLINE vi small_factor(vi z) { return z; }
INLINE vi small_product(vi z, vi x) { return z * x; }
#else
INLINE vi small_factor(vi z) { return z & 0xffff; }  // the upper 16 bits of x are multiplied by 0
#if LANES == 16
INLINE vi small_product(vi z, vi x) { return (vi)_mm512_madd_epi16(raw(z), raw(x)); }
#else
INLINE vi small_product(vi z, vi x) { return (vi)_mm256_madd_epi16(raw(z), raw(x)); }
#endif
#endif

// x y + z, rounded once.
INLINE vf fused(vf x, vf y, vf z) {
#if LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif LANES == 8
    return (vf)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
    for (int lane = 0; lane < LANES; lane++) z[lane] = std::fmaf(x[lane], y[lane], z[lane]);
    return z;
#endif
}

// Across the lanes: the sum, and the largest of magnitudes, which are not negative.
#if LANES == 16
INLINE int32_t sum_across(vi x) { return _mm512_reduce_add_epi32(raw(x)); }
INLINE int32_t largest_across(vi x) { return _mm512_reduce_max_epi32(raw(x)); }
#else
INLINE int32_t sum_across(vi x) {
    int32_t lanes[LANES], sum = 0;
    store(lanes, x);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}
INLINE int32_t largest_across(vi x) {
    int32_t lanes[LANES], largest = 0;
    store(lanes, x);
    for (int i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}
#endif

// LANES bytes as integers, and back (of -128..127). GCC 12 takes vectors of bytes apart by itself.
INLINE vi from_bytes(const uint8_t* p) {
#if LANES == 16
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif LANES == 8
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    typedef uint8_t small __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load<small>(p), vi);
#endif
}

INLINE void to_bytes(vi x, int8_t* p) {
#if LANES == 16
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(raw(x)));
#elif LANES == 8
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(raw(x)), _mm256_extracti128_si256(raw(x), 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(half, half));
#else
    typedef int8_t small __attribute__((vector_size(LANES)));
    store(p, __builtin_convertvector(x, small));
#endif
}

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// The nearest integer, half to even, of |x| < 2^22.
INLINE vi round_to_int(vf x) { return (vi)(x + ROUNDER) - (vi)splat(ROUNDER); }

}  // namespace spicerack::SPICERACK_ISA
