// See search.h. Blocks are taken LANES at a time and transposed into a tile, so that every lane searches a block of its
// own: element j of all of them is tile[j], and a sum over blocks is a sum of vectors, in the specification's order.
#include "search.h"

#include <new>

#include "../simd.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr int RUN = 16;              // neighbours folded in pairs in float32
constexpr int PATIENCE = 32;         // runs between looks whether a candidate has lost already
constexpr double BETTER = 1 - 1e-9;  // a tie keeps the earlier candidate
constexpr double INF = __builtin_inf();
constexpr int32_t INFINITE = 0x7f800000;  // the bits of float32 infinity; those of NaN, without the sign, are above

template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count) : data((T*)operator new(count * sizeof(T), std::align_val_t(64))) {}
    ~Buffer() { operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// `count` values; beyond them, repeats of the first.
template <class T>
INLINE vf widen_some(const typename T::value* p, int64_t count) {
    if (count >= LANES) return T::widen(p);
    typename T::value some[LANES];
    for (int64_t i = 0; i < LANES; i++) some[i] = p[i < count ? i : 0];
    return T::widen(some);
}

// tile[j] = element j of each of the LANES rows.
template <class T>
void fill(vf* tile, const typename T::value* const* rows, int64_t size) {
    for (int64_t j = 0; j < size; j += LANES) {
        for (int lane = 0; lane < LANES; lane++) tile[j + lane] = widen_some<T>(rows[lane] + j, size - j);
        transpose(tile + j);
    }
}

// ---- candidates ----------------------------------------------------------------------------------------------------

// A scale and a zero for each lane, ready for use.
struct Candidate {
    vf scale, zero, inverse, offset, lo, hi;
    vi usable;  // the scale is neither 0 nor infinite

    INLINE Candidate(vf s, vf z, const Levels& levels)
        : scale(s), zero(z), offset(levels.half ? splat(-0.5f) : z), lo(splat(levels.lo)), hi(splat(levels.hi)) {
        usable = (s != vf{}) & ((vi)vabs(s) < INFINITE);
        inverse = (vf)((vi)(1.0f / s) & usable);
    }
    INLINE Wide or_infinite(const Wide& error) const { return select(WideMask(usable), error, Wide(INF)); }

    template <bool OFFSET>
    INLINE vf value(vf x) const {
        vf u = x * inverse;
        if (OFFSET) u = u + offset;
        const vf code = round_small(vmin(vmax(u, lo), hi));
        return OFFSET ? code - offset : code;
    }
};

struct Tile {
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

template <bool OFFSET, bool WEIGHTED>
INLINE vf error_term(const Tile& t, const Candidate& c, vf x, int64_t j) {
    const vf e = c.scale * c.value<OFFSET>(x) - x;
    return WEIGHTED ? (t.a[j] * e) * e : e * e;
}

// The error of each lane; or infinity in every lane as soon as none can get below `limit` any more: terms are not negative
// and rounding is monotone, so a partial sum never exceeds the whole one.
template <bool OFFSET, bool WEIGHTED>
Wide errors(const Tile tile, const Candidate c, const Wide limit, Wide total = {}) {
    for (int64_t j = 0, patience = PATIENCE; j < tile.size; j += RUN) {
        total.add(run_sum([&](int64_t i) FLAT { return error_term<OFFSET, WEIGHTED>(tile, c, tile.x[i], i); }, j, tile.size));
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

template <bool OFFSET, bool WEIGHTED>
LaneSums sums(const Tile tile, const Candidate c, LaneSums s = {}) {
    const vf* x = tile.x;
    for (int64_t j = 0; j < tile.size; j += RUN) {
        const auto weigh = [&](vf y, int64_t i) FLAT { return WEIGHTED ? tile.a[i] * y : y; };
        const auto v = [&](int64_t i) FLAT { return c.value<OFFSET>(x[i]); };
        s.xv.add(run_sum([&](int64_t i) FLAT { return weigh(v(i), i) * x[i]; }, j, tile.size));
        s.vv.add(run_sum([&](int64_t i) FLAT { return weigh(v(i), i) * v(i); }, j, tile.size));
        if (!OFFSET) continue;
        s.x.add(run_sum([&](int64_t i) FLAT { return weigh(x[i], i); }, j, tile.size));
        s.v.add(run_sum([&](int64_t i) FLAT { return weigh(v(i), i); }, j, tile.size));
    }
    return s;
}

// ---- the search over one batch ---------------------------------------------------------------------------------------

INLINE vf clip_zero(vf zero, const Levels& levels) {
    const vf number = zero == zero ? zero : vf{};
    return round_small(vmin(vmax(number, splat(levels.lo)), splat(levels.hi)));
}

struct Start {
    vf raw, centre;  // the unrounded absmax scale; the middle of the range that it spans

    INLINE Start(vf top, vf bottom, const Levels& levels) {
        const float lowest = levels.lo + 0.5f * levels.half, highest = levels.hi + 0.5f * levels.half;
        centre = vf{};
        if (levels.zero) {
            const vf low = vmin(bottom, vf{}), high = vmax(top, vf{});
            raw = (high - low) / float(levels.hi - levels.lo);
            centre = (high + low) / 2.0f;
        } else if (-lowest == highest) {
            raw = vmax(top, -bottom) / highest;
        } else {
            raw = (top > -bottom ? top : bottom) / (-lowest > highest ? lowest : highest);
        }
    }
    INLINE vf zero_for(vf scale, const Levels& levels) const {
        return levels.zero ? clip_zero((levels.lo + levels.hi) / 2.0f - centre / scale, levels) : vf{};
    }
};

template <bool OFFSET, bool WEIGHTED>
struct BatchSearch {
    const Plan& plan;
    const Tile tile;
    const vf top, bottom;  // the largest and smallest element
    vf scale, zero;        // the best so far
    Wide error;

    void run(const Start& start) {
        const Levels& levels = plan.levels;
        error = errors<OFFSET, WEIGHTED>(tile, Candidate(scale, zero, levels), Wide(INF));
        for (int i = 0; i < plan.coarse_count; i++) {
            const vf candidate = stored(start.raw * plan.coarse[i], plan.scale_type);
            const vf base = start.zero_for(candidate, levels);
            for (int k = 0; k < plan.shift_count; k++) {
                attempt(candidate, levels.zero ? clip_zero(base + plan.shifts[k], levels) : base);
            }
        }
        for (int i = 0; i < plan.fine_count; i += 2) {
            const vf middle = scale, middle_zero = zero;
            attempt(stored(middle * plan.fine[i], plan.scale_type), middle_zero);
            attempt(stored(middle * plan.fine[i + 1], plan.scale_type), middle_zero);
        }
        for (int i = 0; i < plan.refinements; i++) {
            if (!refine()) return;
        }
    }

    // -> false if it changed nothing, and so never will
    bool refine() {
        const LaneSums s = sums<OFFSET, WEIGHTED>(tile, Candidate(scale, zero, plan.levels));
        if (!plan.levels.zero) return attempt(stored((s.xv / s.vv).narrow(), plan.scale_type), zero);
        const Wide n = weight(), slope = (n * s.xv - s.v * s.x) / (n * s.vv - s.v * s.v);
        const Wide intercept = (s.x - slope * s.v) / n;
        return attempt(stored(slope.narrow(), plan.scale_type),
                       clip_zero(zero - (intercept / slope).narrow(), plan.levels));
    }

    Wide weight() const {
        if (!WEIGHTED) return Wide(double(tile.size));
        Wide total;
        for (int64_t j = 0; j < tile.size; j += RUN) {
            total.add(run_sum([&](int64_t i) FLAT { return tile.a[i]; }, j, tile.size));
        }
        return total;
    }

    // Takes the candidate where it is better -> false if that is nowhere.
    bool attempt(vf new_scale, vf new_zero) {
        const Candidate c(new_scale, new_zero, plan.levels);
        const Wide limit = error * Wide(BETTER);
        if (!WEIGHTED && hopeless(c, limit)) return false;
        const Wide found = errors<OFFSET, WEIGHTED>(tile, c, limit);
        const WideMask better = found < limit;
        const vi take = better.narrow();
        error = select(better, found, error);
        scale = take ? new_scale : scale;
        zero = take ? new_zero : zero;
        return any(take);
    }

    // In every lane the largest or smallest element alone costs more than the best candidate does altogether.
    bool hopeless(const Candidate& c, const Wide& limit) const {
        const vf above = error_term<OFFSET, false>(tile, c, top, 0), below = error_term<OFFSET, false>(tile, c, bottom, 0);
        return !any((c.or_infinite(Wide(vmax(above, below))) < limit).narrow());
    }
};

template <bool OFFSET, bool WEIGHTED>
void optimize(const Plan& plan, const Tile& tile, vf top, vf bottom, const Start& start, vf& scale, vf& zero) {
    BatchSearch<OFFSET, WEIGHTED> batch{plan, tile, top, bottom, scale, zero, {}};
    batch.run(start);
    const vi final = (start.raw == vf{}) | ((vi)vabs(scale) == INFINITE);  // nothing to search, or to be refused
    scale = final ? scale : batch.scale;
    zero = final ? zero : batch.zero;
}

// ---- rows: without a tile --------------------------------------------------------------------------------------------

// Largest and smallest value of a row -> false if one is NaN or infinite.
template <class T>
bool bounds(const typename T::value* x, int64_t size, float& top, float& bottom) {
    vf high = widen_some<T>(x, size), low = high;
    vi largest{};
    for (int64_t j = 0; j < size; j += LANES) {
        const vf v = widen_some<T>(x + j, size - j);
        const vi magnitude = (vi)vabs(v);
        high = vmax(v, high);
        low = vmin(v, low);
        largest = magnitude > largest ? magnitude : largest;
    }
    int32_t peak = 0;
    top = high[0], bottom = low[0];
    for (int lane = 0; lane < LANES; lane++) {
        top = high[lane] > top ? high[lane] : top;
        bottom = low[lane] < bottom ? low[lane] : bottom;
        peak = largest[lane] > peak ? largest[lane] : peak;
    }
    return peak < INFINITE;
}

template <class T, bool OFFSET>
void encode_row(const typename T::value* x, int64_t size, const Candidate& c, int8_t* codes) {
    for (int64_t j = 0; j < size; j += LANES) {
        vf u = widen_some<T>(x + j, size - j) * c.inverse;
        if (OFFSET) u = u + c.offset;
        const vi code = (vi)(vmin(vmax(u, c.lo), c.hi) + ROUNDER);  // the low bits of the sum are the integer
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
void encode_rows(const Blocks& blocks, const Levels& levels, const float* scale, const int8_t* zero, int8_t* codes) {
    const auto* data = (const typename T::value*)blocks.data;
    const bool offset = levels.half || levels.zero;
    for (int64_t b = 0; b < blocks.count; b++) {
        const Candidate c(splat(scale[b]), splat(zero ? zero[b] : 0), levels);
        const auto encode_one = offset ? encode_row<T, true> : encode_row<T, false>;
        encode_one(data + b * blocks.size, blocks.size, c, codes + b * blocks.size);
    }
}

template <class T>
Outcome search_rows(const Blocks& blocks, const Plan& plan, const float* importance, int64_t period, float* scale,
                    int8_t* zero, int8_t* codes) {
    bool fits = true;
    const auto* data = (const typename T::value*)blocks.data;
    const Levels& levels = plan.levels;
    const int64_t size = blocks.size, room = plan.optimize ? round_up(size, LANES) : 1;
    const Buffer<vf> tile(room), weights(importance ? room : 1);
    for (int64_t first = 0; first < blocks.count; first += LANES) {
        const int64_t count = blocks.count - first < LANES ? blocks.count - first : LANES;
        const typename T::value* rows[LANES];
        const float* weight_rows[LANES];
        float tops[LANES], bottoms[LANES];
        for (int lane = 0; lane < LANES; lane++) {  // lanes without a block of their own repeat the last one
            const int64_t block = first + (lane < count ? lane : count - 1);
            rows[lane] = data + block * size;
            weight_rows[lane] = importance ? importance + block * size % period : nullptr;
            if (!bounds<T>(rows[lane], size, tops[lane], bottoms[lane])) return {false, false};
        }
        const vf top = load<vf>(tops), bottom = load<vf>(bottoms);
        const Start start(top, bottom, levels);
        vf s = stored(start.raw, plan.scale_type);
        s = start.raw == vf{} ? splat(1.0f) : s;
        vf z = start.zero_for(s, levels);
        if (plan.optimize) {
            fill<T>(tile.data, rows, size);
            if (importance) fill<F32>(weights.data, weight_rows, size);
            const Tile t{tile.data, importance ? weights.data : nullptr, size};
            const bool offset = levels.half || levels.zero;
            const auto find = importance ? (offset ? optimize<true, true> : optimize<false, true>)
                                         : (offset ? optimize<true, false> : optimize<false, false>);
            find(plan, t, top, bottom, start, s, z);
        }
        for (int lane = 0; lane < count; lane++) {
            scale[first + lane] = s[lane];
            zero[first + lane] = int8_t(z[lane]);
        }
        fits &= !any((s == vf{}) | ((vi)vabs(s) == INFINITE));
        const Blocks batch{rows[0], blocks.type, count, size};
        encode_rows<T>(batch, levels, scale + first, zero + first, codes + first * size);
    }
    return {true, fits};
}

template <class T, bool OFFSET>
void judge_pieces(const Blocks& pieces, const Candidate& c, Sums* out) {
    constexpr int64_t CHUNK = 64 * RUN;
    const auto* data = (const typename T::value*)pieces.data;
    const Buffer<vf> tile(CHUNK);
    for (int64_t first = 0; first < pieces.count; first += LANES) {
        const int64_t count = pieces.count - first < LANES ? pieces.count - first : LANES;
        Wide error;
        LaneSums s;
        for (int64_t start = 0; start < pieces.size; start += CHUNK) {
            const Tile t{tile.data, nullptr, pieces.size - start < CHUNK ? pieces.size - start : CHUNK};
            const typename T::value* rows[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                rows[lane] = data + (first + (lane < count ? lane : count - 1)) * pieces.size + start;
            }
            fill<T>(tile.data, rows, t.size);
            error = errors<OFFSET, false>(t, c, Wide(INF), error);
            s = sums<OFFSET, false>(t, c, s);
        }
        for (int lane = 0; lane < count; lane++) {
            out[first + lane] = {error[lane], s.xv[lane], s.vv[lane], s.x[lane], s.v[lane]};
        }
    }
}

template <class T>
void judge_typed(const Blocks& pieces, const Levels& levels, float scale, float zero, Sums* out) {
    const Candidate c(splat(scale), splat(zero), levels);
    const auto judge_all = levels.half || levels.zero ? judge_pieces<T, true> : judge_pieces<T, false>;
    judge_all(pieces, c, out);
}

// Squares of code values' errors and of weights, float32 within a block's chunk, float64 beyond.
template <class T, bool OFFSET>
void compare_blocks(const Blocks& blocks, const Levels& levels, const float* scale, const int8_t* zero,
                    const int8_t* codes, Misfit& out) {
    constexpr int64_t CHUNK = 1024;
    typedef int8_t vi8 __attribute__((vector_size(LANES)));
    const auto* data = (const typename T::value*)blocks.data;
    Wide wrong, total;
    for (int64_t b = 0; b < blocks.count; b++) {
        const float offset = levels.half ? -0.5f : zero ? float(zero[b]) : 0.0f;
        const auto* x = data + b * blocks.size;
        const int8_t* c = codes + b * blocks.size;
        for (int64_t start = 0; start < blocks.size; start += CHUNK) {
            const int64_t stop = start + CHUNK < blocks.size ? start + CHUNK : blocks.size;
            vf wrong_here{}, total_here{};
            int64_t j = start;
            for (; j + LANES <= stop; j += LANES) {
                vf v = __builtin_convertvector(load<vi8>(c + j), vf);
                if (OFFSET) v = v - offset;
                const vf w = T::widen(x + j), e = scale[b] * v - w;
                wrong_here += e * e;
                total_here += w * w;
            }
            for (int64_t lane = 0; j + lane < stop; lane++) {
                const float w = widen_some<T>(x + j, stop - j)[lane], e = scale[b] * (float(c[j + lane]) - offset) - w;
                wrong_here[lane] += e * e;
                total_here[lane] += w * w;
            }
            wrong.add(wrong_here);
            total.add(total_here);
        }
    }
    out = {};
    for (int lane = 0; lane < LANES; lane++) {
        out.wrong += wrong[lane];
        out.total += total[lane];
    }
}

template <class T>
void compare_typed(const Blocks& blocks, const Levels& levels, const float* scale, const int8_t* zero,
                   const int8_t* codes, Misfit& out) {
    const auto compare_all = levels.half || levels.zero ? compare_blocks<T, true> : compare_blocks<T, false>;
    compare_all(blocks, levels, scale, zero, codes, out);
}

}  // namespace

Outcome search(const Blocks& blocks, const Plan& plan, const float* importance, int64_t period, float* scale,
               int8_t* zero, int8_t* codes) {
    const auto typed = blocks.type == Float::bf16  ? search_rows<BF16>
                       : blocks.type == Float::f16 ? search_rows<F16>
                                                   : search_rows<F32>;
    return typed(blocks, plan, importance, period, scale, zero, codes);
}

void encode(const Blocks& blocks, const Levels& levels, const float* scale, const int8_t* zero, int8_t* codes) {
    const auto typed = blocks.type == Float::bf16  ? encode_rows<BF16>
                       : blocks.type == Float::f16 ? encode_rows<F16>
                                                   : encode_rows<F32>;
    typed(blocks, levels, scale, zero, codes);
}

void judge(const Blocks& pieces, const Levels& levels, float scale, float zero, Sums* out) {
    const auto typed = pieces.type == Float::bf16  ? judge_typed<BF16>
                       : pieces.type == Float::f16 ? judge_typed<F16>
                                                   : judge_typed<F32>;
    typed(pieces, levels, scale, zero, out);
}

void compare(const Blocks& blocks, const Levels& levels, const float* scale, const int8_t* zero, const int8_t* codes,
             Misfit& out) {
    const auto typed = blocks.type == Float::bf16  ? compare_typed<BF16>
                       : blocks.type == Float::f16 ? compare_typed<F16>
                                                   : compare_typed<F32>;
    typed(blocks, levels, scale, zero, codes, out);
}

}  // namespace spicerack::SPICERACK_ISA
