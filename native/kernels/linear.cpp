// y = x W^T for packed weights, compiled once per instruction set; kernel.h tells the layout.
//
// int8 activations. One span of 32 columns is eight integer dot products for every 16 rows; its exact sum becomes
// float32 and is scaled:
//
//     t += float(sum over the span of (u - z) a) * s_a        one fused multiply-add for each span
//     y += t * s_w                                             another for each group, or one for the row
//
// With one scale for a token and one for a row nothing is scaled before the end. Groups in blocks: each tile, or half of
// one, is scaled by s_a and then s_w, and s_a times the sum of the codes by the minimum. Float activations: the same with
// codes turned to floats, four running sums for a group. Spans, groups and sums come in the same order wherever they are
// computed, so results do not depend on M, on threads, or on the instruction set.
//
// The rows of x are cut into slabs and these into strips, the panels of W into units, and a unit's columns into chunks.
// From the inside out: codes.h unpacks, bodies.h and blocks.h multiply a strip by a few panels, methods.h chooses the body,
// activations.h quantizes x, job.h makes a slab ready, results.h makes y of sums, units.h walks over a unit; sizes.h
// has what was tuned. Here the units are shared among threads. All of it is one unit of compilation, with nothing that
// others could link to.
#include "buffer.h"
#include "team.h"
#include "units.h"

namespace spicerack::SPICERACK_ISA {
namespace {

// The units of one member of a team. Each takes its own in order, so that a layer's weights stay in the caches where
// they were; who is done takes from the others.
struct alignas(64) Share {
    int64_t next, last;
};

// The memory of one thread's jobs.
struct Arena {
    Buffer<int8_t> codes;
    Buffer<int16_t> words;
    Buffer<float> scale, token, floats, halves, spans, half_spans;
    Buffer<int32_t> sums, low, total, starts;
    Buffer<uint8_t> wild;
    Buffer<ProductWork> work;
    Buffer<Share> shares;
    Scratch scratch;
};

INLINE Arena& own_arena() {
    static thread_local Arena arena;
    return arena;
}

Job make_job(const Call& call, Activations how, int64_t row0, int64_t rows, Arena& arena) {
    const Weights& w0 = call.products[0].weights;
    const Strips strips = strips_for(rows, how, call.products, call.count);
    ProductWork* work = arena.work.need(call.count + 1);
    Job job{&call, how, row0, strips.reading, EvenParts(rows, strips.rows), {}, work, nullptr, {}};
    Slab& s = job.slab;
    s.rows = rows;
    s.k = w0.k;
    s.spans = w0.tiles();
    s.x = (const char*)call.x + row0 * s.k * size_of(call.type);
    s.type = call.type;
    bool half = false, words = false, low = false, sums = false, half_sums = false;
    work[0].first_unit = 0;
    for (int i = 0; i < call.count; i++) {
        const Weights& w = call.products[i].weights;
        work[i].method = method_of(how, w, strips.reading);
        const int panels = work[i].method.unit_panels;
        work[i + 1].first_unit = work[i].first_unit + (w.panels() + panels - 1) / panels;
        half |= w.half;
        words |= work[i].method.words;
        const bool halves = work[i].method.scaling == of_half_blocks;
        low |= halves;
        sums |= w.minima && !halves;
        half_sums |= w.minima && halves;
    }
    const int64_t count = rows * s.spans;
    if (how == Activations::floats) {
        s.floats = arena.floats.need(count * TILE);
        return job;
    }
    s.codes = arena.codes.need(count * TILE);
    if (words) s.words = arena.words.need(count * TILE);
    s.scale = arena.scale.need(count);
    s.sums = arena.sums.need(count);
    if (low) s.low = arena.low.need(count);
    if (sums) job.spans[0] = arena.spans.need(count);
    if (half_sums) job.spans[1] = arena.half_spans.need(2 * count);
    s.total = arena.total.need(rows);
    s.wild = arena.wild.need(rows);
    if (how != Activations::spans) s.token = arena.token.need(rows);
    if (half) job.halves = arena.halves.need(count);
    const int64_t each = low ? 2 * count : count;
    int32_t* starts = arena.starts.need(each * call.count);
    for (int i = 0; i < call.count; i++) work[i].starts = starts + i * each;
    return job;
}

// Rows `row0` and on, by one thread alone.
void run_alone(const Call& call, Activations how, int64_t row0, int64_t rows);

// Rows that int8 cannot hold are what float arithmetic makes of them.
void redo_wild(const Job& job) {
    if (job.how == Activations::floats) return;
    for (int64_t m = 0; m < job.slab.rows; m++) {
        if (job.slab.wild[m]) run_alone(*job.call, Activations::floats, job.row0 + m, 1);
    }
}

void run_alone(const Call& call, Activations how, int64_t row0, int64_t rows) {
    Arena& arena = own_arena();
    const Job job = make_job(call, how, row0, rows, arena);
    prepare(job, 0, job.strips.count);
    for (int64_t unit = 0; unit < job.units(); unit++) run_unit(job, unit, arena.scratch);
    redo_wild(job);
}

// All threads on one slab, each with some of the units.
struct Together {
    const Job* job;
    Share* shares;
    int count;       // of shares
    bool each;       // prepares x for itself, rather than wait for the others
};

void work_together(void* context, Member me) {
    const Together& all = *(const Together*)context;
    Arena& arena = own_arena();
    Job job = *all.job;
    if (all.each) {
        if (me.index != 0) job = make_job(*job.call, job.how, job.row0, job.slab.rows, arena);
        prepare(job, 0, job.strips.count);
    } else {
        const int64_t strips = job.strips.count;
        prepare(job, strips * me.index / me.count, strips * (me.index + 1) / me.count);
        wait_for_all(me);
    }
    for (int i = 0; i < all.count; i++) {
        Share& share = all.shares[(me.index + i) % all.count];
        for (int64_t unit; (unit = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.last;) {
            run_unit(job, unit, arena.scratch);
        }
    }
}

void run_together(const Call& call, int64_t row0, int64_t rows, int threads) {
    Arena& arena = own_arena();
    const Job job = make_job(call, call.activations, row0, rows, arena);
    Together all{&job, arena.shares.need(threads), threads, rows * job.slab.k <= VALUES_EACH};
    for (int i = 0; i < threads; i++) {
        all.shares[i] = {job.units() * i / threads, job.units() * (i + 1) / threads};
    }
    run_team(threads, work_together, &all);
    redo_wild(job);
}

// Rows cut into parts, one for each thread, which takes them slab by slab.
struct Apart {
    const Call* call;
    int64_t slab;
};

void work_apart(void* context, Member me) {
    const Apart& all = *(const Apart*)context;
    const Call& call = *all.call;
    const EvenParts parts(call.m, (call.m + me.count - 1) / me.count);
    if (me.index >= parts.count) return;
    const int64_t first = parts.first(me.index), last = first + parts.size(me.index);
    for (int64_t row = first; row < last; row += all.slab) {
        run_alone(call, call.activations, row, least(all.slab, last - row));
    }
}

}  // namespace

void linear(const Call& call) {
    const Weights& w0 = call.products[0].weights;
    int64_t n = 0, bytes = 0;
    for (int i = 0; i < call.count; i++) {
        const Weights& w = call.products[i].weights;
        n += w.n;
        bytes += w.bundles() * w.tiles() * w.tile_bytes();
    }
    const int64_t slab = most(SLAB_BYTES / (w0.tiles() * TILE) / FROM_BYTES.rows * FROM_BYTES.rows, SLAB_ROWS_LEAST);
    const int64_t useful = call.m * w0.k * n / PRODUCTS_A_THREAD + 1;
    const int threads = int(least(call.threads, useful));
    const int64_t rows = call.m / threads;
    if (threads == 1 || rows >= (bytes <= WEIGHT_BYTES_NEAR ? ROWS_APART_NEAR : ROWS_APART)) {
        Apart all{&call, slab};
        run_team(threads, work_apart, &all);
    } else {
        for (int64_t row = 0; row < call.m; row += slab) run_together(call, row, least(slab, call.m - row), threads);
    }
}

}  // namespace spicerack::SPICERACK_ISA
