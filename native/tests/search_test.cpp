// The range search: the same scales, zeros and codes on every instruction set. That they are the specification's is for
// tests/numerics/test_native.py to prove; here sanitizers watch.
#include "../quantizers/dispatch.h"
#include "support.h"

using namespace spicerack;

namespace {

struct Case {
    Float type, scale_type;
    int64_t count, size;
    Levels levels;
    bool optimize;
    int64_t period;  // 0: no importance
};

struct Results {
    Outcome outcome;
    std::vector<double> scale, zero, codes, codes_again, sums;
    Misfit misfit;
};

std::vector<double> numbers(const Exact& memory) {
    std::vector<double> all(memory.bytes());
    for (int64_t i = 0; i < memory.bytes(); i++) all[i] = ((const int8_t*)memory.data())[i];
    return all;
}

Results run(const Quantizers& q, const Case& c, const Exact& w, const Exact& importance) {
    const float coarse[] = {1.0f, 0.8f, -1.0f, 0.5f}, shifts[] = {-1.0f, 0.0f, 1.0f}, fine[] = {1.06f, 1 / 1.06f};
    const SearchSettings settings{c.levels, c.scale_type, c.optimize, coarse, 4, shifts, c.levels.zero ? 3 : 1,
                                  fine, 2, 2, c.levels.half ? 0x1p-24f : 1.0f};
    const Groups groups{w.data(), c.type, c.count, c.size};
    const Exact scale(c.count, 4), zero(c.count, 1), codes(c.count * c.size, 1), again(c.count * c.size, 1);
    const float* s = (const float*)scale.data();
    const int8_t* z = c.levels.zero ? (const int8_t*)zero.data() : nullptr;
    Results r;
    r.outcome = q.search(groups, settings, c.period ? (const float*)importance.data() : nullptr,
                         c.period ? c.period : 1, (float*)scale.data(), (int8_t*)zero.data(), (int8_t*)codes.data());
    q.encode(groups, c.levels, s, z, (int8_t*)again.data());
    std::vector<Sums> sums(c.count);
    q.judge(groups, c.levels, s[0], z ? float(z[0]) : 0.0f, sums.data());
    q.compare(groups, c.levels, s, z, (const int8_t*)codes.data(), r.misfit);
    for (int64_t i = 0; i < c.count; i++) {
        r.scale.push_back(s[i]);
        for (const double x : {sums[i].error, sums[i].xv, sums[i].vv, sums[i].x, sums[i].v}) r.sums.push_back(x);
    }
    r.zero = numbers(zero), r.codes = numbers(codes), r.codes_again = numbers(again);
    return r;
}

void check_case(const Case& c, Random& random) {
    const int64_t count = c.count * c.size;
    const Exact w(count, size_of(c.type)), importance(c.period, 4);
    for (int64_t i = 0; i < count; i++) put(w.data(), i, random.below(9) ? random.bell() : 0.0, c.type);
    for (int64_t i = 0; i < c.period; i++) put(importance.data(), i, random.unit(), Float::f32);
    const Results want = run(quantizers().back(), c, w, importance);
    for (const Quantizers& q : quantizers()) {
        std::snprintf(subject, sizeof subject, "search: %s, %s, scales %s, %d x %d, levels %d..%d%s%s, importance of %d", q.isa,
                      TYPE_NAMES[int(c.type)], TYPE_NAMES[int(c.scale_type)], int(c.count), int(c.size), c.levels.lo,
                      c.levels.hi, c.levels.half ? ", half" : "", c.levels.zero ? ", zero" : "", int(c.period));
        const Results r = run(q, c, w, importance);
        check(r.outcome.finite && r.outcome.fits == want.outcome.fits, "all weights are finite");
        check(equal(r.scale, want.scale) && equal(r.zero, want.zero), "the same scales and zeros as baseline");
        check(equal(r.codes, want.codes) && equal(r.codes_again, want.codes), "the same codes, searched and encoded");
        check(equal(r.sums, want.sums), "the same sums");
        check(std::fabs(r.misfit.wrong - want.misfit.wrong) <= 1e-5 * want.misfit.total, "errors to their last digits");
    }
}

}  // namespace

void spicerack::test_search(Random& random) {
    const Levels grids[] = {{-8, 7, false, false}, {0, 15, false, true}, {-2, 1, true, false}, {-1, 1, false, false}};
    for (const int64_t size : {1, 7, 16, 31, 32, 128, 1100}) {
        if (once && size != 7 && size != 128) continue;
        for (const Levels& levels : grids) {
            for (const bool optimize : {false, true}) {
                const int64_t count = random.between(1, size > 200 ? 3 : 40);
                const int64_t period = optimize && random.below(2) ? size * (random.below(2) ? 1 : count) : 0;
                check_case({TYPES[random.below(3)], TYPES[random.below(3)], count, size, levels, optimize, period}, random);
            }
        }
    }
}
