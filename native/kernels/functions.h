// Functions of float32 vectors, by polynomials: the same bits on every instruction set, and not those of a libm.
#pragma once

#include "dot.h"

namespace spicerack::SPICERACK_ISA {

// 2^x for x <= 0, to 2e-7 (relative); 0 below -126.5. NaN stays NaN.
INLINE vf power_of_two(vf x) {
    const vf y = vmax(splat(-127.0f), x), shifted = y + ROUNDER, r = y - (shifted - ROUNDER);
    vf p = splat(0.0013276466634124517f);
    p = fused(p, r, splat(0.009675540961325169f));
    p = fused(p, r, splat(0.05550713464617729f));
    p = fused(p, r, splat(0.24022120237350464f));
    p = fused(p, r, splat(0.6931469440460205f));
    p = fused(p, r, splat(1.0000001192092896f));
    return p * (vf)(((vi)shifted + 127) << 23);  // a product, so that NaN survives
}

// x * (1 + erf(x / sqrt(2))) / 2, to 4e-7 (absolute, |x| <= 12) and 3e-7 (relative, x > 0).
//
// erfc(z) = 2^(-z P(z)) for z = |x| / sqrt(2) <= 5 with a polynomial P, fitted to weigh errors as they reach the
// result.
INLINE vf gelu(vf x) {
    const vf whole = vabs(x) * 0x1.6a09e6p-1f;
    const vf z = whole > 5.0f ? splat(5.0f) : whole;
    vf p = splat(-6.521490377053851e-06f);
    p = fused(p, z, splat(0.00010030873090727255f));
    p = fused(p, z, splat(-0.0006245979457162321f));
    p = fused(p, z, splat(0.0017700009047985077f));
    p = fused(p, z, splat(0.0005711982375942171f));
    p = fused(p, z, splat(-0.02822098508477211f));
    p = fused(p, z, splat(0.14851820468902588f));
    p = fused(p, z, splat(0.9183983206748962f));
    p = fused(p, z, splat(1.6279107332229614f));
    const vf tail = whole > 5.0f ? vf{} : power_of_two(-p * z) * 0.5f;
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// 1 / (1 + e^-x), to 3e-7 (relative; towards -87, below which it is 0, to 1e-5).
INLINE vf sigmoid(vf x) {
    const vf power = power_of_two(-vabs(x) * 0x1.715476p0f);
    return (x < 0.0f ? power : splat(1.0f)) / (1.0f + power);
}

INLINE vf silu(vf x) { return x * sigmoid(x); }

// x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, whose tanh is a sigmoid of twice as much.
INLINE vf gelu_tanh(vf x) { return x * sigmoid(x * fused(x * x, splat(0x1.2444f2p-4f), splat(0x1.988454p0f))); }

INLINE vf gelu_quick(vf x) { return x * sigmoid(x * 1.702f); }

}  // namespace spicerack::SPICERACK_ISA
