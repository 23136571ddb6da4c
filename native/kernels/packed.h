// The rows of a batch that its mask does not hide, one behind the other, and how they are cut.
#pragma once

#include <vector>

#include "plan.h"

namespace spicerack {

// The visible rows of a batch, packed.
struct Packed {
    std::vector<int64_t> index[INDEXES];
    std::vector<int64_t> place;   // the row in the batch
    std::vector<int64_t> starts;  // first row of each sequence that has any, and the end
    bool holes = false;           // between two visible rows of a sequence

    int64_t rows() const { return int64_t(place.size()); }
    int64_t sequences() const { return int64_t(starts.size()) - 1; }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t s = 0; s < sequences(); s++) most = std::max(most, starts[s + 1] - starts[s]);
        return most;
    }
};

// Raises std::out_of_range for what is no row of its table, hidden or not.
Packed pack(const Plan& plan, const Batch& batch);

// Sequences first .. last - 1.
struct Chunk {
    int64_t first, last;
};

// Whole sequences, cut into `count` chunks of about as many rows, or fewer.
std::vector<Chunk> cut(const Packed& packed, int64_t count);

int64_t rows_of(const Packed& packed, const Chunk& chunk);

// Whether threads that take one chunk after the other end at about the same time.
bool even(const Packed& packed, const std::vector<Chunk>& chunks, int threads);

}  // namespace spicerack
