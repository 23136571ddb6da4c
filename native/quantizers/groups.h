// Groups of weights in vectors. Part of search.cpp and judge.cpp.
//
// LANES groups at a time are transposed, so that every lane has a group of its own: element j of all of
// them is lanes[j], and a sum over groups is a sum of vectors, in the specification's order.
#pragma once

#include <new>

#include "../simd.h"
#include "search.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr int32_t INFINITE = 0x7f800000;  // the bits of float32 infinity; those of NaN, without the sign, are above

// Memory for `count` values, as vectors want it.
template <class T>
struct Aligned {
    T* data;
    explicit Aligned(int64_t count) : data((T*)operator new(count * sizeof(T), std::align_val_t(64))) {}
    ~Aligned() { operator delete(data, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
};

INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// `count` values; beyond them, repeats of the first.
template <class T>
INLINE vf widen_or_repeat(const typename T::value* p, int64_t count) {
    if (count >= LANES) return T::widen(p);
    typename T::value some[LANES];
    for (int64_t i = 0; i < LANES; i++) some[i] = p[i < count ? i : 0];
    return T::widen(some);
}

// lanes[j] = element j of each of the LANES rows.
template <class T>
void fill(vf* lanes, const typename T::value* const* rows, int64_t size) {
    for (int64_t j = 0; j < size; j += LANES) {
        for (int lane = 0; lane < LANES; lane++) lanes[j + lane] = widen_or_repeat<T>(rows[lane] + j, size - j);
        transpose(lanes + j);
    }
}

// The function for a type of weights.
template <class Function>
INLINE Function for_type(Float type, Function f32, Function f16, Function bf16) {
    return type == Float::f32 ? f32 : type == Float::f16 ? f16 : bf16;
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
