// What is done to float32 rows number by number: activations and gates, sums, rotary positions, conversions. Compiled
// once per instruction set.
//
// No number depends on any but those of its own place (or pair), so that results do not depend on vectors or threads.
#include "buffer.h"
#include "functions.h"
#include "team.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// Numbers that are worth a thread: 2.3 us to start and end a team, and a nanosecond for a few numbers.
constexpr int64_t NUMBERS_A_THREAD = 1 << 14;

INLINE vf some(const float* p, int64_t count) { return widen_some(p, Float::f32, count); }

// Calls work(first, last) for each thread's rows.
template <class Call, void (*ROWS)(const Call&, int64_t, int64_t)>
void share(const Call& call, int64_t numbers) {
    Call own = call;
    run_team(int(least(call.threads, numbers / NUMBERS_A_THREAD + 1)), [](void* context, Member me) {
        const Call& c = *(const Call*)context;
        ROWS(c, c.rows * me.index / me.count, c.rows * (me.index + 1) / me.count);
    }, &own);
}

template <vf (*F)(vf)>
void gate_rows_by(const Gate& g, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float *x = g.x + row * g.x_step, *more = g.more ? g.more + row * g.more_step : nullptr;
        float* y = g.y + row * g.width;
        for (int64_t i = 0; i < g.width; i += LANES) {
            const int64_t count = least(LANES, g.width - i);
            vf value = F(some(x + i, count));
            if (more) value = value * some(more + i, count);
            narrow(value, Float::f32, y + i, count);
        }
    }
}

void gate_rows(const Gate& g, int64_t first, int64_t last) {
    switch (g.function) {
        case Function::gelu: return gate_rows_by<gelu>(g, first, last);
        case Function::gelu_tanh: return gate_rows_by<gelu_tanh>(g, first, last);
        case Function::gelu_quick: return gate_rows_by<gelu_quick>(g, first, last);
        case Function::silu: return gate_rows_by<silu>(g, first, last);
    }
}

void add_rows(const Sum& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float *x = s.x + row * s.width, *more = s.more + row * s.width;
        float* y = s.y + row * s.width;
        for (int64_t i = 0; i < s.width; i += LANES) {
            const int64_t count = least(LANES, s.width - i);
            vf value = some(more + i, count);
            if (s.factor) value = value * some(s.factor + i, count);
            narrow(some(x + i, count) + value, Float::f32, y + i, count);
        }
    }
}

void rotate_rows(const Rotation& r, int64_t first, int64_t last) {
    const int64_t half = r.rotated / 2;
    for (int64_t row = first; row < last; row++) {
        const float *cosines = r.turns + row * r.rotated, *sines = cosines + half;
        for (int64_t head = 0; head < r.heads; head++) {
            float *low = r.x + row * r.step + head * r.width, *high = low + half;
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t count = least(LANES, half - i);
                const vf a = some(low + i, count), b = some(high + i, count);
                const vf c = some(cosines + i, count), s = some(sines + i, count);
                narrow(a * c - b * s, Float::f32, low + i, count);
                narrow(b * c + a * s, Float::f32, high + i, count);
            }
        }
    }
}

}  // namespace

void gate(const Gate& call) { share<Gate, gate_rows>(call, call.rows * call.width); }

void add(const Sum& call) { share<Sum, add_rows>(call, call.rows * call.width); }

void rotate(const Rotation& call) { share<Rotation, rotate_rows>(call, call.rows * call.heads * call.rotated); }

void convert(const void* from, Float type, void* to, Float other, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = least(LANES, count - i);
        const vf value = widen_some((const char*)from + i * size_of(type), type, left);
        narrow(value, other, (char*)to + i * size_of(other), left);
    }
}

}  // namespace spicerack::SPICERACK_ISA
