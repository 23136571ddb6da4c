// Which scale, and which zero point, a group of weights gets: the range search, and what given ones make of weights.
//
// Groups lie one after the other. src/spicerack/numerics/search.py is the specification, codec.py that of codes: scales,
// zeros and codes equal theirs bit for bit, on every instruction set. What is given up: levels are integers or a table of
// at most 16, weights and stored scales float32, float16 or bfloat16, and all work is one thread's.
#pragma once

#include <cstdint>

#include "../number.h"

namespace spicerack {

// Codes are the integers lo..hi; a code stands for code - offset, where offset is -1/2 (half), the zero point, or 0.
// Or, with a count, they are places in a table of that many values, rising, with `bounds` in the middle of each two.
struct Levels {
    int lo, hi;
    bool half, zero;
    int count = 0;
    float values[16] = {}, bounds[15] = {};
};

// `count` groups of `size` values each, one after the other.
struct Groups {
    const void* data;
    Float type;
    int64_t count, size;
};

// What is tried, in order: factors of the absmax scale, with each the zero-point shifts; then factors of the best scale
// in pairs; then least squares. Without `optimize`: absmax only.
struct SearchSettings {
    Levels levels;
    Float scale_type;
    bool optimize;
    const float* coarse;
    int coarse_count;
    const float* shifts;
    int shift_count;
    const float* fine;
    int fine_count;
    int refinements;
    float empty;  // the stored scale of a group of zeros
};

// One candidate judged over one group: its error, and sum x v, sum v v, sum x, sum v.
struct Sums {
    double error, xv, vv, x, v;
};

// sum (decoded - w)^2 and sum w^2 over whole groups.
struct Misfit {
    double wrong, total;
};

// finite: no weight is NaN or infinite; else the outputs mean nothing. fits: no stored scale is 0 or infinite.
struct Outcome {
    bool finite, fits;
};

#define SPICERACK_SEARCH_FUNCTIONS                                                                                     \
    /* importance: null, or `period` values that repeat along the data. scale [count] gets stored values, zero [count]  \
       and codes [count * size] integers. */                                                                           \
    Outcome search(const Groups& groups, const SearchSettings& settings, const float* importance, int64_t period,      \
                   float* scale, int8_t* zero, int8_t* codes);                                                         \
    /* Codes against given scales and zeros (null: none). */                                                           \
    void encode(const Groups& groups, const Levels& levels, const float* scale, const int8_t* zero, int8_t* codes);    \
    /* Judges one scale and zero over pieces of one long group. out [count]. */                                        \
    void judge(const Groups& pieces, const Levels& levels, float scale, float zero, Sums* out);                        \
    /* How far given codes are from the weights. The last digits depend on the instruction set. */                     \
    void compare(const Groups& groups, const Levels& levels, const float* scale, const int8_t* zero,                   \
                 const int8_t* codes, Misfit& out);

// search.cpp and judge.cpp are compiled once per instruction set, each time into one of these.
namespace baseline {
SPICERACK_SEARCH_FUNCTIONS
}
namespace avx2 {
SPICERACK_SEARCH_FUNCTIONS
}
namespace avx512 {
SPICERACK_SEARCH_FUNCTIONS
}

#undef SPICERACK_SEARCH_FUNCTIONS

}  // namespace spicerack
