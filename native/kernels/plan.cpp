#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "arena.h"
#include "layout.h"
#include "packed.h"
#include "team.h"

namespace spicerack {
namespace {

// Rows that go through all steps at once, where sequences are not longer: what they need stays in the caches.
constexpr int64_t CHUNK_ROWS = 256;
// Rows for each thread from which on threads take chunks of their own, rather than share the work of each step.
constexpr int64_t ROWS_APART = 32;

// What the steps of a call read besides buffers: tensors of the model, made ready for all chunks.
class Constants {
public:
    Constants(const Plan& plan, int64_t longest) : plan_(plan), before_(longest - 1), step_(2 * longest + BEHIND) {
        int64_t count = 0;
        for (const Parameter& f : plan.widened) count = std::max(count, f.place + f.count);
        if (count) widened_.emplace(count);
        for (const Parameter& f : plan.widened) {
            plan.engine->convert(f.data, f.type, widened_->data() + f.place, Float::f32, f.count);
        }
        for (const Bias& bias : plan.biases) spread(bias);
    }
    const float* operator[](const Parameter& f) const {
        return f.data && f.type != Float::f32 ? widened_->data() + f.place : (const float*)f.data;
    }
    // As Attention takes them.
    const float* bias(int number) const { return biases_[number].data() + before_; }
    int64_t bias_head() const { return step_; }
    // One row of a table of so many columns; `room` has space for one.
    const float* row(const Table& table, int64_t number, int64_t width, float* room) const {
        if (!table.floats) {
            decode_rows(table.packed, &number, 1, room);
            return room;
        }
        const char* row = (const char*)table.floats + number * width * size_of(table.type);
        if (table.type == Float::f32) return (const float*)row;
        plan_.engine->convert(row, table.type, room, Float::f32, width);
        return room;
    }

private:
    static constexpr int64_t BEHIND = 15;  // distances that are read beyond the largest
    const Plan& plan_;
    int64_t before_, step_;
    std::optional<Arena> widened_;
    std::vector<std::vector<float>> biases_;

    // The bias of each distance between rows that are here, head after head.
    void spread(const Bias& bias) {
        std::vector<float>& all = biases_.emplace_back(size_t(bias.heads * step_));
        std::vector<float> room(size_t(bias.heads));
        const int64_t reach = int64_t(bias.buckets.size()) / 2;
        for (int64_t i = 0; i < step_; i++) {
            const int64_t distance = std::clamp(i - before_, -reach, reach);
            const float* row = this->row(bias.table, bias.buckets[distance + reach], bias.heads, room.data());
            for (int64_t head = 0; head < bias.heads; head++) all[head * step_ + i] = row[head];
        }
    }
};

// A chunk on its way through the steps.
struct Run {
    const Plan& plan;
    const Batch& batch;
    const Packed& packed;
    const Constants& constants;
    Chunk chunk;
    float* arena;
    int threads;
    std::vector<Attention> calls{};  // of one step
    std::vector<float> room{};       // for a row of a table

    int64_t first() const { return packed.starts[chunk.first]; }
    int64_t rows() const { return rows_of(packed, chunk); }
    float* buffer(int number) const {
        int64_t before = 0;
        for (int i = 0; i < number; i++) before += plan.widths[i];
        return arena + before * rows();
    }

    void operator()(const LookUp& step) {
        const int64_t width = plan.widths[step.y];
        float* y = buffer(step.y);
        room.resize(size_t(width));
        for (size_t t = 0; t < step.parts.size(); t++) {
            const int64_t* index = packed.index[int(step.parts[t].index)].data() + first();
            for (int64_t row = 0; row < rows(); row++) {
                const float* from = constants.row(step.parts[t].table, index[row], width, room.data());
                float* to = y + row * width;
                if (t == 0) {
                    std::memcpy(to, from, size_t(width) * sizeof(float));
                } else {
                    for (int64_t i = 0; i < width; i++) to[i] += from[i];
                }
            }
        }
    }

    void operator()(const TakeStep& step) const {
        const int64_t width = plan.widths[step.y], bytes = width * size_of(plan.type);
        float* y = buffer(step.y);
        for (int64_t row = 0; row < rows(); row++, y += width) {
            const char* from = (const char*)batch.states + packed.place[first() + row] * bytes;
            plan.engine->convert(from, plan.type, y, Float::f32, width);
        }
    }

    void operator()(const NormStep& step) const {
        plan.engine->norm({buffer(step.x), step.more < 0 ? nullptr : buffer(step.more), constants[step.weight],
                           constants[step.bias], buffer(step.y), rows(), plan.widths[step.y], step.epsilon, step.centered,
                           threads});
    }

    void operator()(const ProductStep& step) const {
        std::vector<Product> products;
        for (const ProductStep::Part& part : step.parts) {
            products.push_back({part.weights, constants[part.bias], buffer(part.y), part.gelu});
        }
        const float scale = step.fixed_scale ? *step.fixed_scale : 0.0f;
        step.engine->linear({buffer(step.x), Float::f32, rows(), step.activations, scale, products.data(),
                             int(products.size()), threads});
    }

    void operator()(const DenseStep& step) const {
        plan.engine->dense({buffer(step.x), step.weights, step.type, constants[step.bias], buffer(step.y), rows(),
                            plan.widths[step.y], plan.widths[step.x], step.gelu, threads});
    }

    void operator()(const AttentionStep& step) {
        const int64_t width = step.q.width / step.heads, value_width = step.v.width / step.kv_heads;
        const auto strided = [&](const Columns& c, int64_t head, int64_t start, int64_t length) {
            const int64_t columns = plan.widths[c.buffer];
            return Strided{buffer(c.buffer) + c.first + (start - first()) * columns, length * columns, head, columns};
        };
        calls.clear();
        for (int64_t s = chunk.first, last; s < chunk.last; s = last) {
            const int64_t start = packed.starts[s], length = packed.starts[s + 1] - start;
            last = s + 1;
            while (last < chunk.last && packed.starts[last + 1] - packed.starts[last] == length) last++;
            float* y = buffer(step.y) + (start - first()) * step.heads * value_width;
            calls.push_back({strided(step.q, width, start, length), strided(step.k, width, start, length),
                             strided(step.v, value_width, start, length), {}, y, Float::f32, last - s, step.heads,
                             step.kv_heads, length, length, width, value_width, false, step.scale, step.window,
                             step.bias < 0 ? nullptr : constants.bias(step.bias), constants.bias_head()});
        }
        plan.engine->attention(calls.data(), int64_t(calls.size()), threads);
    }

    // Angles are rounded to float32, as by transformers; few enough that libm is fast enough.
    void operator()(const TurnStep& step) const {
        const float* frequencies = constants[step.frequencies];
        const int64_t count = step.frequencies.count;
        const int64_t* position = packed.index[int(Index::positions)].data() + first();
        float* y = buffer(step.y);
        for (int64_t row = 0; row < rows(); row++, y += 2 * count) {
            for (int64_t i = 0; i < count; i++) {
                const double angle = double(float(position[row]) * frequencies[i]);
                y[i] = float(std::cos(angle)) * step.scale;
                y[count + i] = float(std::sin(angle)) * step.scale;
            }
        }
    }

    void operator()(const RotateStep& step) const {
        const int64_t columns = plan.widths[step.x.buffer];
        plan.engine->rotate({buffer(step.x.buffer) + step.x.first, columns, buffer(step.turns), rows(), step.heads,
                             step.x.width / step.heads, plan.widths[step.turns], threads});
    }

    void operator()(const GateStep& step) const {
        const float* more = step.more.buffer < 0 ? nullptr : buffer(step.more.buffer) + step.more.first;
        plan.engine->gate({buffer(step.x.buffer) + step.x.first, more, plan.widths[step.x.buffer],
                           more ? plan.widths[step.more.buffer] : 0, buffer(step.y), rows(), plan.widths[step.y],
                           step.function, threads});
    }

    void operator()(const AddStep& step) const {
        plan.engine->add({buffer(step.x), buffer(step.more), constants[step.factor], buffer(step.y), rows(),
                          plan.widths[step.y], threads});
    }
};

// What all threads of a call share.
struct Shared {
    const Plan& plan;
    const Batch& batch;
    const Packed& packed;
    const Constants& constants;
    const std::vector<Chunk>& chunks;
    std::vector<Arena>& arenas;  // one for each thread that takes chunks
    void* y;
    int64_t next;

    void run(const Chunk& chunk, const Arena& arena, int threads) const {
        Run run{plan, batch, packed, constants, chunk, arena.data(), threads};
        for (const Step& step : plan.steps) std::visit(run, step);
        const int64_t width = plan.widths[plan.result];
        const float* from = run.buffer(plan.result);
        for (int64_t row = 0; row < run.rows(); row++, from += width) {
            char* to = (char*)y + packed.place[run.first() + row] * width * size_of(plan.type);
            plan.engine->convert(from, Float::f32, to, plan.type, width);
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

void clear_hidden(const Batch& b, int64_t bytes, void* y) {
    for (int64_t at = 0; b.mask && at < b.batch * b.length; at++) {
        if (!b.mask[at]) std::memset((char*)y + at * bytes, 0, size_t(bytes));
    }
}

}  // namespace

bool run_plan(const Plan& plan, const Batch& batch, void* y, int threads) {
    const Packed packed = pack(plan, batch);
    if (plan.measures && packed.holes) return false;
    clear_hidden(batch, plan.widths[plan.result] * size_of(plan.type), y);
    if (!packed.rows()) return true;
    const Constants constants(plan, packed.longest());
    const int64_t passes = (packed.rows() + threads * CHUNK_ROWS - 1) / (threads * CHUNK_ROWS);
    std::vector<Chunk> chunks = cut(packed, passes * threads);
    const bool apart = threads > 1 && packed.rows() >= threads * ROWS_APART && even(packed, chunks, threads);
    if (!apart && threads > 1) chunks = cut(packed, passes);
    int64_t widths = 0, most = 0;
    for (const int64_t width : plan.widths) widths += width;
    for (const Chunk& chunk : chunks) most = std::max(most, rows_of(packed, chunk));
    std::vector<Arena> arenas;
    for (int i = 0; i < (apart ? threads : 1); i++) arenas.emplace_back(widths * most);
    Shared shared{plan, batch, packed, constants, chunks, arenas, y, 0};
    if (apart) {
        run_team(threads, work_apart, &shared);
    } else {
        for (const Chunk& chunk : chunks) shared.run(chunk, arenas[0], threads);
    }
    return true;
}

}  // namespace spicerack
