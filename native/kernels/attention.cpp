// softmax(q k^T * scale) v in float32, compiled once per instruction set.
//
// The rows of a unit of work are queries that share a head of k and v: some positions, each with all of its heads. A
// unit walks over the keys 128 at a time, of which keys are transposed and values widened once for all of its rows,
// and keeps for every row the largest score so far, the sum of 2^(score - largest), and the values weighted by it, all
// of which shrink when a larger score comes (Milakov and Gimelshein, 2018; Dao et al., 2022).
//
// A score is one chain of fused multiply-adds over the width, a weighted value one over the keys, and weights are
// summed in 16 chains: results do not depend on how rows are cut into units and strips, on threads, or on the
// instruction set.
#include "buffer.h"
#include "functions.h"
#include "strips.h"
#include "team.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// Chosen for speed; docs/kernels.md has what was measured (AMD Zen 4).
// At a time. 128 and not 64, together with scores and sums by no more vectors than are needed, brought 12 heads of 32
// and 128 tokens from 231 to 205 us.
constexpr int KEYS = 128;
constexpr int CHAINS = 16;  // of sums over keys, which are filled up to a multiple
constexpr int64_t UNIT_ROWS = 16 * STRIP_ROWS;      // for which keys are transposed once, at most
constexpr int64_t PRODUCTS_A_THREAD = 1 << 17;      // multiply-adds that are worth a thread
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float NOTHING = -__builtin_inff();  // the score of a hidden key

INLINE const char* at(const Strided& t, Float type, int64_t batch, int64_t head, int64_t row) {
    return (const char*)t.data + (batch * t.batch + head * t.head + row * t.row) * size_of(type);
}

// Which queries: rows of one head of k and v, by position, then head.
struct Unit {
    int64_t batch, kv_head, first, rows;
};

// How a call is cut: for each head of k and v its queries, by position, then head, and these into units of nearly `each`.
struct Units {
    const Attention* call;
    int64_t heads;        // of q that share one of k and v
    int64_t rows, each;   // of queries for a head of k and v; of a unit
    int64_t end;          // behind the number of its last unit, where units are counted through all calls

    INLINE int64_t count() const { return call->batch * call->kv_heads * ((rows + each - 1) / each); }

    INLINE Unit unit(int64_t i) const {
        const int64_t parts = (rows + each - 1) / each, part = i % parts, place = i / parts;
        const int64_t first = part * each;
        return {place / call->kv_heads, place % call->kv_heads, first, least(each, rows - first)};
    }
    INLINE int64_t position(int64_t row) const { return row / heads; }
    INLINE int64_t head(const Unit& u, int64_t row) const { return u.kv_head * heads + row % heads; }
    // A row may see the keys from the first one on, up to and without the last. Later rows see none before.
    INLINE int64_t first_key(int64_t row) const {
        return call->window < 0 ? 0 : most(position(row) - call->window, 0);
    }
    INLINE int64_t last_key(int64_t row) const {
        const int64_t ahead = call->causal ? 0 : call->window < 0 ? call->keys : call->window;
        return least(position(row) + ahead + 1, call->keys);
    }
};

struct Scratch {
    Buffer<Units> units;
    Buffer<float> q, keys, values, sums, weights, largest, total;
};

INLINE Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

// `count` keys as [width, KEYS]; zeros beyond them, up to whole vectors.
void transpose_keys(const Attention& call, const Unit& u, int64_t first, int64_t count, float* out) {
    for (int64_t key = 0; key < (count + CHAINS - 1) / CHAINS * CHAINS; key += LANES) {
        for (int64_t column = 0; column < call.width; column += LANES) {
            vf square[LANES];
            for (int i = 0; i < LANES; i++) {
                square[i] = vf{};
                if (key + i < count) {
                    const char* row = at(call.k, call.type, u.batch, u.kv_head, first + key + i);
                    square[i] = widen(row + column * size_of(call.type), call.type);
                }
            }
            transpose(square);
            for (int i = 0; i < LANES; i++) store(out + (column + i) * KEYS + key, square[i]);
        }
    }
}

void widen_values(const Attention& call, const Unit& u, int64_t first, int64_t count, float* out) {
    for (int64_t key = 0; key < count; key++) {
        const char* row = at(call.v, call.type, u.batch, u.kv_head, first + key);
        for (int64_t column = 0; column < call.value_width; column += LANES) {
            store(out + key * call.value_width + column, widen(row + column * size_of(call.type), call.type));
        }
    }
}

// Of lanes without NaN, which is never the largest score and comes through by its weight.
INLINE float largest_of(vf x) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#endif
    float lanes[LANES];
    store(lanes, x);
    float most = lanes[0];
    for (int i = 1; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

// Scores [`count`, a multiple of 16] of the keys from `first` on get their bias.
INLINE void add_bias(const Attention& call, int64_t head, int64_t position, int64_t first, int64_t count, float* scores) {
    const float* bias = call.bias + head * call.bias_head + first - position;
    for (int64_t key = 0; key < count; key += LANES) {
        store(scores + key, fused(load<vf>(bias + key), splat(LOG2_E), load<vf>(scores + key)));
    }
}

// Keys that a row does not see get no weight: of `count` from `first` on those before and behind what it may see, and
// those that are masked.
void hide(const Units& units, const Unit& u, int64_t row, int64_t first, int64_t count, float* scores) {
    const Strided& m = units.call->mask;
    const int64_t last = least(most(units.last_key(row) - first, 0), count);
    for (int64_t key = last; key < count; key++) scores[key] = NOTHING;
    for (int64_t key = 0; key < least(units.first_key(row) - first, last); key++) scores[key] = NOTHING;
    if (!m.data) return;
    const uint8_t* mask = (const uint8_t*)m.data + u.batch * m.batch + units.head(u, row) * m.head +
                          units.position(row) * m.row + first;
    for (int64_t key = 0; key < last; key++) {
        if (!mask[key]) scores[key] = NOTHING;
    }
}

// `count` scores, a multiple of 16, become weights; what the row has so far shrinks to the new largest score.
void soften(float* scores, int64_t count, float* largest, float* total, float* sums, int64_t width) {
    vf best = splat(*largest);
    for (int64_t i = 0; i < count; i += LANES) best = vmax(load<vf>(scores + i), best);
    const float now = largest_of(best);
    const vf reference = splat(now == NOTHING ? 0.0f : now);  // all hidden so far
    vf chains[PARTS];
    for (int p = 0; p < PARTS; p++) chains[p] = load<vf>(total + p * LANES);
    if (now != *largest) {
        const vf shrink = power_of_two(splat(*largest) - reference);
        for (int p = 0; p < PARTS; p++) chains[p] = chains[p] * shrink;
        for (int64_t i = 0; i < width; i += LANES) store(sums + i, load<vf>(sums + i) * shrink);
        *largest = now;
    }
    for (int64_t i = 0; i < count; i += CHAINS) {
        for (int p = 0; p < PARTS; p++) {
            const vf weight = power_of_two(load<vf>(scores + i + p * LANES) - reference);
            store(scores + i + p * LANES, weight);
            chains[p] = chains[p] + weight;
        }
    }
    for (int p = 0; p < PARTS; p++) store(total + p * LANES, chains[p]);
}

// What a unit keeps for each of its rows, and what its rows share.
struct State {
    float* q;        // [rows, width], times the scale and log2(e)
    float* sums;     // [rows, value_width]
    float* largest;  // [rows]: score so far
    float* total;    // [rows, 16]: chains of weights
    float* keys;     // [width, KEYS]
    float* values;   // [KEYS, value_width]
    float* weights;  // [STRIP_ROWS, KEYS]
};

State begin(const Units& units, const Unit& u, Scratch& scratch) {
    const Attention& call = *units.call;
    State s{scratch.q.need(u.rows * call.width),      scratch.sums.need(u.rows * call.value_width),
            scratch.largest.need(u.rows),             scratch.total.need(u.rows * CHAINS),
            scratch.keys.need(call.width * KEYS),     scratch.values.need(call.value_width * KEYS),
            scratch.weights.need(STRIP_ROWS * KEYS)};
    std::memset(s.sums, 0, u.rows * call.value_width * sizeof(float));
    std::memset(s.total, 0, u.rows * CHAINS * sizeof(float));
    for (int64_t r = 0; r < u.rows; r++) {
        s.largest[r] = NOTHING;
        const char* row = at(call.q, call.type, u.batch, units.head(u, u.first + r), units.position(u.first + r));
        for (int64_t column = 0; column < call.width; column += LANES) {
            const vf x = widen(row + column * size_of(call.type), call.type);
            store(s.q + r * call.width + column, x * splat(call.scale * LOG2_E));
        }
    }
    return s;
}

// The keys first .. first + KEYS, as far as there are so many, for all rows of the unit.
void attend(const Units& units, const Unit& u, const State& s, int64_t first) {
    const Attention& call = *units.call;
    const int64_t width = call.width, value_width = call.value_width, count = least(KEYS, call.keys - first);
    transpose_keys(call, u, first, count, s.keys);
    widen_values(call, u, first, count, s.values);
    int64_t height;
    for (int64_t r = 0; r < u.rows; r += height) {
        height = least(STRIP_ROWS, u.rows - r);
        const int64_t visible = least(units.last_key(u.first + r + height - 1) - first, count);
        if (visible <= 0 || units.first_key(u.first + r) >= first + count) continue;
        const int64_t whole = (visible + CHAINS - 1) / CHAINS * CHAINS;
        const auto multiply = MULTIPLY[height - 1];
        std::memset(s.weights, 0, height * KEYS * sizeof(float));
        multiply(s.q + r * width, width, s.keys, KEYS, width, s.weights, KEYS, whole);
        for (int64_t m = 0; m < height; m++) {
            const int64_t row = u.first + r + m;
            float* own = s.weights + m * KEYS;
            if (call.bias) add_bias(call, units.head(u, row), units.position(row), first, whole, own);
            hide(units, u, row, first, whole, own);
            soften(own, whole, s.largest + r + m, s.total + (r + m) * CHAINS, s.sums + (r + m) * value_width,
                   value_width);
        }
        multiply(s.weights, KEYS, s.values, value_width, visible, s.sums + r * value_width, value_width, value_width);
    }
}

// y of the unit's rows: their sums over the sum of their weights.
void finish(const Units& units, const Unit& u, const State& s) {
    const Attention& call = *units.call;
    for (int64_t r = 0; r < u.rows; r++) {
        float sum = 0.0f;
        for (int i = 0; i < CHAINS; i++) sum += s.total[r * CHAINS + i];
        const vf share = splat(sum == 0.0f ? 0.0f : 1.0f / sum);  // 0: every key is hidden
        const int64_t position = units.position(u.first + r), head = units.head(u, u.first + r);
        const int64_t place = (u.batch * call.queries + position) * call.heads + head;
        char* y = (char*)call.y + place * call.value_width * size_of(call.type);
        for (int64_t column = 0; column < call.value_width; column += LANES, y += LANES * size_of(call.type)) {
            narrow(load<vf>(s.sums + r * call.value_width + column) * share, call.type, y, LANES);
        }
    }
}

void run(const Units& units, const Unit& u, Scratch& scratch) {
    const State state = begin(units, u, scratch);
    const int64_t begin = units.first_key(u.first) / KEYS * KEYS, end = units.last_key(u.first + u.rows - 1);
    for (int64_t first = begin; first < end; first += KEYS) attend(units, u, state, first);
    finish(units, u, state);
}

// What a team shares: the calls, and the unit that nobody has taken yet.
struct Shared {
    const Units* calls;
    int64_t count, next;
};

void work(void* context, Member) {
    Shared& shared = *(Shared*)context;
    Scratch& scratch = own_scratch();
    const int64_t end = shared.calls[shared.count - 1].end;
    const Units* units = shared.calls;
    for (int64_t i; (i = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED)) < end;) {
        while (i >= units->end) units++;
        run(*units, units->unit(i - (units->end - units->count())), scratch);
    }
}

}  // namespace

void attention(const Attention* calls, int64_t count, int threads) {
    if (!count) return;
    int64_t products = 0, places = 0;
    for (int64_t i = 0; i < count; i++) {
        const Attention& c = calls[i];
        products += c.batch * c.heads * c.queries * c.keys * (c.width + c.value_width);
        places += c.batch * c.kv_heads;
    }
    const int useful = int(least(threads, products / PRODUCTS_A_THREAD + 1));
    // Two units for each thread at least, where there are rows enough.
    const int64_t parts = (2 * useful + places - 1) / places;
    Units* all = own_scratch().units.need(count);
    int64_t end = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t heads = calls[i].heads / calls[i].kv_heads, rows = heads * calls[i].queries;
        const int64_t fair = (rows + parts - 1) / parts;
        all[i] = {&calls[i], heads, rows, least((fair + STRIP_ROWS - 1) / STRIP_ROWS * STRIP_ROWS, UNIT_ROWS), 0};
        all[i].end = end += all[i].count();
    }
    Shared shared{all, count, 0};
    run_team(useful, work, &shared);
}

}  // namespace spicerack::SPICERACK_ISA
