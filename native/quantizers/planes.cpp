// See planes.h. Some blocks are taken apart into bytes, which fit in a cache of any processor, and put together again.
#include "planes.h"

#include <algorithm>
#include <cstring>

#include "eight.h"
#include "pack.h"

namespace spicerack {
namespace {

// One plane of some blocks: their codes, behind each other, and the plane's bytes in the first of them. All work is done
// on eight bytes at a time: what a shift brings in from the neighbour, the mask takes away.
struct Some {
    const Planes& all;
    const Plane& plane;
    int64_t blocks;
};

template <int BITS>
constexpr uint64_t mask_of = BYTES * ((1 << BITS) - 1);

template <int BITS>
void put(const Some& s, const uint8_t* codes, uint8_t* raw) {
    constexpr int runs = 8 / BITS;
    const int64_t count = s.all.count;
    const int stride = s.plane.stride, shift = s.plane.shift;
    for (int64_t block = 0; block < s.blocks; block++, codes += count, raw += s.all.nbytes) {
        uint8_t* out = raw;
        for (int64_t first = 0; first < count; first += runs * stride, out += stride) {
            for (int j = 0; j < stride; j += 8) {
                uint64_t x = 0;
                for (int run = 0; run < runs; run++) {
                    x |= (load_eight(codes + first + run * stride + j) >> shift & mask_of<BITS>) << run * BITS;
                }
                std::memcpy(out + j, &x, 8);
            }
        }
    }
}

// FRESH: nothing is known of the codes yet.
template <int BITS, bool FRESH>
void get(const Some& s, const uint8_t* raw, uint8_t* codes) {
    constexpr int runs = 8 / BITS;
    const int64_t count = s.all.count;
    const int stride = s.plane.stride, shift = s.plane.shift;
    for (int64_t block = 0; block < s.blocks; block++, codes += count, raw += s.all.nbytes) {
        const uint8_t* in = raw;
        for (int64_t first = 0; first < count; first += runs * stride, in += stride) {
            for (int j = 0; j < stride; j += 8) {
                const uint64_t x = load_eight(in + j);
                for (int run = 0; run < runs; run++) {
                    uint8_t* place = codes + first + run * stride + j;
                    const uint64_t bits = (x >> run * BITS & mask_of<BITS>) << shift;
                    const uint64_t code = FRESH ? bits : load_eight(place) | bits;
                    std::memcpy(place, &code, 8);
                }
            }
        }
    }
}

// Runs of single codes are a stream.
template <int BITS>
void put_stream(const Some& s, const uint8_t* codes, uint8_t* raw) {
    for (int64_t block = 0; block < s.blocks; block++, codes += s.all.count, raw += s.all.nbytes) {
        for (int64_t eight = 0; eight < s.all.count / 8; eight++) {
            const uint64_t x = load_eight(codes + 8 * eight) >> s.plane.shift & mask_of<BITS>;
            const uint64_t stream = gather<BITS>(x);
            std::memcpy(raw + BITS * eight, &stream, BITS);
        }
    }
}

template <int BITS, bool FRESH>
void get_stream(const Some& s, const uint8_t* raw, uint8_t* codes) {
    for (int64_t block = 0; block < s.blocks; block++, codes += s.all.count, raw += s.all.nbytes) {
        for (int64_t eight = 0; eight < s.all.count / 8; eight++) {
            uint64_t stream = 0;
            std::memcpy(&stream, raw + BITS * eight, BITS);
            const uint64_t bits = spread<BITS>(stream) << s.plane.shift;
            const uint64_t code = FRESH ? bits : load_eight(codes + 8 * eight) | bits;
            std::memcpy(codes + 8 * eight, &code, 8);
        }
    }
}

// By the logarithm of the bits.
constexpr decltype(&put<1>) PUT[] = {put<1>, put<2>, put<4>, put<8>};
constexpr decltype(&put<1>) PUT_STREAM[] = {put_stream<1>, put_stream<2>, put_stream<4>, put_stream<8>};
constexpr decltype(&get<1, true>) GET[2][4] = {{get<1, false>, get<2, false>, get<4, false>, get<8, false>},
                                               {get<1, true>, get<2, true>, get<4, true>, get<8, true>}};
constexpr decltype(&get<1, true>) GET_STREAM[2][4] = {
    {get_stream<1, false>, get_stream<2, false>, get_stream<4, false>, get_stream<8, false>},
    {get_stream<1, true>, get_stream<2, true>, get_stream<4, true>, get_stream<8, true>}};

int logarithm(int bits) { return bits == 1 ? 0 : bits == 2 ? 1 : bits == 4 ? 2 : 3; }

// Calls work(first block, how many) on as many blocks at a time as MAX_CODES has room for.
template <class Work>
void for_some(int64_t blocks, const Planes& p, const Work& work) {
    const int64_t step = Planes::MAX_CODES / p.count;
    for (int64_t first = 0; first < blocks; first += step) work(first, std::min(step, blocks - first));
}

}  // namespace

void to_blocks(const uint8_t* words, int64_t rows, int64_t columns, int bits, const Planes& p, uint8_t* raw) {
    uint8_t codes[Planes::MAX_CODES];
    for_some(rows * (columns / p.count), p, [&](int64_t first, int64_t some) {
        unpack(words + first * p.count * bits / 8, 1, some * p.count, bits, 0, codes);
        for (int i = 0; i < p.planes_count; i++) {
            const Plane& plane = p.planes[i];
            const auto* table = plane.stride > 1 ? PUT : PUT_STREAM;
            table[logarithm(plane.bits)]({p, plane, some}, codes, raw + first * p.nbytes + plane.offset);
        }
    });
}

void from_blocks(const uint8_t* raw, int64_t rows, int64_t columns, int bits, const Planes& p, uint8_t* words) {
    uint8_t codes[Planes::MAX_CODES];
    for_some(rows * (columns / p.count), p, [&](int64_t first, int64_t some) {
        for (int i = 0; i < p.planes_count; i++) {
            const Plane& plane = p.planes[i];
            const auto* table = plane.stride > 1 ? GET[i == 0] : GET_STREAM[i == 0];
            table[logarithm(plane.bits)]({p, plane, some}, raw + first * p.nbytes + plane.offset, codes);
        }
        pack(codes, 1, some * p.count, bits, 0, words + first * p.count * bits / 8);
    });
}

}  // namespace spicerack
