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

// A tensor of a model in its own type; a call widens short ones first, to `place` among the call's own floats.
struct Parameter {
    const void* data;  // null for none
    Float type;
    int64_t count, place;
};

// Some columns of a buffer, from the first on.
struct Columns {
    int buffer;
    int64_t first, width;
};

// What tells the row of a table.
enum class Index : int { ids, types, positions };
constexpr int INDEXES = 3;
const char* const INDEX_NAMES[INDEXES] = {"id", "token type", "position"};

// Rows of floats in their own type, or packed.
struct Table {
    int64_t rows;
    const void* floats;  // [rows, width], or null: packed
    Float type;
    Weights packed;
};

// y = the sum of one row of each table, from the first table on.
struct LookUp {
    struct Part {
        Index index;
        Table table;
    };
    std::vector<Part> parts;
    int y;
};

// y = the batch's states.
struct TakeStep {
    int y;
};

struct NormStep {
    int x, more, y;  // more: -1 for none
    Parameter weight, bias;
    float epsilon;
    bool centered;
};

struct ProductStep {
    struct Part {
        Weights weights;
        Parameter bias;
        int y;
        bool gelu;
    };
    const Engine* engine;
    int x;
    Activations activations;
    const float* fixed_scale;  // read at each run; null where activations are not fixed
    std::vector<Part> parts;
};

// y = x W^T + bias, or GELU of that, of a layer that stayed float.
struct DenseStep {
    int x, y;
    const void* weights;  // [width of y, width of x]
    Float type;
    Parameter bias;
    bool gelu;
};

// Every row of a sequence sees the rows of that sequence that are at most `window` away; below 0: all.
struct AttentionStep {
    Columns q, k, v;
    int y;
    int64_t heads, kv_heads;
    float scale;
    int64_t window;
    int bias;  // among the plan's, or -1
};

// Of scores, by how far a key is behind its query: table [buckets, heads], of which buckets [2 reach + 1] name the row
// for the distances -reach .. reach, and for those beyond.
struct Bias {
    Table table;
    int64_t heads;
    std::vector<int64_t> buckets;
};

// y = cosines, then sines, of position * frequency for each frequency, times the scale.
struct TurnStep {
    Parameter frequencies;
    float scale;
    int y;
};

struct RotateStep {
    Columns x;
    int64_t heads;
    int turns;
};

struct GateStep {
    Columns x, more;  // more: the buffer -1 for none
    int y;
    Function function;
};

struct AddStep {
    int x, more, y;
    Parameter factor;
};

using Step = std::variant<LookUp, TakeStep, NormStep, ProductStep, DenseStep, AttentionStep, TurnStep, RotateStep, GateStep,
                          AddStep>;

// Where positions come from if a batch brings none: the column, from 0 on; or, as in RoBERTa, pad + the number of ids up
// to here that are not pad, and pad for those that are.
struct Positions {
    bool counted;
    int64_t pad;
};

struct Plan {
    const Engine* engine;  // of all but products
    Float type;            // of states and results
    std::vector<int64_t> widths;  // of buffers
    Positions positions;
    std::vector<Step> steps;
    int result;  // buffer
    std::vector<Bias> biases;
    std::vector<Parameter> widened;  // what a call widens first
    bool measures;  // distances between rows count, so that none may be missing between two of a sequence
};

// [batch, length] each, side by side. ids: null where no table asks for them; mask: null, or 0 hides; types: null: 0;
// positions: null: as the plan says. states: [batch, length, width] in the plan's type, where a step takes them.
struct Batch {
    const int64_t *ids, *mask, *types, *positions;
    const void* states;
    int64_t batch, length;
};

// y [batch, length, width of the result] in the plan's type; rows that the mask hides are zeros. False, and nothing in y,
// where distances count and a mask has a hole. Raises std::out_of_range for what is no row of its table, hidden or not.
bool run_plan(const Plan& plan, const Batch& batch, void* y, int threads);

}  // namespace spicerack
