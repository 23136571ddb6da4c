// What each instruction set brings to the kernels: 16 rows times a quad of 4 columns, and the few operations that portable
// vectors lack. Every function gives the same numbers on every instruction set.
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

constexpr int PARTS = PANEL / LANES;    // vectors that hold a panel's 16 rows
constexpr int BYTES = LANES * 4;        // of a vector

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

// Five codes 0, 1, 2 from every byte, the sum of u[p] * 3^p.
INLINE void split_trits(vi packed, vi* u) {
#if defined(__AVX512VBMI__) && defined(__GFNI__) && LANES == 16
    // 81 and 162 end in the bits 01 and 10: what subtracting them took away tells u[4].
    const __m512i v = raw(packed), last = _mm512_set1_epi8(81), two_bits = _mm512_set1_epi8(3);
    __m512i n = _mm512_min_epu8(v, _mm512_sub_epi8(v, last));
    n = _mm512_min_epu8(n, _mm512_sub_epi8(n, last));
    u[4] = (vi)_mm512_and_si512(_mm512_sub_epi8(v, n), two_bits);
    // The others, two bits each.
    const __m512i four = _mm512_permutex2var_epi8(_mm512_loadu_si512(FOUR_TRITS.bytes), n, _mm512_loadu_si512(FOUR_TRITS.bytes + 64));
    u[0] = (vi)_mm512_and_si512(four, two_bits);
    // Matrices of bits that move bits 2-3, 4-5, 6-7 to 0-1 and clear the rest.
    u[1] = (vi)_mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x0408ll << 48), 0);
    u[2] = (vi)_mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x1020ll << 48), 0);
    u[3] = (vi)_mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x4080ll << 48), 0);
#else
    typedef uint8_t bytes __attribute__((vector_size(BYTES)));
    bytes left = (bytes)packed;
    for (int p = 4, power = 81; p > 0; p--, power /= 3) {
        const bytes once = (bytes)(left >= uint8_t(power)), twice = (bytes)(left >= uint8_t(2 * power));
        left -= (once & uint8_t(power)) + (twice & uint8_t(power));
        u[p] = (vi)(bytes{} - once - twice);
    }
    u[0] = (vi)left;
#endif
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
    typedef uint8_t bytes __attribute__((vector_size(BYTES)));
    typedef int8_t signed_bytes __attribute__((vector_size(BYTES)));
    const bytes w = (bytes)u;
    const signed_bytes v = (signed_bytes)a;
    for (int lane = 0; lane < LANES; lane++) {
        int32_t sum = 0;
        for (int i = 4 * lane; i < 4 * lane + 4; i++) sum += (int32_t(w[i]) - SHIFT<BITS>)*int32_t(v[i]);
        acc[lane] += sum;
    }
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
