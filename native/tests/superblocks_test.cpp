// The search of super-blocks: the same floats, integers and codes on every instruction set. That they are the
// specification's is for tests/numerics/test_superblocks.py to prove; here sanitizers watch.
#include "../quantizers/dispatch.h"
#include "support.h"

using namespace spicerack;

namespace {

struct Case {
    Float type;
    int64_t count, period;  // period 0: no importance
    SuperSettings settings;
};

struct Results {
    Outcome outcome;
    std::vector<double> bytes[5];
};

Results run(const Quantizers& q, const Case& c, const Exact& w, const Exact& importance) {
    const int64_t groups = c.count * c.settings.groups, size = c.settings.groups * c.settings.columns;
    const Exact d(c.count, 4), e(c.count, 4), p(groups, 1), r(groups, 1), codes(c.count * size, 1);
    Results results;
    results.outcome = q.superblocks({w.data(), c.type, c.count, size}, c.settings,
                                    c.period ? (const float*)importance.data() : nullptr, c.period ? c.period : 1,
                                    {(float*)d.data(), (float*)e.data(), (int8_t*)p.data(), (int8_t*)r.data(),
                                     (int8_t*)codes.data()});
    const Exact* all[] = {&d, &e, &p, &r, &codes};
    for (int part = 0; part < 5; part++) {
        for (int64_t i = 0; i < all[part]->bytes(); i++) {
            results.bytes[part].push_back(((const int8_t*)all[part]->data())[i]);
        }
    }
    return results;
}

void check_case(const Case& c, Random& random) {
    const int64_t size = c.settings.groups * c.settings.columns, total = c.count * size;
    const Exact w(total, size_of(c.type)), importance(c.period, 4);
    for (int64_t i = 0; i < total; i++) put(w.data(), i, random.below(9) ? random.bell() : 0.0, c.type);
    for (int64_t i = 0; i < c.period; i++) put(importance.data(), i, random.unit(), Float::f32);
    const Results want = run(quantizers().back(), c, w, importance);
    for (const Quantizers& q : quantizers()) {
        std::snprintf(subject, sizeof subject, "super-blocks: %s, %s, %d of %d x %d, codes %d..%d%s, importance of %d", q.isa,
                      TYPE_NAMES[int(c.type)], int(c.count), int(c.settings.groups), int(c.settings.columns),
                      c.settings.lo, c.settings.hi, c.settings.has_min ? ", minima" : "", int(c.period));
        const Results got = run(q, c, w, importance);
        check(got.outcome.finite && got.outcome.fits == want.outcome.fits, "all weights are finite");
        for (int part = 0; part < 5; part++) {
            check(equal(got.bytes[part], want.bytes[part]), "the same floats, integers and codes as baseline");
        }
    }
}

}  // namespace

void spicerack::test_superblocks(Random& random) {
    const float steps[] = {1.2f, 1.0f, -1.0f, 0.8f}, shares[] = {1.0f, 0.5f, 0.0f};
    const Share six{true, 0, 63, Float::f16}, both{true, -32, 31, Float::f16}, plain{false, 0, 1, Float::bf16};
    const SuperSettings forms[] = {
        {0, 15, 8, 32, true, true, six, six, steps, 4, shares, 3, 2, 2},
        {0, 3, 16, 16, true, false, six, six, steps, 4, shares, 3, 2, 2},
        {-4, 3, 16, 16, false, true, both, plain, steps, 4, shares, 3, 2, 2},
        {0, 15, 1, 20, true, true, plain, plain, steps, 4, shares, 3, 2, 2},
        {0, 255, 1, 7, true, true, plain, plain, steps, 4, shares, 3, 2, 2},
    };
    for (const SuperSettings& settings : forms) {
        for (int repeats = 0; repeats < (once ? 1 : 3); repeats++) {
            const int64_t count = random.between(1, 40), size = settings.groups * settings.columns;
            const int64_t period = random.below(2) ? size * (random.below(2) ? 1 : count) : 0;
            check_case({TYPES[random.below(3)], count, period, settings}, random);
        }
    }
}
