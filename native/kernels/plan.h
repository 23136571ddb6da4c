// A part of a model as a list of steps, which one call runs for a batch of sequences.
//
// The rows of all sequences lie packed, one after the other, so that what a mask hides costs nothing. A step reads and
// writes buffers [rows, width] of float32 in an arena. Engines compute the steps, each of which gives a row the same bits
// whatever rows are beside it: results of a sequence depend on no other, nor on how a batch is cut, nor on threads.
#pragma once

#include <variant>
#include <vector>

#include "kernel.h"

namespace spicerack {

// What tells the row of a table.
enum class Index : int { ids, types, positions };
constexpr int INDEXES = 3;
const char* const INDEX_NAMES[INDEXES] = {"id", "token type", "position"};

// y = the sum of one row of each table, from the first table on.
struct LookUp {
    struct Table {
        Index index;
        int64_t rows;
        const float* floats;  // [rows, width], or null: packed
        Weights packed;
    };
    std::vector<Table> tables;
    int y;
};

struct NormStep {
    int x, more, y;  // more: -1 for none
    const float *weight, *bias;
    float epsilon;
    bool centered;
};

struct ProductStep {
    struct Part {
        Weights weights;
        const float* bias;
        int y;
        bool gelu;
    };
    const Engine* engine;
    int x;
    Activations activations;
    const float* fixed_scale;  // read at each run; null where activations are not fixed
    std::vector<Part> parts;
};

// Every row of a sequence sees all of that sequence.
struct AttentionStep {
    int q, k, v, y;
    int64_t heads, kv_heads;
    float scale;
};

struct AddStep {
    int x, more, y;
};

using Step = std::variant<LookUp, NormStep, ProductStep, AttentionStep, AddStep>;

// Where positions come from if a batch brings none: the column, from 0 on; or, as in RoBERTa, pad + the number of ids up
// to here that are not pad, and pad for those that are.
struct Positions {
    bool counted;
    int64_t pad;
};

struct Plan {
    const Engine* engine;  // of norms and attention
    std::vector<int64_t> widths;  // of buffers
    Positions positions;
    std::vector<Step> steps;
    int result;  // buffer
};

// [batch, length] each, side by side. mask: null, or 0 hides; types: null: 0; positions: null: as the plan says.
struct Batch {
    const int64_t *ids, *mask, *types, *positions;
    int64_t batch, length;
};

// y [batch, length, width of the result]; rows that the mask hides are zeros. Raises std::out_of_range for what is no row
// of its table, hidden or not.
void run_plan(const Plan& plan, const Batch& batch, float* y, int threads);

}  // namespace spicerack
