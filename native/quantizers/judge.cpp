// What given scales make of weights: their codes, errors and sums. See search.h.
#include "candidates.h"

namespace spicerack::SPICERACK_ISA {
namespace {

template <class T, int KIND>
void judge_pieces(const Groups& pieces, const Candidate& c, Sums* out) {
    constexpr int64_t CHUNK = 64 * RUN;
    const auto* data = (const typename T::value*)pieces.data;
    const Aligned<vf> lanes(CHUNK);
    for (int64_t first = 0; first < pieces.count; first += LANES) {
        const int64_t count = pieces.count - first < LANES ? pieces.count - first : LANES;
        Wide error;
        LaneSums s;
        for (int64_t start = 0; start < pieces.size; start += CHUNK) {
            const Lanes t{lanes.data, nullptr, pieces.size - start < CHUNK ? pieces.size - start : CHUNK};
            const typename T::value* rows[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                rows[lane] = data + (first + (lane < count ? lane : count - 1)) * pieces.size + start;
            }
            fill<T>(lanes.data, rows, t.size);
            error = errors<KIND, false>(t, c, Wide(INF), error);
            s = sums<KIND, false>(t, c, s);
        }
        for (int lane = 0; lane < count; lane++) {
            out[first + lane] = {error[lane], s.xv[lane], s.vv[lane], s.x[lane], s.v[lane]};
        }
    }
}

template <class T>
void judge_typed(const Groups& pieces, const Levels& levels, float scale, float zero, Sums* out) {
    const Candidate c(splat(scale), splat(zero), levels);
    const auto judge_all = levels.half || levels.zero ? judge_pieces<T, OFFSET> : judge_pieces<T, INTEGER>;
    judge_all(pieces, c, out);
}

// Squares of code values' errors and of weights, float32 within a group's chunk, float64 beyond.
template <class T, bool BESIDE>
void compare_groups(const Groups& groups, const Levels& levels, const float* scale, const int8_t* zero,
                    const int8_t* codes, Misfit& out) {
    constexpr int64_t CHUNK = 1024;
    typedef int8_t vi8 __attribute__((vector_size(LANES)));
    const auto* data = (const typename T::value*)groups.data;
    Wide wrong, total;
    for (int64_t b = 0; b < groups.count; b++) {
        const float offset = levels.half ? -0.5f : zero ? float(zero[b]) : 0.0f;
        const auto* x = data + b * groups.size;
        const int8_t* c = codes + b * groups.size;
        for (int64_t start = 0; start < groups.size; start += CHUNK) {
            const int64_t stop = start + CHUNK < groups.size ? start + CHUNK : groups.size;
            vf wrong_here{}, total_here{};
            int64_t j = start;
            for (; j + LANES <= stop; j += LANES) {
                vf v = __builtin_convertvector(load<vi8>(c + j), vf);
                if (BESIDE) v = v - offset;
                const vf w = T::widen(x + j), e = scale[b] * v - w;
                wrong_here += e * e;
                total_here += w * w;
            }
            for (int64_t lane = 0; j + lane < stop; lane++) {
                const float w = widen_or_repeat<T>(x + j, stop - j)[lane], e = scale[b] * (float(c[j + lane]) - offset) - w;
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
void compare_typed(const Groups& groups, const Levels& levels, const float* scale, const int8_t* zero,
                   const int8_t* codes, Misfit& out) {
    const auto compare_all = levels.half || levels.zero ? compare_groups<T, true> : compare_groups<T, false>;
    compare_all(groups, levels, scale, zero, codes, out);
}

}  // namespace

void encode(const Groups& groups, const Levels& levels, const float* scale, const int8_t* zero, int8_t* codes) {
    const auto typed = for_type(groups.type, encode_rows<F32>, encode_rows<F16>, encode_rows<BF16>);
    typed(groups, levels, scale, zero, codes);
}

void judge(const Groups& pieces, const Levels& levels, float scale, float zero, Sums* out) {
    const auto typed = for_type(pieces.type, judge_typed<F32>, judge_typed<F16>, judge_typed<BF16>);
    typed(pieces, levels, scale, zero, out);
}

void compare(const Groups& groups, const Levels& levels, const float* scale, const int8_t* zero, const int8_t* codes,
             Misfit& out) {
    const auto typed = for_type(groups.type, compare_typed<F32>, compare_typed<F16>, compare_typed<BF16>);
    typed(groups, levels, scale, zero, codes, out);
}

}  // namespace spicerack::SPICERACK_ISA
