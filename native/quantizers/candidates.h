// Scales and zero points on trial: codes, errors and sums of some groups in lanes. Part of search.cpp and judge.cpp.
#pragma once

#include "groups.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr int RUN = 16;              // neighbours folded in pairs in float32: part of the specification
constexpr int PATIENCE = 32;         // runs between looks whether a candidate has lost already
constexpr double INF = __builtin_inf();

// How a code's value follows from a weight in units of its scale: rounded, rounded beside an offset, or looked up.
constexpr int INTEGER = 0, OFFSET = 1, TABLE = 2;
INLINE int kind_of(const Levels& levels) { return levels.count ? TABLE : levels.half || levels.zero ? OFFSET : INTEGER; }

// The place in a table: how many bounds are below u.
INLINE vi place(vf u, const Levels& levels) {
    vi code{};
    for (int i = 0; i + 1 < levels.count; i++) code -= (vi)(u > splat(levels.bounds[i]));
    return code;
}
INLINE vf look_up(vf u, const Levels& levels) {
    vf v = splat(levels.values[0]);
    for (int i = 1; i < levels.count; i++) v = u > splat(levels.bounds[i - 1]) ? splat(levels.values[i]) : v;
    return v;
}

// A scale and a zero for each lane, ready for use.
struct Candidate {
    const Levels* levels;
    vf scale, zero, inverse, offset, lo, hi;
    vi usable;  // the scale is neither 0 nor infinite

    INLINE Candidate(vf s, vf z, const Levels& levels)
        : levels(&levels), scale(s), zero(z), offset(levels.half ? splat(-0.5f) : z), lo(splat(levels.lo)), hi(splat(levels.hi)) {
        usable = (s != vf{}) & ((vi)vabs(s) < INFINITE);
        inverse = (vf)((vi)(1.0f / s) & usable);
    }
    INLINE Wide or_infinite(const Wide& error) const { return select(WideMask(usable), error, Wide(INF)); }

    template <int KIND>
    INLINE vf value(vf x) const {
        vf u = x * inverse;
        if (KIND == TABLE) return look_up(u, *levels);
        if (KIND == OFFSET) u = u + offset;
        const vf code = round_small(vmin(vmax(u, lo), hi));
        return KIND == OFFSET ? code - offset : code;
    }
};

// LANES groups side by side: x[j] has element j of each.
struct Lanes {
    const vf* x;
    const vf* a;  // importance, or null
    int64_t size;
};

template <int N, class Term>
INLINE vf fold(const Term& term, int64_t j) {
    if constexpr (N == 1) {
        return term(j);
    } else {
        return fold<N / 2>(term, j) + fold<N / 2>(term, j + N / 2);
    }
}

template <class Term>
INLINE vf run_sum(const Term& term, int64_t j, int64_t size) {
    if (j + RUN <= size) return fold<RUN>(term, j);
    return fold<RUN>([&](int64_t i) FLAT { return i < size ? term(i) : vf{}; }, j);
}

template <int KIND, bool WEIGHTED>
INLINE vf error_term(const Lanes& t, const Candidate& c, vf x, int64_t j) {
    const vf e = c.scale * c.value<KIND>(x) - x;
    return WEIGHTED ? (t.a[j] * e) * e : e * e;
}

// The error of each lane; or infinity in every lane as soon as none can get below `limit` any more: terms are not
// negative and rounding is monotone, so a partial sum never exceeds the whole one.
template <int KIND, bool WEIGHTED>
Wide errors(const Lanes lanes, const Candidate c, const Wide limit, Wide total = {}) {
    for (int64_t j = 0, patience = PATIENCE; j < lanes.size; j += RUN) {
        total.add(run_sum([&](int64_t i) FLAT { return error_term<KIND, WEIGHTED>(lanes, c, lanes.x[i], i); }, j,
                          lanes.size));
        if (--patience == 0) {
            if (!any((total < limit).narrow())) return Wide(INF);
            patience = PATIENCE;
        }
    }
    return c.or_infinite(total);
}

struct LaneSums {
    Wide xv, vv, x, v;
};

template <int KIND, bool WEIGHTED>
LaneSums sums(const Lanes lanes, const Candidate c, LaneSums s = {}) {
    const vf* x = lanes.x;
    for (int64_t j = 0; j < lanes.size; j += RUN) {
        const auto weigh = [&](vf y, int64_t i) FLAT { return WEIGHTED ? lanes.a[i] * y : y; };
        const auto v = [&](int64_t i) FLAT { return c.value<KIND>(x[i]); };
        s.xv.add(run_sum([&](int64_t i) FLAT { return weigh(v(i), i) * x[i]; }, j, lanes.size));
        s.vv.add(run_sum([&](int64_t i) FLAT { return weigh(v(i), i) * v(i); }, j, lanes.size));
        if (KIND != OFFSET) continue;
        s.x.add(run_sum([&](int64_t i) FLAT { return weigh(x[i], i); }, j, lanes.size));
        s.v.add(run_sum([&](int64_t i) FLAT { return weigh(v(i), i); }, j, lanes.size));
    }
    return s;
}

// Codes against one scale and zero for each group, without lanes.
template <class T, int KIND>
void encode_row(const typename T::value* x, int64_t size, const Candidate& c, int8_t* codes) {
    for (int64_t j = 0; j < size; j += LANES) {
        vf u = widen_or_repeat<T>(x + j, size - j) * c.inverse;
        if (KIND == OFFSET) u = u + c.offset;
        // of a rounded number the low bits of the sum are the integer
        const vi code = KIND == TABLE ? place(u, *c.levels) : (vi)(vmin(vmax(u, c.lo), c.hi) + ROUNDER);
        int8_t bytes[LANES];
        for (int lane = 0; lane < LANES; lane++) bytes[lane] = int8_t(code[lane]);
        if (size - j >= LANES) {
            std::memcpy(codes + j, bytes, LANES);
        } else {
            std::memcpy(codes + j, bytes, size - j);
        }
    }
}

template <class T>
void encode_rows(const Groups& groups, const Levels& levels, const float* scale, const int8_t* zero, int8_t* codes) {
    const auto* data = (const typename T::value*)groups.data;
    const int kind = kind_of(levels);
    const auto encode_one = kind == TABLE ? encode_row<T, TABLE> : kind == OFFSET ? encode_row<T, OFFSET>
                                                                                : encode_row<T, INTEGER>;
    for (int64_t b = 0; b < groups.count; b++) {
        const Candidate c(splat(scale[b]), splat(zero ? zero[b] : 0), levels);
        encode_one(data + b * groups.size, groups.size, c, codes + b * groups.size);
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
