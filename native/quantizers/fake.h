// Fake quantization of weights, and its gradients: what training rounds with, in one pass over the weight each.
//
// Grid in src/spicerack/numerics/fake.py is the specification: rounded weights and gradients of weights equal it bit for
// bit. Sums over groups have an order of their own, and so other last bits: the same on every instruction set.
#pragma once

#include <cstdint>

#include "search.h"

namespace spicerack {

// Weights [N, K] and their grid: groups of `rows` by `columns` share a scale, and a zero point where zero is not null.
struct Fake {
    const void* w;
    Float type;
    int64_t n, k, rows, columns;
    const float *scale, *zero;  // [n / rows, k / columns]
    Levels levels;              // `zero` in it is not looked at

    ALWAYS_INLINE int64_t across() const { return k / columns; }
};

// The gradient of rounded weights [N, K] and what follows from it. cells: weights are clipped half a step farther.
// The sums are those over a row of a group, [N, K / columns], without factors. Null: not wanted. by_weight may be grad.
struct Slopes {
    const void* grad;
    Float type;
    bool cells;
    float* by_weight;
    double *by_scale, *by_zero;
    void* rounded;  // what `fake` gives, while the weights are at hand
    Float rounded_type;
};

#define SPICERACK_FAKE_FUNCTIONS                                                                     \
    /* Rounded weights of rows first..last, to out [N, K]. */                                        \
    void fake(const Fake& f, int64_t first, int64_t last, void* out, Float out_type);                \
    /* Sums are the same on every instruction set, and do not depend on how rows are split. */       \
    void fake_gradients(const Fake& f, const Slopes& slopes, int64_t first, int64_t last);

// fake.cpp is compiled once per instruction set, each time into one of these.
namespace baseline {
SPICERACK_FAKE_FUNCTIONS
}
namespace avx2 {
SPICERACK_FAKE_FUNCTIONS
}
namespace avx512 {
SPICERACK_FAKE_FUNCTIONS
}

#undef SPICERACK_FAKE_FUNCTIONS

}  // namespace spicerack
