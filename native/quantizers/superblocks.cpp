// The search of superblocks.h: every lane fits a super-block of its own.
#include "superblocks.h"

#include "candidates.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr double BETTER = 1 - 1e-9;   // a tie keeps what there is, as in the specification
constexpr double FLAT_SPREAD = 1e-5;  // as the specification's _FLAT
constexpr float SMALLEST = 0x1p-126f;

INLINE vf inverse_of(vf s) { return vabs(s) < SMALLEST ? vf{} : 1.0f / s; }
INLINE vf rounded(vf u, vf lo, vf hi) { return round_small(vmin(vmax(u, lo), hi)); }
INLINE vi finite(vf x) { return (vi)vabs(x) < INFINITE; }
INLINE WideMask operator&(const WideMask& a, const WideMask& b) { return {a.low & b.low, a.high & b.high}; }

// Group by group a scale and a minimum as real numbers, or the integers that they are of a super-block's floats.
struct Parts {
    const Aligned<vf> s, m;
    explicit Parts(int64_t groups) : s(groups), m(groups) {}
};

// A super-block as it is stored: floats d and e, integers p and r.
struct Fitted {
    vf d{}, e{};
    const Parts codes;
    explicit Fitted(int64_t groups) : codes(groups) {}

    INLINE vf scale(int64_t g) const { return d * codes.s.data[g]; }
    INLINE vf min(int64_t g) const { return e * codes.m.data[g]; }
    void take(vi where, const Fitted& other, int64_t groups) {
        d = where ? other.d : d;
        e = where ? other.e : e;
        for (int64_t g = 0; g < groups; g++) {
            codes.s.data[g] = where ? other.codes.s.data[g] : codes.s.data[g];
            codes.m.data[g] = where ? other.codes.m.data[g] : codes.m.data[g];
        }
    }
};

// sum a v x, sum a v v, sum a v of a group.
struct GroupSums {
    Wide xv, vv, v;
};

// A line through codes, and how much of sum a x x it explains.
struct Line {
    Wide s, m, gain;
};

template <bool MIN, bool WEIGHTED>
struct Search {
    const SuperSettings& f;
    const vf *x, *a;
    const vf lo = splat(f.lo), hi = splat(f.hi);
    const Aligned<Wide> weight, total, error;
    const Aligned<GroupSums> sums;

    Search(const SuperSettings& settings, const vf* values, const vf* importance)
        : f(settings), x(values), a(importance), weight(f.groups), total(f.groups), error(f.groups), sums(f.groups) {
        for (int64_t g = 0; g < f.groups; g++) {
            weight.data[g] = WEIGHTED ? sum(g, [&](int64_t i) FLAT { return a[i]; }) : Wide(double(f.columns));
            total.data[g] = sum(g, [&](int64_t i) FLAT { return WEIGHTED ? a[i] * x[i] : x[i]; });
        }
    }

    // ---- sums over a group, in the specification's order ----

    template <class Term>
    INLINE Wide sum(int64_t g, const Term& term) const {
        Wide all;
        const int64_t first = g * f.columns;
        for (int64_t j = 0; j < f.columns; j += RUN) {
            all.add(run_sum([&](int64_t i) FLAT { return term(first + i); }, j, f.columns));
        }
        return all;
    }
    INLINE vf level(int64_t i, vf m, vf inverse) const {
        return rounded((MIN ? x[i] - m : x[i]) * inverse, lo, hi);
    }
    GroupSums sums_of(int64_t g, vf m, vf inverse) const {
        GroupSums all;
        const int64_t first = g * f.columns;
        for (int64_t j = 0; j < f.columns; j += RUN) {
            vf v[RUN], av[RUN];
            for (int i = 0; i < RUN; i++) {
                const bool inside = j + i < f.columns;
                v[i] = inside ? level(first + j + i, m, inverse) : vf{};
                av[i] = inside && WEIGHTED ? a[first + j + i] * v[i] : v[i];
            }
            const int64_t last = f.columns - j < RUN ? f.columns - j : RUN;
            const vf* here = x + first + j;
            all.xv.add(run_sum([&](int64_t i) FLAT { return av[i] * here[i]; }, 0, last));
            all.vv.add(run_sum([&](int64_t i) FLAT { return av[i] * v[i]; }, 0, last));
            if (MIN) all.v.add(run_sum([&](int64_t i) FLAT { return av[i]; }, 0, last));
        }
        return all;
    }
    Wide error_of(int64_t g, vf s, vf m) const {
        const vf inverse = inverse_of(s);
        return sum(g, [&](int64_t i) FLAT {
            const vf y = s * level(i, m, inverse);
            const vf e = (MIN ? y + m : y) - x[i];
            return (WEIGHTED ? a[i] * e : e) * e;
        });
    }
    Wide errors_of(const Fitted& now, Wide* errors) const {
        Wide all;
        for (int64_t g = 0; g < f.groups; g++) {
            errors[g] = error_of(g, now.scale(g), now.min(g));
            all = all + errors[g];
        }
        return all;
    }

    // ---- 1. lines ----

    Line line(int64_t g, const GroupSums& c) const {
        if (!MIN) {
            const Wide s = c.xv / c.vv;
            return {s, Wide(), select(Wide() < c.vv, s * c.xv, Wide(-1.0))};
        }
        const Wide w = weight.data[g], t = total.data[g], product = w * c.vv, spread = product - c.v * c.v;
        Wide s = (w * c.xv - c.v * t) / spread, m = (t - s * c.v) / w;
        const WideMask usable = (Wide(FLAT_SPREAD) * product < spread) & (Wide() < s);
        if (f.min.coded) {
            const WideMask above = usable & (Wide() < m);
            s = select(above, c.xv / c.vv, s);
            m = select(above, Wide(), m);
        }
        return {s, m, select(usable, s * c.xv + m * t, Wide(-1.0))};
    }

    void range(const Parts& out) const {
        const float longer = -f.lo > f.hi ? f.lo : f.hi;
        for (int64_t g = 0; g < f.groups; g++) {
            const vf* values = x + g * f.columns;
            vf top = values[0], bottom = values[0];
            for (int64_t i = 1; i < f.columns; i++) top = vmax(values[i], top), bottom = vmin(values[i], bottom);
            if (MIN) {
                const vf low = f.min.coded ? vmin(bottom, vf{}) : bottom;
                out.m.data[g] = low;
                out.s.data[g] = (vmax(top, low) - low) / splat(f.hi);
            } else {
                out.m.data[g] = vf{};
                out.s.data[g] = (top > -bottom ? top : bottom) / splat(longer);
            }
        }
    }

    void lines(const Parts& at, const Parts& out) const {
        for (int64_t g = 0; g < f.groups; g++) {
            vf s = at.s.data[g], m = at.m.data[g];
            Wide gain;
            const auto attempt = [&](const GroupSums& c) FLAT {
                const Line l = line(g, c);
                const WideMask better = gain < l.gain;
                const vi take = better.narrow();
                s = take ? l.s.narrow() : s;
                m = take ? l.m.narrow() : m;
                gain = select(better, l.gain, gain);
            };
            const vf low = m, inverse = inverse_of(s);
            for (int i = 0; i < f.step_count; i++) attempt(sums_of(g, low, inverse * splat(f.steps[i])));
            for (int i = 0; i < f.refinements; i++) attempt(sums_of(g, m, inverse_of(s)));
            out.s.data[g] = s;
            out.m.data[g] = m;
        }
    }

    // ---- 2. shares ----

    static INLINE vf code(vf part, vf inverse, const Share& share) {
        return rounded(part * inverse, splat(share.lo), splat(share.hi));
    }

    // A float whose integers `codes` are near `parts`, by weights(g).
    template <class Weights>
    vf share(const vf* parts, const Share& share, bool search, const Weights& weights, vf* codes) const {
        if (!share.coded) {
            codes[0] = splat(1);
            return stored(parts[0], share.type);
        }
        const float last = share.hi >= -share.lo ? share.hi : share.lo;
        vf top = parts[0], bottom = parts[0];
        for (int64_t g = 1; g < f.groups; g++) top = vmax(parts[g], top), bottom = vmin(parts[g], bottom);
        const vf largest = top > -bottom ? top : bottom;
        vf d = stored(largest / splat(last), share.type);
        Wide best(INF);
        for (int i = 0; search && i < f.share_count + f.refinements; i++) {
            const float step = i < f.share_count ? last + (last > 0 ? f.shares[i] : -f.shares[i]) : 1;
            const vf inverse = inverse_of(i < f.share_count ? largest / splat(step) : d);
            Wide np, pp, apart;
            for (int64_t g = 0; g < f.groups; g++) {
                const Wide w = weights(g), p(code(parts[g], inverse, share));
                np = np + w * Wide(parts[g]) * p;
                pp = pp + w * p * p;
            }
            const vf solved = stored((np / pp).narrow(), share.type);
            for (int64_t g = 0; g < f.groups; g++) {
                const Wide e = Wide(parts[g]) - Wide(solved) * Wide(code(parts[g], inverse, share));
                apart = apart + weights(g) * e * e;
            }
            const WideMask better = apart < best * Wide(BETTER);
            best = select(better, apart, best);
            d = better.narrow() ? solved : d;
        }
        d = largest == vf{} ? splat(1) : d;
        for (int64_t g = 0; g < f.groups; g++) codes[g] = code(parts[g], inverse_of(d), share);
        return d;
    }

    void share_all(const Parts& real, bool search, Fitted& out) const {
        for (int64_t g = 0; g < f.groups; g++) {
            sums.data[g] = sums_of(g, real.m.data[g], inverse_of(real.s.data[g]));
        }
        const auto stiff = [&](int64_t g) FLAT {
            const GroupSums& c = sums.data[g];
            const Wide curve = MIN ? c.vv - c.v * c.v / weight.data[g] : c.vv;
            return select(Wide() < curve, curve, Wide());
        };
        out.d = share(real.s.data, f.scale, search, stiff, out.codes.s.data);
        if (!f.scale.coded) out.d = real.s.data[0] == vf{} ? splat(1) : out.d;  // of one number, which is the minimum
        if (!MIN) {
            out.e = vf{};
            for (int64_t g = 0; g < f.groups; g++) out.codes.m.data[g] = vf{};
            return;
        }
        for (int64_t g = 0; search && g < f.groups; g++) {
            const vf m = best_min(g, out.scale(g));
            real.m.data[g] = f.min.coded ? vmin(m, vf{}) : m;
        }
        out.e = share(real.m.data, f.min, search, [&](int64_t g) FLAT { return weight.data[g]; }, out.codes.m.data);
    }

    // The minimum that is best beside the scale s, with the codes of `sums`; 0 where nothing says.
    vf best_min(int64_t g, vf s) const {
        const vf m = ((total.data[g] - Wide(s) * sums.data[g].v) / weight.data[g]).narrow();
        return finite(m) ? m : vf{};
    }

    // ---- 3. rounds ----

    void rounds(Fitted& now, Fitted& other) const {
        Wide all = errors_of(now, error.data);
        const Aligned<Wide> others(f.groups);
        for (int round = 0; round < f.rounds; round++) {
            for (int64_t g = 0; g < f.groups; g++) {
                sums.data[g] = sums_of(g, now.min(g), inverse_of(now.scale(g)));
            }
            solve(now, other);
            const WideMask better = errors_of(other, others.data) < all * Wide(BETTER);
            now.take(better.narrow(), other, f.groups);
            for (int64_t g = 0; g < f.groups; g++) error.data[g] = select(better, others.data[g], error.data[g]);
            all = Wide();
            for (int64_t g = 0; g < f.groups; g++) {
                if (f.scale.coded) move_scale(g, 1, now), move_scale(g, -1, now);
                if (f.min.coded) move_min(g, 1, now), move_min(g, -1, now);
                all = all + error.data[g];
            }
        }
    }

    void move_scale(int64_t g, float step, Fitted& now) const {
        const vf p = vmin(vmax(now.codes.s.data[g] + step, splat(f.scale.lo)), splat(f.scale.hi));
        vf r = now.codes.m.data[g];
        if (f.min.coded) r = code(best_min(g, now.d * p), inverse_of(now.e), f.min);
        move(g, p, r, now);
    }
    void move_min(int64_t g, float step, Fitted& now) const {
        move(g, now.codes.s.data[g], vmin(vmax(now.codes.m.data[g] + step, splat(f.min.lo)), splat(f.min.hi)), now);
    }
    void move(int64_t g, vf p, vf r, Fitted& now) const {
        const Wide here = error_of(g, now.d * p, now.e * r);
        const WideMask better = here < error.data[g] * Wide(BETTER);
        const vi take = better.narrow();
        error.data[g] = select(better, here, error.data[g]);
        now.codes.s.data[g] = take ? p : now.codes.s.data[g];
        now.codes.m.data[g] = take ? r : now.codes.m.data[g];
    }

    // d and e by least squares with all codes of `now` as they are.
    void solve(const Fitted& now, Fitted& out) const {
        Wide pp, px, rr, pr, rx;
        for (int64_t g = 0; g < f.groups; g++) {
            const Wide p(now.codes.s.data[g]), r(now.codes.m.data[g]);
            pp = pp + p * p * sums.data[g].vv;
            px = px + p * sums.data[g].xv;
            if (!MIN) continue;
            rr = rr + r * r * weight.data[g];
            pr = pr + p * r * sums.data[g].v;
            rx = rx + r * total.data[g];
        }
        for (int64_t g = 0; g < f.groups; g++) {
            out.codes.s.data[g] = now.codes.s.data[g];
            out.codes.m.data[g] = now.codes.m.data[g];
        }
        out.d = usable(px / pp, now.d, f.scale.type, true);
        out.e = now.e;
        if (!MIN) return;
        const Wide product = pp * rr, spread = product - pr * pr;
        const WideMask both = Wide(FLAT_SPREAD) * product < spread;
        out.d = usable(select(both, (px * rr - rx * pr) / spread, px / pp), now.d, f.scale.type, true);
        out.e = usable(select(both, (rx * pp - px * pr) / spread, Wide(now.e)), now.e, f.min.type, f.min.coded);
    }
    static vf usable(const Wide& solved, vf old, Float type, bool not_zero) {
        const vf s = stored(solved.narrow(), type);
        return finite(s) & (not_zero ? (vi)(s != vf{}) : ~vi{}) ? s : old;
    }

    // ---- all ----

    vi usable(const Fitted& one) const {
        vi some{};  // minima of more than 0
        for (int64_t g = 0; f.min.coded && g < f.groups; g++) some |= (vi)(one.codes.m.data[g] != vf{});
        return finite(one.d) & (vi)(one.d != vf{}) & finite(one.e) & ((vi)(one.e != vf{}) | ~some);
    }

    // -> whether every float is usable
    vi fit(Fitted& plain, Fitted& best, Fitted& other) const {
        const Parts at(f.groups), real(f.groups);
        range(at);
        for (int64_t g = 0; g < f.groups; g++) real.s.data[g] = at.s.data[g], real.m.data[g] = at.m.data[g];
        share_all(real, false, plain);
        if (f.optimize) {
            lines(at, real);
            share_all(real, true, best);
            rounds(best, other);
            const Wide reached = errors_of(best, error.data);
            const WideMask better = reached < errors_of(plain, error.data) * Wide(BETTER);
            plain.take(better.narrow() & usable(plain) & usable(best), best, f.groups);
        }
        return usable(plain);
    }

    void write(const Fitted& fitted, int64_t count, int64_t first, const SuperBlocks& out) const {
        const int64_t size = f.groups * f.columns;
        for (int lane = 0; lane < count; lane++) {
            out.scale[first + lane] = fitted.d[lane];
            out.min[first + lane] = fitted.e[lane];
        }
        for (int64_t g = 0; g < f.groups; g++) {
            const vf m = fitted.min(g), inverse = inverse_of(fitted.scale(g));
            for (int lane = 0; lane < count; lane++) {
                out.scale_codes[(first + lane) * f.groups + g] = int8_t(fitted.codes.s.data[g][lane]);
                out.min_codes[(first + lane) * f.groups + g] = int8_t(fitted.codes.m.data[g][lane]);
            }
            for (int64_t i = g * f.columns; i < (g + 1) * f.columns; i++) {
                const vi codes = (vi)(level(i, m, inverse) + ROUNDER);  // the low bits of the sum are the integer
                for (int lane = 0; lane < count; lane++) out.codes[(first + lane) * size + i] = int8_t(codes[lane]);
            }
        }
    }
};

template <bool MIN, bool WEIGHTED>
bool fit_batch(const SuperSettings& settings, const vf* x, const vf* a, int64_t count, int64_t first,
               const SuperBlocks& out) {
    const Search<MIN, WEIGHTED> search(settings, x, a);
    Fitted plain(settings.groups), best(settings.groups), other(settings.groups);
    const vi fits = search.fit(plain, best, other);
    search.write(plain, count, first, out);
    return !any(~fits);
}

template <class T>
Outcome fit_rows(const Groups& blocks, const SuperSettings& settings, const float* importance, int64_t period,
                 const SuperBlocks& out) {
    const auto* data = (const typename T::value*)blocks.data;
    const int64_t size = blocks.size, room = round_up(size, LANES);
    const Aligned<vf> lanes(room), weights(importance ? room : 1);
    const auto fit = importance ? (settings.has_min ? fit_batch<true, true> : fit_batch<false, true>)
                                : (settings.has_min ? fit_batch<true, false> : fit_batch<false, false>);
    bool fits = true;
    for (int64_t first = 0; first < blocks.count; first += LANES) {
        const int64_t count = blocks.count - first < LANES ? blocks.count - first : LANES;
        const typename T::value* rows[LANES];
        const float* weight_rows[LANES];
        for (int lane = 0; lane < LANES; lane++) {  // lanes without a super-block of their own repeat the last one
            const int64_t block = first + (lane < count ? lane : count - 1);
            rows[lane] = data + block * size;
            weight_rows[lane] = importance ? importance + block * size % period : nullptr;
        }
        fill<T>(lanes.data, rows, size);
        if (importance) fill<F32>(weights.data, weight_rows, size);
        vi peak{};
        for (int64_t i = 0; i < size; i++) peak = vmax((vi)vabs(lanes.data[i]), peak);
        if (any(peak >= INFINITE)) return {false, false};
        fits &= fit(settings, lanes.data, importance ? weights.data : nullptr, count, first, out);
    }
    return {true, fits};
}

}  // namespace

Outcome superblocks(const Groups& blocks, const SuperSettings& settings, const float* importance, int64_t period,
                    const SuperBlocks& out) {
    const auto typed = for_type(blocks.type, fit_rows<F32>, fit_rows<F16>, fit_rows<BF16>);
    return typed(blocks, settings, importance, period, out);
}

}  // namespace spicerack::SPICERACK_ISA
