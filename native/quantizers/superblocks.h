// Groups with minima, or with scales that are quantized themselves: w = s v + m, s = d p, m = e r.
//
// src/spicerack/numerics/superblocks/search.py is the specification: d, e, p, r and codes equal its bit for bit, on every
// instruction set. What is given up: as in search.h, and d, e and their codes lie in rows.
#pragma once

#include "search.h"

namespace spicerack {

// Integers lo..hi in units of a float that `groups` of a super-block share; none: a float for each group.
struct Share {
    bool coded;
    int lo, hi;
    Float type;
};

// How weights of a super-block are coded, and what is tried: `steps` multiply the inverse of the range's scale, `shares`
// are what is added to the code that a super-block's largest scale (minimum) is put on.
struct SuperSettings {
    int lo, hi;
    int64_t groups, columns;
    bool has_min, optimize;
    Share scale, min;
    const float* steps;
    int step_count;
    const float* shares;
    int share_count;
    int refinements, rounds;
};

// Where results go: d and e [count], p and r [count * groups], codes [count * groups * columns], in bytes.
struct SuperBlocks {
    float *scale, *min;
    int8_t *scale_codes, *min_codes, *codes;
};

#define SPICERACK_SUPERBLOCK_FUNCTIONS                                                                                 \
    /* blocks.size is groups * columns. importance: null, or `period` values that repeat along the data. */            \
    Outcome superblocks(const Groups& blocks, const SuperSettings& settings, const float* importance, int64_t period,  \
                        const SuperBlocks& out);

namespace baseline {
SPICERACK_SUPERBLOCK_FUNCTIONS
}
namespace avx2 {
SPICERACK_SUPERBLOCK_FUNCTIONS
}
namespace avx512 {
SPICERACK_SUPERBLOCK_FUNCTIONS
}

#undef SPICERACK_SUPERBLOCK_FUNCTIONS

}  // namespace spicerack
