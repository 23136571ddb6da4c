// LayerNorm and RMSNorm of float32 rows, compiled once per instruction set.
//
// Sums over a row run in 16 chains, which are added in their order: results do not depend on the width of vectors, on
// threads, or on how many rows there are.
#include "buffer.h"
#include "dot.h"
#include "team.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr int CHAINS = PANEL;
// Numbers that are worth a thread: 2.3 us to start and end a team, and a nanosecond for four numbers.
constexpr int64_t NUMBERS_A_THREAD = 1 << 14;

INLINE float sum_of(const vf* chains) {
    float lanes[CHAINS], sum = 0.0f;
    for (int p = 0; p < PARTS; p++) store(lanes + p * LANES, chains[p]);
    for (int i = 0; i < CHAINS; i++) sum += lanes[i];
    return sum;
}

// Calls work(p, column, how many) for each vector of a row, p its place among the chains; the last may not be whole.
template <class Work>
INLINE void for_vectors(int64_t width, const Work& work) {
    int64_t column = 0;
    for (; column + CHAINS <= width; column += CHAINS) {
        for (int p = 0; p < PARTS; p++) work(p, column + p * LANES, LANES);
    }
    for (int p = 0; p < PARTS && column < width; p++, column += LANES) work(p, column, least(LANES, width - column));
}

INLINE vf some(const float* p, int64_t count) { return widen_some(p, Float::f32, count); }

void norm_row(const Norm& n, int64_t row) {
    const float *x = n.x + row * n.width, *more = n.more ? n.more + row * n.width : nullptr;
    float* y = n.y + row * n.width;
    vf chains[PARTS] = {};
    for_vectors(n.width, [&](int p, int64_t column, int64_t count) FLAT {
        vf value = some(x + column, count);
        if (more) value = value + some(more + column, count);
        narrow(value, Float::f32, y + column, count);
        chains[p] = chains[p] + value;
    });
    const float mean = n.centered ? sum_of(chains) / float(n.width) : 0.0f;
    for (int p = 0; p < PARTS; p++) chains[p] = vf{};
    for_vectors(n.width, [&](int p, int64_t column, int64_t count) FLAT {
        vf value = some(y + column, count) - mean;
        if (count < LANES) {  // what is beyond the row has no distance from the mean
            alignas(64) float lanes[LANES] = {};
            std::memcpy(lanes, &value, count * sizeof(float));
            value = load<vf>(lanes);
        }
        chains[p] = fused(value, value, chains[p]);
    });
    const vf share = splat(1.0f / std::sqrt(sum_of(chains) / float(n.width) + n.epsilon));
    for_vectors(n.width, [&](int, int64_t column, int64_t count) FLAT {
        vf value = (some(y + column, count) - mean) * share * some(n.weight + column, count);
        if (n.bias) value = value + some(n.bias + column, count);
        narrow(value, Float::f32, y + column, count);
    });
}

void work(void* context, Member me) {
    const Norm& n = *(const Norm*)context;
    const int64_t last = n.rows * (me.index + 1) / me.count;
    for (int64_t row = n.rows * me.index / me.count; row < last; row++) norm_row(n, row);
}

}  // namespace

void norm(const Norm& call) {
    Norm n = call;
    run_team(int(least(n.threads, n.rows * n.width / NUMBERS_A_THREAD + 1)), work, &n);
}

}  // namespace spicerack::SPICERACK_ISA
