#include "packed.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace spicerack {
namespace {

// They do not, where the last to come is late by more than a tenth.
constexpr int64_t LATE_TENTHS = 11;

// Rows of each of the tables that an index chooses from: the fewest.
struct Limits {
    int64_t rows[INDEXES] = {INT64_MAX, INT64_MAX, INT64_MAX};

    explicit Limits(const Plan& plan) {
        for (const Step& step : plan.steps) {
            const LookUp* look_up = std::get_if<LookUp>(&step);
            if (!look_up) continue;
            for (const LookUp::Part& part : look_up->parts) {
                int64_t& limit = rows[int(part.index)];
                limit = std::min(limit, part.table.rows);
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

}  // namespace

Packed pack(const Plan& plan, const Batch& b) {
    const Limits limits(plan);
    Packed packed;
    packed.place.reserve(size_t(b.batch * b.length));
    for (std::vector<int64_t>& index : packed.index) index.reserve(size_t(b.batch * b.length));
    packed.starts.push_back(0);
    for (int64_t sequence = 0; sequence < b.batch; sequence++) {
        int64_t counted = 0, last = -1;  // the last visible column
        for (int64_t column = 0; column < b.length; column++) {
            const int64_t at = sequence * b.length + column;
            int64_t position = column;
            if (b.positions) {
                position = b.positions[at];
            } else if (plan.positions.counted) {
                position = plan.positions.pad + (b.ids[at] == plan.positions.pad ? 0 : ++counted);
            }
            const int64_t values[INDEXES] = {b.ids ? b.ids[at] : 0, b.types ? b.types[at] : 0, position};
            for (int i = 0; i < INDEXES; i++) limits.check(Index(i), values[i], sequence, column);
            if (b.mask && !b.mask[at]) continue;
            packed.holes |= last >= 0 && last != column - 1;
            last = column;
            for (int i = 0; i < INDEXES; i++) packed.index[i].push_back(values[i]);
            packed.place.push_back(at);
        }
        if (packed.rows() > packed.starts.back()) packed.starts.push_back(packed.rows());
    }
    return packed;
}

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

bool even(const Packed& packed, const std::vector<Chunk>& chunks, int threads) {
    std::vector<int64_t> busy(size_t(threads), 0);
    for (const Chunk& chunk : chunks) *std::min_element(busy.begin(), busy.end()) += rows_of(packed, chunk);
    return *std::max_element(busy.begin(), busy.end()) * threads * 10 <= packed.rows() * LATE_TENTHS;
}

}  // namespace spicerack
