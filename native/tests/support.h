// What the tests share: checks, random numbers, the float types, and memory that sanitizers watch to the byte.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../kernels/kernel.h"

namespace spicerack {

inline bool once = false;  // enough that all code runs, where it is the processor that is tested and not the results
inline int checks = 0, failures = 0;
inline char subject[256] = "";

inline void check(bool fact, const char* message) {
    checks++;
    if (fact) return;
    std::printf("FAILED: %s: %s\n", subject, message);
    if (++failures == 20) std::exit(1);
}

struct Random {
    uint64_t state;
    uint64_t bits() {  // splitmix64
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    double unit() { return double(bits() >> 11) * 0x1p-53; }
    double bell() { return (unit() + unit() + unit() + unit() - 2) * 1.7; }
};

// ---- float types ----------------------------------------------------------------------------------------------------

// The nearest value of the type, half to even.
inline double rounded(double x, Float type) {
    if (type == Float::f32) return double(float(x));
    if (x == 0 || !std::isfinite(x)) return x;
    const bool half = type == Float::f16;
    const int digits = half ? 11 : 8, least = half ? -14 : -126;
    const int exponent = std::max(std::ilogb(x), least);
    const double value = std::ldexp(std::nearbyint(std::ldexp(x, digits - 1 - exponent)), exponent - digits + 1);
    return std::fabs(value) > (half ? 65504.0 : 0x1.fep127) ? std::copysign(INFINITY, x) : value;
}

inline void put(void* to, int64_t i, double x, Float type) {
    if (type == Float::f32) {
        ((float*)to)[i] = float(x);
        return;
    }
    uint32_t bits;
    const float f = float(rounded(x, type));
    std::memcpy(&bits, &f, 4);
    bits = std::isnan(x) ? bits | 0x400000u : bits;
    uint32_t small = bits >> 16;
    if (type == Float::f16) {
        const uint32_t sign = bits >> 16 & 0x8000u;
        const double magnitude = std::fabs(double(f));
        if (!std::isfinite(f)) {
            small = sign | (std::isnan(f) ? 0x7e00u : 0x7c00u);
        } else if (magnitude == 0) {
            small = sign;
        } else {
            const int exponent = std::max(std::ilogb(magnitude), -14);
            small = sign | (uint32_t(exponent + 14) * 1024 + uint32_t(std::ldexp(magnitude, 10 - exponent)));
        }
    }
    ((uint16_t*)to)[i] = uint16_t(small);
}

inline double get(const void* from, int64_t i, Float type) {
    if (type == Float::f32) return ((const float*)from)[i];
    const uint32_t bits = ((const uint16_t*)from)[i];
    if (type == Float::bf16) {
        const uint32_t wide = bits << 16;
        float f;
        std::memcpy(&f, &wide, 4);
        return f;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    if (exponent == 31) magnitude = fraction ? double(NAN) : double(INFINITY);
    return bits & 0x8000u ? -magnitude : magnitude;
}

inline bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

// ---- memory ---------------------------------------------------------------------------------------------------------

// `count` values that end with their allocation, and begin, every second time, one value behind its beginning.
class Exact {
public:
    Exact() = default;
    Exact(int64_t count, int64_t size) : count_(count), size_(size) {
        static int64_t turn = 0;
        const int64_t before = turn++ % 2 * size;
        memory_.reset(new uint8_t[before + count * size]);
        data_ = memory_.get() + before;
        std::memset(data_, 0xa5, count * size);
    }
    uint8_t* data() const { return data_; }
    int64_t bytes() const { return count_ * size_; }

private:
    std::unique_ptr<uint8_t[]> memory_;
    uint8_t* data_ = nullptr;
    int64_t count_ = 0, size_ = 0;
};

inline bool equal(const std::vector<double>& a, const std::vector<double>& b) {
    bool all = a.size() == b.size();
    for (size_t i = 0; all && i < a.size(); i++) all = same(a[i], b[i]);
    return all;
}

inline const Engine& scalar_engine() { return engines().first[engines().count - 1]; }

const Float TYPES[] = {Float::f32, Float::f16, Float::bf16};
const char* const TYPE_NAMES[] = {"f32", "f16", "bf16"};

// One for each file of tests.
void test_bodies(Random& random);
void test_sharing(Random& random);
void test_results(Random& random);
void test_attention(Random& random);
void test_dense(Random& random);
void test_rows(Random& random);
void test_plan(Random& random);
void test_fake(Random& random);
void test_search(Random& random);
void test_superblocks(Random& random);

}  // namespace spicerack
