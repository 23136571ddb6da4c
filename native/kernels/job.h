// A job: some rows of x, ready to be multiplied by all matrices of a call. Part of linear.cpp.
#pragma once

#include "activations.h"
#include "methods.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// One product of a job: how it is multiplied, and its share of the units.
struct ProductWork {
    Method method;
    int64_t first_unit;
    int32_t* starts;  // what its sums begin with, as in Strip
};

// A slab of x for all products of a call.
struct Job {
    const Call* call;
    Activations how;
    int64_t row0;  // the slab's first row in x and y
    Reading reading;
    EvenParts strips;
    Slab slab;
    ProductWork* work;  // [count + 1]: of the last only first_unit is there
    float* halves;     // half the sums, or null
    float* spans[2];   // the sums times their scales, as Strip::sum, and of half spans; or null

    INLINE int64_t units() const { return work[call->count].first_unit; }
};

// Calls body(at, span, sum) for the half spans of a strip: where values of [spans, 2, rows] are, those of [spans, rows],
// and the sum of the codes.
template <class Body>
INLINE void for_each_half(const Slab& s, int64_t begin, int64_t end, int64_t height, const Body& body) {
    for (int64_t row = begin; row < end; row += height) {
        for (int64_t i = 0; i < height; i++) {
            const int64_t span = row + i, at = 2 * row + i;
            body(at, span, s.low[span]);
            body(at + height, span, s.sums[span] - s.low[span]);
        }
    }
}

// Strips first_strip..last_strip become what the bodies read.
template <class T>
void prepare_as(const Job& job, int64_t first_strip, int64_t last_strip) {
    const Slab& s = job.slab;
    for (int64_t t = first_strip; t < last_strip; t++) {
        const int64_t first = job.strips.first(t), height = job.strips.size(t);
        if (job.how == Activations::floats) {
            for (int64_t r = 0; r < height; r++) widen_row<T>(s, {first, height, r});
            continue;
        }
        for (int64_t r = 0; r < height; r++) quantize_row<T>(s, job.how, job.call->fixed_scale, {first, height, r});
        const int64_t begin = first * s.spans, end = begin + height * s.spans;
        for (int i = 0; i < job.call->count; i++) {
            const Weights& w = job.call->products[i].weights;
            // With zeros: minus the sums. Without: minus offset times the sums.
            const int32_t factor = w.zero ? 1 : w.offset - job.work[i].method.shift;
            int32_t* starts = job.work[i].starts;
            if (job.work[i].method.scaling == of_half_blocks) {
                for_each_half(s, begin, end, height, [&](int64_t at, int64_t, int32_t sum) FLAT {
                    starts[at] = -factor * sum;
                });
            } else {
                for (int64_t at = begin; at < end; at++) starts[at] = -factor * s.sums[at];
            }
        }
        if (job.spans[0]) {
            for (int64_t at = begin; at < end; at++) job.spans[0][at] = float(s.sums[at]) * s.scale[at];
        }
        if (job.spans[1]) {
            for_each_half(s, begin, end, height, [&](int64_t at, int64_t span, int32_t sum) FLAT {
                job.spans[1][at] = float(sum) * s.scale[span];
            });
        }
        if (s.words) words_of(s.codes + begin * TILE, (end - begin) * TILE, s.words + begin * TILE);
        if (job.halves) {
            for (int64_t at = begin; at < end; at++) job.halves[at] = 0.5f * float(s.sums[at]);
        }
    }
}

void prepare(const Job& job, int64_t first_strip, int64_t last_strip) {
    switch (job.call->type) {
        case Float::f32: return prepare_as<F32>(job, first_strip, last_strip);
        case Float::f16: return prepare_as<F16>(job, first_strip, last_strip);
        case Float::bf16: return prepare_as<BF16>(job, first_strip, last_strip);
    }
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
