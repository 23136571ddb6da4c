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

    INLINE int64_t units() const { return work[call->count].first_unit; }
};

// What dot products leave out of every code.
INLINE int shift_of(const Weights& w) { return w.bits == 8 ? SHIFT<8> : w.bits == TRITS ? SHIFT<TRITS> : 0; }

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
            const int32_t factor = w.zero ? 1 : w.offset - shift_of(w);
            for (int64_t at = begin; at < end; at++) job.work[i].starts[at] = -factor * s.sums[at];
        }
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
