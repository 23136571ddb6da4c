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

// The bytes of a table [16] at the places 0..15 that are the bytes of x.
INLINE vi look_up(vi x, const uint8_t* table) {
#if LANES == 16
    return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), raw(x));
#elif LANES == 8
    return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), raw(x));
#elif defined(__aarch64__)
    return (vi)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)x);
#else
    uint8_t bytes[VECTOR_BYTES];
    store(bytes, x);
    for (int i = 0; i < VECTOR_BYTES; i++) bytes[i] = table[bytes[i]];
    return load<vi>(bytes);
#endif
}

// Four bytes from memory, a quad of activations or an int32, for every row.
INLINE vi four_bytes(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return splat_int(four);
}

// How codes come to a product, as a template argument: the bits of packed planes (2 to 8), TRITS, or one of these.
constexpr int UNPACKED = 16;  // and so many bits: unpacked before, to a byte a code; of 8 bits to a word
constexpr int bits_of(int codes) { return codes == TRITS ? 2 : codes == LOOKED_UP ? 8 : codes % UNPACKED; }
// Bytes of 8 bits, as they are or looked up.
constexpr bool in_bytes(int codes) { return codes == 8 || codes == LOOKED_UP; }
// Codes and activations are multiplied as 16-bit words, two columns at a time. AVX2's product of bytes saturates above 15
// bits, and what takes 8-bit codes apart into magnitudes and signs for it costs more than to unpack words once.
constexpr bool in_words(int codes) { return codes == UNPACKED + 8; }

// acc + sum over four columns of (u - SHIFT<CODES>) a; of two columns in words. |a| <= 127.
//
// Instructions that multiply signed by signed, and AVX2's of bytes, take 8-bit codes as u - 128.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool PAIRS = false;

template <int CODES>
constexpr int SHIFT = 0;

template <int CODES>
INLINE vi dot(vi acc, vi u, vi a) {
#if LANES == 16
    return (vi)_mm512_dpbusd_epi32(raw(acc), raw(u), raw(a));
#elif defined(__AVX512VNNI__)
    return (vi)_mm256_dpbusd_epi32(raw(acc), raw(u), raw(a));
#else
    return (vi)_mm256_dpbusd_avx_epi32(raw(acc), raw(u), raw(a));
#endif
}
#elif defined(__AVX2__)
constexpr bool PAIRS = true;  // products of bytes come as 16-bit sums of two columns

template <int CODES>
constexpr int SHIFT = in_bytes(CODES) ? 128 : 0;

// A sum, and a wall behind it: GCC 12 else moves the products of a tile away from their sums, and keeps more of them
// than there are registers. 4 bits, 512 columns: 150 without, 239 GOP/s with it; Clang does not need it.
INLINE vi walled(vi sum) {
    __asm__("" : "+x"(sum));
    return sum;
}

// Sums of u a over two columns of bytes, in 16 bits.
INLINE vi pairs(vi u, vi a) { return (vi)_mm256_maddubs_epi16(raw(u), raw(a)); }
INLINE vi add_pairs(vi sum, vi more) { return walled((vi)_mm256_add_epi16(raw(sum), raw(more))); }
INLINE vi add_widened(vi acc, vi sum) {
    return walled(acc + (vi)_mm256_madd_epi16(raw(sum), _mm256_set1_epi16(1)));
}
// Most of what bodies do for a quad of 4 bits.
INLINE vi dot_of_4_bits(vi sum, vi u, vi a) { return add_pairs(sum, pairs(u, a)); }

template <int CODES>
INLINE vi dot(vi acc, vi u, vi a) {
    if constexpr (in_words(CODES)) return walled(acc + (vi)_mm256_madd_epi16(raw(u), raw(a)));
    if constexpr (!in_bytes(CODES)) return add_widened(acc, pairs(u, a));
    const __m256i w = _mm256_xor_si256(raw(u), _mm256_set1_epi8(-128));  // |sum of two| <= 128 * 127 * 2 < 2^15
    return add_widened(acc, (vi)_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(raw(a), w)));
}
#else
constexpr bool PAIRS = false;

template <int CODES>
constexpr int SHIFT = in_bytes(CODES) ? 128 : CODES == TRITS && SCALAR ? 1 : 0;

template <int CODES>
INLINE vi dot(vi acc, vi u, vi a) {
#if defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t w = (int8x16_t)(in_bytes(CODES) ? u ^ (int32_t)0x80808080 : u);
    return (vi)vdotq_s32((int32x4_t)acc, w, (int8x16_t)a);
#else
    if constexpr (CODES == TRITS) {  // additions and subtractions alone
        for (int j = 0; j < 4; j++) {
            const vi code = u >> 8 * j & 0xff, value = a << (24 - 8 * j) >> 24;
            acc += value & (code == 2);
            acc -= value & (code == 0);
        }
        return acc;
    }
    for (int j = 0; j < 4; j++) acc += ((vi)((vu)u >> 8 * j & 0xff) - SHIFT<CODES>) * (a << (24 - 8 * j) >> 24);
    return acc;
#endif
}
#endif

#if !defined(__AVX2__) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
INLINE vi dot_of_4_bits(vi acc, vi u, vi a) { return dot<4>(acc, u, a); }
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
#elif LANES == 8
INLINE int32_t sum_across(vi x) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(raw(x)), _mm256_extracti128_si256(raw(x), 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0b10110001)));
}
INLINE int32_t largest_across(vi x) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(raw(x)), _mm256_extracti128_si256(raw(x), 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0b10110001)));
}
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

// LANES bytes as integers. GCC 12 takes vectors of bytes apart by itself.
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

// The same of signed bytes.
INLINE vi from_signed_bytes(const uint8_t* p) {
#if LANES == 16
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif LANES == 8
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    typedef int8_t small __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load<small>(p), vi);
#endif
}

// The span of 32 bytes that vectors of integers, -128..127, hold.
INLINE void to_bytes(const vi* x, int8_t* p) {
#if LANES == 16
    for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i*)p + i, _mm512_cvtepi32_epi8(raw(x[i])));
#elif LANES == 8
    const __m256i low = _mm256_packs_epi32(raw(x[0]), raw(x[1])), high = _mm256_packs_epi32(raw(x[2]), raw(x[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing has mixed halves
    _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
#else
    typedef int8_t small __attribute__((vector_size(LANES)));
    for (int i = 0; i < TILE / LANES; i++) store(p + i * LANES, __builtin_convertvector(x[i], small));
#endif
}

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// The nearest integer, half to even, of |x| < 2^22.
INLINE vi round_to_int(vf x) { return (vi)(x + ROUNDER) - (vi)splat(ROUNDER); }

}  // namespace spicerack::SPICERACK_ISA
