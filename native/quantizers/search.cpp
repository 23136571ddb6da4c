// The search of search.h: every lane searches a group of its own.
#include "candidates.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr double BETTER = 1 - 1e-9;  // a tie keeps the earlier candidate, as in the specification

// ---- one batch ------------------------------------------------------------------------------------------------------

INLINE vf clip_zero(vf zero, const Levels& levels) {
    const vf number = zero == zero ? zero : vf{};
    return round_small(vmin(vmax(number, splat(levels.lo)), splat(levels.hi)));
}

struct Start {
    vf raw, centre;  // the unrounded absmax scale; the middle of the range that it spans

    INLINE Start(vf top, vf bottom, const Levels& levels) {
        const float lowest = levels.count ? levels.values[0] : levels.lo + 0.5f * levels.half;
        const float highest = levels.count ? levels.values[levels.count - 1] : levels.hi + 0.5f * levels.half;
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

template <int KIND, bool WEIGHTED>
struct BatchSearch {
    const SearchSettings& settings;
    const Lanes lanes;
    const vf top, bottom;  // the largest and smallest element
    vf scale, zero;        // the best so far
    Wide error;

    void run(const Start& start) {
        const Levels& levels = settings.levels;
        error = errors<KIND, WEIGHTED>(lanes, Candidate(scale, zero, levels), Wide(INF));
        for (int i = 0; i < settings.coarse_count; i++) {
            const vf candidate = stored(start.raw * settings.coarse[i], settings.scale_type);
            const vf base = start.zero_for(candidate, levels);
            for (int k = 0; k < settings.shift_count; k++) {
                attempt(candidate, levels.zero ? clip_zero(base + settings.shifts[k], levels) : base);
            }
        }
        for (int i = 0; i < settings.fine_count; i += 2) {
            const vf middle = scale, middle_zero = zero;
            attempt(stored(middle * settings.fine[i], settings.scale_type), middle_zero);
            attempt(stored(middle * settings.fine[i + 1], settings.scale_type), middle_zero);
        }
        for (int i = 0; i < settings.refinements; i++) {
            if (!refine()) return;
        }
    }

    // -> false if it changed nothing, and so never will
    bool refine() {
        const LaneSums s = sums<KIND, WEIGHTED>(lanes, Candidate(scale, zero, settings.levels));
        if (!settings.levels.zero) return attempt(stored((s.xv / s.vv).narrow(), settings.scale_type), zero);
        const Wide n = weight(), slope = (n * s.xv - s.v * s.x) / (n * s.vv - s.v * s.v);
        const Wide intercept = (s.x - slope * s.v) / n;
        return attempt(stored(slope.narrow(), settings.scale_type),
                       clip_zero(zero - (intercept / slope).narrow(), settings.levels));
    }

    Wide weight() const {
        if (!WEIGHTED) return Wide(double(lanes.size));
        Wide total;
        for (int64_t j = 0; j < lanes.size; j += RUN) {
            total.add(run_sum([&](int64_t i) FLAT { return lanes.a[i]; }, j, lanes.size));
        }
        return total;
    }

    // Takes the candidate where it is better -> false if that is nowhere.
    bool attempt(vf new_scale, vf new_zero) {
        const Candidate c(new_scale, new_zero, settings.levels);
        const Wide limit = error * Wide(BETTER);
        if (!WEIGHTED && hopeless(c, limit)) return false;
        const Wide candidate_error = errors<KIND, WEIGHTED>(lanes, c, limit);
        const WideMask better = candidate_error < limit;
        const vi take = better.narrow();
        error = select(better, candidate_error, error);
        scale = take ? new_scale : scale;
        zero = take ? new_zero : zero;
        return any(take);
    }

    // In every lane the largest or smallest element alone costs more than the best candidate does altogether.
    bool hopeless(const Candidate& c, const Wide& limit) const {
        const vf above = error_term<KIND, false>(lanes, c, top, 0);
        const vf below = error_term<KIND, false>(lanes, c, bottom, 0);
        return !any((c.or_infinite(Wide(vmax(above, below))) < limit).narrow());
    }
};

template <int KIND, bool WEIGHTED>
void optimize(const SearchSettings& settings, const Lanes& lanes, vf top, vf bottom, const Start& start, vf& scale,
              vf& zero) {
    BatchSearch<KIND, WEIGHTED> batch{settings, lanes, top, bottom, scale, zero, {}};
    batch.run(start);
    const vi final = (start.raw == vf{}) | ((vi)vabs(scale) == INFINITE);  // nothing to search, or to be refused
    scale = final ? scale : batch.scale;
    zero = final ? zero : batch.zero;
}

template <bool WEIGHTED>
auto chosen(int kind) {
    return kind == TABLE    ? optimize<TABLE, WEIGHTED>
           : kind == OFFSET ? optimize<OFFSET, WEIGHTED>
                            : optimize<INTEGER, WEIGHTED>;
}

// ---- all groups -----------------------------------------------------------------------------------------------------

// Largest and smallest value of a row -> false if one is NaN or infinite.
template <class T>
bool bounds(const typename T::value* x, int64_t size, float& top, float& bottom) {
    vf high = widen_or_repeat<T>(x, size), low = high;
    vi largest{};
    for (int64_t j = 0; j < size; j += LANES) {
        const vf v = widen_or_repeat<T>(x + j, size - j);
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

template <class T>
Outcome search_rows(const Groups& groups, const SearchSettings& settings, const float* importance, int64_t period,
                    float* scale, int8_t* zero, int8_t* codes) {
    bool fits = true;
    const auto* data = (const typename T::value*)groups.data;
    const Levels& levels = settings.levels;
    const int64_t size = groups.size, room = settings.optimize ? round_up(size, LANES) : 1;
    const Aligned<vf> lanes(room), weights(importance ? room : 1);
    const auto find = importance ? chosen<true>(kind_of(levels)) : chosen<false>(kind_of(levels));
    for (int64_t first = 0; first < groups.count; first += LANES) {
        const int64_t count = groups.count - first < LANES ? groups.count - first : LANES;
        const typename T::value* rows[LANES];
        const float* weight_rows[LANES];
        float tops[LANES], bottoms[LANES];
        for (int lane = 0; lane < LANES; lane++) {  // lanes without a group of their own repeat the last one
            const int64_t group = first + (lane < count ? lane : count - 1);
            rows[lane] = data + group * size;
            weight_rows[lane] = importance ? importance + group * size % period : nullptr;
            if (!bounds<T>(rows[lane], size, tops[lane], bottoms[lane])) return {false, false};
        }
        const vf top = load<vf>(tops), bottom = load<vf>(bottoms);
        const Start start(top, bottom, levels);
        vf s = stored(start.raw, settings.scale_type);
        s = start.raw == vf{} ? splat(settings.empty) : s;
        vf z = start.zero_for(s, levels);
        if (settings.optimize) {
            fill<T>(lanes.data, rows, size);
            if (importance) fill<F32>(weights.data, weight_rows, size);
            const Lanes t{lanes.data, importance ? weights.data : nullptr, size};
            find(settings, t, top, bottom, start, s, z);
        }
        for (int lane = 0; lane < count; lane++) {
            scale[first + lane] = s[lane];
            zero[first + lane] = int8_t(z[lane]);
        }
        fits &= !any((s == vf{}) | ((vi)vabs(s) == INFINITE));
        const Groups batch{rows[0], groups.type, count, size};
        encode_rows<T>(batch, levels, scale + first, zero + first, codes + first * size);
    }
    return {true, fits};
}

}  // namespace

Outcome search(const Groups& groups, const SearchSettings& settings, const float* importance, int64_t period,
               float* scale, int8_t* zero, int8_t* codes) {
    const auto typed = for_type(groups.type, search_rows<F32>, search_rows<F16>, search_rows<BF16>);
    return typed(groups, settings, importance, period, scale, zero, codes);
}

}  // namespace spicerack::SPICERACK_ISA
