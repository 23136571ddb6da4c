#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "layout.h"
#include "team.h"

namespace spicerack {
namespace {

// Rows that go through all steps at once, where sequences are not longer: what they need stays in the caches.
constexpr int64_t CHUNK_ROWS = 256;
// Rows for each thread from which on threads take chunks of their own, rather than share the work of each step.
constexpr int64_t ROWS_APART = 32;
// They do not, where the last to come is late by more than a tenth.
constexpr int64_t LATE_TENTHS = 11;

// The visible rows of a batch, packed.
struct Packed {
    std::vector<int64_t> index[INDEXES];
    std::vector<int64_t> place;   // the row in the batch
    std::vector<int64_t> starts;  // first row of each sequence that has any, and the end

    int64_t rows() const { return int64_t(place.size()); }
    int64_t sequences() const { return int64_t(starts.size()) - 1; }
};

// Rows of each of the tables that an index chooses from: the fewest.
struct Limits {
    int64_t rows[INDEXES] = {INT64_MAX, INT64_MAX, INT64_MAX};

    explicit Limits(const Plan& plan) {
        for (const Step& step : plan.steps) {
            const LookUp* look_up = std::get_if<LookUp>(&step);
            if (!look_up) continue;
            for (const LookUp::Table& table : look_up->tables) {
                int64_t& limit = rows[int(table.index)];
                limit = std::min(limit, table.rows);
            }
        }
    }
    void check(Index index, int64_t value, int64_t sequence, int64_t column) const {
        const int64_t limit = rows[int(index)];
        if (limit == INT64_MAX || (value >= 0 && value < limit)) return;
        throw std::out_of_range(std::string(INDEX_NAMES[int(index)]) + " " + std::to_string(value) + " at [" +
                                std::to_string(sequence) + ", " + std::to_string(column) + "]: the table has " +
                                std::to_string(limit) + " rows");
    }
};

Packed pack(const Plan& plan, const Batch& b) {
    const Limits limits(plan);
    Packed packed;
    packed.place.reserve(size_t(b.batch * b.length));
    for (std::vector<int64_t>& index : packed.index) index.reserve(size_t(b.batch * b.length));
    packed.starts.push_back(0);
    for (int64_t sequence = 0; sequence < b.batch; sequence++) {
        int64_t counted = 0;
        for (int64_t column = 0; column < b.length; column++) {
            const int64_t at = sequence * b.length + column;
            int64_t position = column;
            if (b.positions) {
                position = b.positions[at];
            } else if (plan.positions.counted) {
                position = plan.positions.pad + (b.ids[at] == plan.positions.pad ? 0 : ++counted);
            }
            const int64_t values[INDEXES] = {b.ids[at], b.types ? b.types[at] : 0, position};
            for (int i = 0; i < INDEXES; i++) limits.check(Index(i), values[i], sequence, column);
            if (b.mask && !b.mask[at]) continue;
            for (int i = 0; i < INDEXES; i++) packed.index[i].push_back(values[i]);
            packed.place.push_back(at);
        }
        if (packed.rows() > packed.starts.back()) packed.starts.push_back(packed.rows());
    }
    return packed;
}

// Sequences first .. last - 1.
struct Chunk {
    int64_t first, last;
};

// Whole sequences, cut into `count` chunks of about as many rows, or fewer.
std::vector<Chunk> cut(const Packed& packed, int64_t count) {
    std::vector<Chunk> chunks;
    int64_t first = 0;
    for (int64_t i = 1; i <= count && first < packed.sequences(); i++) {
        const int64_t target = packed.rows() * i / count;
        int64_t last = first + 1;
        // A sequence goes where more of it is.
        while (last < packed.sequences() && (packed.starts[last] + packed.starts[last + 1]) / 2 <= target) last++;
        chunks.push_back({first, i == count ? packed.sequences() : last});
        first = chunks.back().last;
    }
    return chunks;
}

int64_t rows_of(const Packed& packed, const Chunk& chunk) {
    return packed.starts[chunk.last] - packed.starts[chunk.first];
}

// A chunk on its way through the steps.
struct Run {
    const Plan& plan;
    const Packed& packed;
    Chunk chunk;
    float* arena;
    int threads;
    std::vector<Attention> calls{};  // of one step

    int64_t first() const { return packed.starts[chunk.first]; }
    int64_t rows() const { return rows_of(packed, chunk); }
    float* buffer(int number) const {
        int64_t before = 0;
        for (int i = 0; i < number; i++) before += plan.widths[i];
        return arena + before * rows();
    }

    void operator()(const LookUp& step) const {
        const int64_t width = plan.widths[step.y];
        float* y = buffer(step.y);
        std::vector<float> decoded;
        for (size_t t = 0; t < step.tables.size(); t++) {
            const LookUp::Table& table = step.tables[t];
            const int64_t* index = packed.index[int(table.index)].data() + first();
            if (!table.floats) decoded.resize(size_t(width));
            for (int64_t row = 0; row < rows(); row++) {
                const float* from = decoded.data();
                if (table.floats) {
                    from = table.floats + index[row] * width;
                } else {
                    decode_rows(table.packed, index + row, 1, decoded.data());
                }
                float* to = y + row * width;
                if (t == 0) {
                    std::memcpy(to, from, size_t(width) * sizeof(float));
                } else {
                    for (int64_t i = 0; i < width; i++) to[i] += from[i];
                }
            }
        }
    }

    void operator()(const NormStep& step) const {
        plan.engine->norm({buffer(step.x), step.more < 0 ? nullptr : buffer(step.more), step.weight, step.bias,
                           buffer(step.y), rows(), plan.widths[step.y], step.epsilon, step.centered, threads});
    }

    void operator()(const ProductStep& step) const {
        std::vector<Product> products;
        for (const ProductStep::Part& part : step.parts) {
            products.push_back({part.weights, part.bias, buffer(part.y), part.gelu});
        }
        const float scale = step.fixed_scale ? *step.fixed_scale : 0.0f;
        step.engine->linear({buffer(step.x), Float::f32, rows(), step.activations, scale, products.data(),
                             int(products.size()), threads});
    }

    void operator()(const AttentionStep& step) {
        const int64_t wide = plan.widths[step.q], narrow = plan.widths[step.k], out = plan.widths[step.v];
        const int64_t width = wide / step.heads, value_width = out / step.kv_heads;
        const auto strided = [&](int number, int64_t columns, int64_t head, int64_t start, int64_t length) {
            return Strided{buffer(number) + (start - first()) * columns, length * columns, head, columns};
        };
        calls.clear();
        for (int64_t s = chunk.first, last; s < chunk.last; s = last) {
            const int64_t start = packed.starts[s], length = packed.starts[s + 1] - start;
            last = s + 1;
            while (last < chunk.last && packed.starts[last + 1] - packed.starts[last] == length) last++;
            float* y = buffer(step.y) + (start - first()) * step.heads * value_width;
            calls.push_back({strided(step.q, wide, width, start, length), strided(step.k, narrow, width, start, length),
                             strided(step.v, out, value_width, start, length), {}, y, Float::f32, last - s, step.heads,
                             step.kv_heads, length, length, width, value_width, false, step.scale});
        }
        plan.engine->attention(calls.data(), int64_t(calls.size()), threads);
    }

    void operator()(const AddStep& step) const {
        const float *x = buffer(step.x), *more = buffer(step.more);
        float* y = buffer(step.y);
        for (int64_t i = 0; i < rows() * plan.widths[step.y]; i++) y[i] = x[i] + more[i];
    }
};

// What all threads of a call share.
struct Shared {
    const Plan& plan;
    const Packed& packed;
    const std::vector<Chunk>& chunks;
    std::vector<Arena>& arenas;  // one for each thread that takes chunks
    float* y;
    int64_t next;

    void run(const Chunk& chunk, const Arena& arena, int threads) const {
        Run run{plan, packed, chunk, arena.data(), threads};
        for (const Step& step : plan.steps) std::visit(run, step);
        const int64_t width = plan.widths[plan.result];
        const float* from = run.buffer(plan.result);
        for (int64_t row = 0; row < run.rows(); row++, from += width) {
            std::memcpy(y + packed.place[run.first() + row] * width, from, size_t(width) * sizeof(float));
        }
    }
};

void work_apart(void* context, Member me) {
    Shared& shared = *(Shared*)context;
    const int64_t count = int64_t(shared.chunks.size());
    for (int64_t i; (i = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED)) < count;) {
        shared.run(shared.chunks[i], shared.arenas[me.index], 1);
    }
}

// Whether threads that take one chunk after the other end at about the same time.
bool even(const Packed& packed, const std::vector<Chunk>& chunks, int threads) {
    std::vector<int64_t> busy(size_t(threads), 0);
    for (const Chunk& chunk : chunks) *std::min_element(busy.begin(), busy.end()) += rows_of(packed, chunk);
    return *std::max_element(busy.begin(), busy.end()) * threads * 10 <= packed.rows() * LATE_TENTHS;
}

void clear_hidden(const Batch& b, int64_t width, float* y) {
    for (int64_t at = 0; b.mask && at < b.batch * b.length; at++) {
        if (!b.mask[at]) std::memset(y + at * width, 0, size_t(width) * sizeof(float));
    }
}

}  // namespace

void run_plan(const Plan& plan, const Batch& batch, float* y, int threads) {
    const Packed packed = pack(plan, batch);
    clear_hidden(batch, plan.widths[plan.result], y);
    if (!packed.rows()) return;
    const int64_t passes = (packed.rows() + threads * CHUNK_ROWS - 1) / (threads * CHUNK_ROWS);
    std::vector<Chunk> chunks = cut(packed, passes * threads);
    const bool apart = threads > 1 && packed.rows() >= threads * ROWS_APART && even(packed, chunks, threads);
    if (!apart && threads > 1) chunks = cut(packed, passes);
    int64_t widths = 0, most = 0;
    for (const int64_t width : plan.widths) widths += width;
    for (const Chunk& chunk : chunks) most = std::max(most, rows_of(packed, chunk));
    std::vector<Arena> arenas;
    for (int i = 0; i < (apart ? threads : 1); i++) arenas.emplace_back(widths * most);
    Shared shared{plan, packed, chunks, arenas, y, 0};
    if (apart) {
        run_team(threads, work_apart, &shared);
    } else {
        for (const Chunk& chunk : chunks) shared.run(chunk, arenas[0], threads);
    }
}

}  // namespace spicerack
