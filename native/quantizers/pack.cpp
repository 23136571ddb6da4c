// See pack.h.
#include "pack.h"

#include <cstring>

#include "eight.h"

namespace spicerack {
namespace {

// One row; both directions handle the last, incomplete eight in a copy.
template <int BITS>
void pack_row(const uint8_t* codes, int64_t columns, uint8_t offset, uint8_t* out, int64_t bytes) {
    constexpr uint64_t mask = BYTES * ((1 << BITS) - 1);
    // The sum may carry into a code's upper bits, which are masked, but not into its neighbour.
    const auto eight = [&](const uint8_t* p) {
        uint64_t x;
        std::memcpy(&x, p, 8);
        constexpr uint64_t low = BYTES * 0x7f;
        const uint64_t add = BYTES * offset, sum = ((x & low) + (add & low)) ^ ((x ^ add) & ~low);
        return gather<BITS>(sum & mask);
    };
    int64_t i = 0, byte = 0;
    for (; i + 8 <= columns && byte + 8 <= bytes; i += 8, byte += BITS) {
        const uint64_t stream = eight(codes + i);
        std::memcpy(out + byte, &stream, 8);  // what is beyond BITS bytes is zero and overwritten by the next
    }
    std::memset(out + byte, 0, bytes - byte);
    for (; i < columns; i += 8, byte += BITS) {
        uint8_t last[8];
        const int64_t count = columns - i < 8 ? columns - i : 8;
        std::memset(last, uint8_t(-offset), 8);
        std::memcpy(last, codes + i, count);
        const uint64_t stream = eight(last);
        std::memcpy(out + byte, &stream, bytes - byte < BITS ? bytes - byte : BITS);
    }
}

template <int BITS>
void unpack_row(const uint8_t* words, int64_t columns, uint8_t offset, uint8_t* codes, int64_t bytes) {
    const auto eight = [&](uint64_t stream) {
        constexpr uint64_t used = BITS == 8 ? ~uint64_t(0) : (uint64_t(1) << 8 * BITS % 64) - 1;
        const uint64_t x = spread<BITS>(stream & used), high = BYTES * 0x80, subtract = BYTES * offset;
        return ((x | high) - (subtract & ~high)) ^ ((x ^ ~subtract) & high);
    };
    int64_t i = 0, byte = 0;
    uint64_t stream;
    for (; i + 8 <= columns && byte + 8 <= bytes; i += 8, byte += BITS) {
        std::memcpy(&stream, words + byte, 8);
        const uint64_t x = eight(stream);
        std::memcpy(codes + i, &x, 8);
    }
    for (; i < columns; i += 8, byte += BITS) {
        stream = 0;
        std::memcpy(&stream, words + byte, bytes - byte < BITS ? bytes - byte : BITS);
        const uint64_t x = eight(stream);
        std::memcpy(codes + i, &x, columns - i < 8 ? columns - i : 8);
    }
}

constexpr decltype(&pack_row<1>) PACK[] = {pack_row<1>, pack_row<2>, pack_row<3>, pack_row<4>,
                                           pack_row<5>, pack_row<6>, pack_row<7>, pack_row<8>};
constexpr decltype(&unpack_row<1>) UNPACK[] = {unpack_row<1>, unpack_row<2>, unpack_row<3>, unpack_row<4>,
                                               unpack_row<5>, unpack_row<6>, unpack_row<7>, unpack_row<8>};

}  // namespace

void pack(const uint8_t* codes, int64_t rows, int64_t columns, int bits, int offset, uint8_t* words) {
    const int64_t bytes = (columns * bits + 31) / 32 * 4;
    for (int64_t row = 0; row < rows; row++) {
        PACK[bits - 1](codes + row * columns, columns, uint8_t(offset), words + row * bytes, bytes);
    }
}

void unpack(const uint8_t* words, int64_t rows, int64_t columns, int bits, int offset, uint8_t* codes) {
    const int64_t bytes = (columns * bits + 31) / 32 * 4;
    for (int64_t row = 0; row < rows; row++) {
        UNPACK[bits - 1](words + row * bytes, columns, uint8_t(offset), codes + row * columns, bytes);
    }
}

}  // namespace spicerack
