// What this processor can do at most, to compare kernels with. Compiled once per instruction set.
#include "dot.h"

namespace spicerack::SPICERACK_ISA {
namespace {


constexpr int CHAINS = 12;  // one after the other they hide how long an operation takes

int64_t spin_floats(int64_t rounds) {
    vf acc[CHAINS] = {}, x = splat(1.0f);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) {
            acc[c] = fused(x, x, acc[c]);
#if defined(__x86_64__)
            __asm__ volatile("" : "+v"(acc[c]), "+v"(x));
#elif defined(__aarch64__)
            __asm__ volatile("" : "+w"(acc[c]), "+w"(x));
#endif
        }
    }
    return rounds * CHAINS * LANES * 2;
}

}  // namespace

int64_t spin(int64_t rounds, bool floats) {
    if (floats) return spin_floats(rounds);
    vi acc[CHAINS] = {}, u = splat_int(0x01020304), a = splat_int(0x04030201);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) {
            acc[c] = dot_of_4_bits(acc[c], u, a);
#if defined(__x86_64__)
            __asm__ volatile("" : "+v"(acc[c]), "+v"(u));
#elif defined(__aarch64__)
            __asm__ volatile("" : "+w"(acc[c]), "+w"(u));
#endif
        }
    }
    return rounds * CHAINS * LANES * 4 * 2;
}

int64_t read(const void* data, int64_t bytes) {
    const char* at = (const char*)data;
    vi acc[8] = {};
    for (int64_t i = 0; i + 8 * VECTOR_BYTES <= bytes; i += 8 * VECTOR_BYTES) {
        for (int j = 0; j < 8; j++) acc[j] ^= load<vi>(at + i + j * VECTOR_BYTES);
    }
    for (int j = 1; j < 8; j++) acc[0] ^= acc[j];
    return sum_across(acc[0]);
}

}  // namespace spicerack::SPICERACK_ISA
