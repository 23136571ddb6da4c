// y = x W^T for weights that stayed float, compiled once per instruction set.
//
// Some rows of x by some rows of W are a unit of work: W's are transposed, a few hundred columns at a time, and multiplied
// by all rows of the unit. A number of y is one chain over all columns: results do not depend on units or threads.
#include "buffer.h"
#include "functions.h"
#include "strips.h"
#include "team.h"

namespace spicerack::SPICERACK_ISA {
namespace {

constexpr int64_t UNIT_ROWS = 16 * STRIP_ROWS;  // of x, for which weights are transposed once, at most
constexpr int64_t UNIT_COLUMNS = 64;            // of y
constexpr int64_t DEPTH = 128;                  // at a time: 32 KB of transposed weights stay in the first-level cache
constexpr int64_t PRODUCTS_A_THREAD = 1 << 17;  // multiply-adds that are worth a thread

struct Scratch {
    Buffer<float> weights, sums;
};

INLINE Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

// Rows of W from `n` on, columns from `k` on -> [depth, UNIT_COLUMNS]; zeros beyond W.
void transpose_weights(const Dense& d, int64_t n, int64_t k, int64_t depth, float* out) {
    for (int64_t row = 0; row < UNIT_COLUMNS; row += LANES) {
        for (int64_t column = 0; column < depth; column += LANES) {
            const int64_t count = least(LANES, depth - column);
            vf square[LANES];
            for (int i = 0; i < LANES; i++) {
                square[i] = vf{};
                if (n + row + i >= d.n) continue;
                const int64_t at = (n + row + i) * d.k + k + column;
                square[i] = widen_some((const char*)d.weights + at * size_of(d.type), d.type, count);
            }
            transpose(square);
            for (int64_t i = 0; i < count; i++) store(out + (column + i) * UNIT_COLUMNS + row, square[i]);
        }
    }
}

// Rows m .. m + rows of y, columns n .. n + UNIT_COLUMNS as far as there are so many.
void run(const Dense& d, int64_t m, int64_t rows, int64_t n, Scratch& scratch) {
    float* weights = scratch.weights.need(DEPTH * UNIT_COLUMNS);
    float* sums = scratch.sums.need(UNIT_ROWS * UNIT_COLUMNS);
    std::memset(sums, 0, rows * UNIT_COLUMNS * sizeof(float));
    const int64_t columns = least(UNIT_COLUMNS, d.n - n), whole = (columns + LANES - 1) / LANES * LANES;
    for (int64_t k = 0; k < d.k; k += DEPTH) {
        const int64_t depth = least(DEPTH, d.k - k);
        transpose_weights(d, n, k, depth, weights);
        for (int64_t r = 0, height; r < rows; r += height) {
            height = least(STRIP_ROWS, rows - r);
            MULTIPLY[height - 1](d.x + (m + r) * d.k + k, d.k, weights, UNIT_COLUMNS, depth, sums + r * UNIT_COLUMNS,
                                 UNIT_COLUMNS, whole);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < columns; i += LANES) {
            const int64_t count = least(LANES, columns - i);
            vf value = load<vf>(sums + r * UNIT_COLUMNS + i);
            if (d.bias) value = value + widen_some(d.bias + n + i, Float::f32, count);
            if (d.gelu) value = gelu(value);
            narrow(value, Float::f32, d.y + (m + r) * d.n + n + i, count);
        }
    }
}

// What a team shares: the call, and the unit that nobody has taken yet. Units of the same rows of W are neighbours.
struct Shared {
    const Dense* call;
    int64_t next, parts, each;  // parts: of the rows of x
};

void work(void* context, Member) {
    Shared& shared = *(Shared*)context;
    const Dense& d = *shared.call;
    const int64_t end = shared.parts * ((d.n + UNIT_COLUMNS - 1) / UNIT_COLUMNS);
    for (int64_t i; (i = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED)) < end;) {
        const int64_t m = i % shared.parts * shared.each;
        run(d, m, least(shared.each, d.m - m), i / shared.parts * UNIT_COLUMNS, own_scratch());
    }
}

}  // namespace

void dense(const Dense& call) {
    const int64_t each = least(call.m, UNIT_ROWS);
    Shared shared{&call, 0, (call.m + each - 1) / each, each};
    run_team(int(least(call.threads, call.m * call.n * call.k / PRODUCTS_A_THREAD + 1)), work, &shared);
}

}  // namespace spicerack::SPICERACK_ISA
