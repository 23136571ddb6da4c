// Eight codes of a byte each, drawn together inside one 64-bit integer to the `bits` bytes of a stream: in pairs, then
// pairs of pairs, then halves; and back.
#pragma once

#include <cstdint>
#include <cstring>

namespace spicerack {

constexpr uint64_t BYTES = 0x0101010101010101, PAIRS = 0x00ff00ff00ff00ff, QUADS = 0x0000ffff0000ffff;

template <int BITS>
inline uint64_t gather(uint64_t x) {
    constexpr int gap = 8 - BITS;
    x = (x & PAIRS) | ((x & ~PAIRS) >> gap);
    x = (x & QUADS) | ((x & ~QUADS) >> 2 * gap);
    return (x & 0xffffffff) | ((x & ~uint64_t(0xffffffff)) >> 4 * gap);
}

template <int BITS>
inline uint64_t spread(uint64_t x) {
    constexpr int gap = 8 - BITS;
    constexpr uint64_t low4 = (uint64_t(1) << 4 * BITS) - 1, low2 = (uint64_t(1) << 2 * BITS) - 1;
    constexpr uint64_t quads = low2 | low2 << 32, pairs = ((uint64_t(1) << BITS) - 1) * 0x0001000100010001;
    x = (x & low4) | ((x & ~low4) << 4 * gap);
    x = (x & quads) | ((x & ~quads) << 2 * gap);
    return (x & pairs) | ((x & ~pairs) << gap);
}

inline uint64_t load_eight(const uint8_t* p) {
    uint64_t x;
    std::memcpy(&x, p, 8);
    return x;
}

}  // namespace spicerack
