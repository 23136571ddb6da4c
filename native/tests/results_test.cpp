// What becomes of sums: rounding to y's type, GELU, numbers that are not finite; and rows of decoded weights.
#include "products.h"

using namespace spicerack;

namespace {

// Rows with NaN and infinities give what floats give; the rows beside them do not notice.
void not_finite(Random& random) {
    const double odd[] = {NAN, INFINITY, -INFINITY};
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        if (once && (group || kind)) return;
        const Float type = TYPES[random.below(3)];
        const int64_t k = group ? 2 * group : random.between(1, 90), rows = random.between(2, 11);
        const Matrix m = make({random.between(1, 20), k, group, bits, kind, Float::f32, false, false}, random);
        Input x = input(rows, k, type, plain, random);
        for (int64_t row = 0; row < rows; row += 2) {
            for (int64_t i = random.below(3); i >= 0; i--) x.set(row, random.below(k), odd[random.below(3)]);
        }
        check_engines("not finite", m, x, nullptr, {how, 0.02f});
    });
}

// y = scale, for scales that are awkward to round to y's type.
void rounding(Random& random) {
    const int64_t n = 20000;
    Matrix m = make({n, 1, 0, 8, symmetric, Float::f32, false, false, 0}, random, [](int64_t, int64_t) { return 1; });
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = uint32_t(random.bits());
        const int64_t kind = random.below(8);
        if (kind < 4) bits = (bits & 0x807fffffu) | uint32_t(random.between(127 - 27, 127 + 17)) << 23;  // about f16's range
        if (kind % 4 == 1) bits &= 0xfffff000u;                                                          // ties in f16
        if (kind % 4 == 2) bits &= 0xffff8000u;                                                          // ties in bf16
        std::memcpy(m.scales.data() + 4 * i, &bits, 4);
        m.scale[i] = get(m.scales.data(), i, Float::f32);
    }
    for (const Float type : TYPES) {
        const Input x = input(1, 1, type, [](int64_t, int64_t) { return 1.0; });
        for (const Engine& engine : engines()) {
            name("rounding", m, x, {Activations::floats}, engine.isa);
            const Output y = run(engine, x, m, nullptr, {Activations::floats});
            int64_t wrong = 0;
            for (int64_t i = 0; i < n; i++) wrong += !same(y.values[i], rounded(m.scale[i], type));
            check(wrong == 0, "y is the scale, rounded half to even");
        }
    }
}

// Against the error function; every engine gives the scalar engine's bits, also for what is no number.
void gelu(Random& random) {
    std::vector<double> places = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-30, -1e-30, 7.0, -7.0, 7.1, -7.1, 1e30, -1e30};
    for (int i = 0; i < 4000; i++) places.push_back(i * 0.005 - 10);
    const int64_t n = int64_t(places.size());
    const Matrix m = make({n, 32, 0, 8, symmetric, Float::f32, false, false}, random);
    Exact bias(n, 4);
    for (int64_t i = 0; i < n; i++) put(bias.data(), i, places[i], Float::f32);
    const Input x = input(1, 32, Float::f32, [](int64_t, int64_t) { return 0.0; });
    Setting s{Activations::tokens};
    s.gelu = true;
    name("gelu", m, x, s);
    const std::vector<double> want = run(scalar_engine(), x, m, &bias, s).values;
    for (int64_t i = 0; i < n; i++) {
        const double z = get(bias.data(), i, Float::f32), exact = z * 0.5 * std::erfc(-z * std::sqrt(0.5));
        if (!std::isfinite(z)) check(z > 0 ? want[i] == INFINITY : std::isnan(want[i]), "not finite");
        else check(std::fabs(want[i] - exact) <= 4e-7 * std::max(1.0, z), "GELU");
    }
    for (const Engine& engine : engines()) {
        name("gelu", m, x, s, engine.isa);
        check(equal(run(engine, x, m, &bias, s).values, want), "the same bits as scalar");
    }
}

void decoded_rows(Random& random) {
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        if (how != Activations::floats) return;  // it makes no difference
        const int64_t k = group ? group * random.between(1, 3) : random.between(1, 100);
        const int64_t n = random.between(1, bits == TRITS ? 200 : 40);
        const Matrix m = make({n, k, group, bits, kind, TYPES[random.below(3)], false, false}, random);
        std::vector<int64_t> which;
        for (int64_t i = 0; i < 5; i++) which.push_back(random.below(n));
        const Exact out(5 * k, 4);
        decode_rows(m.weights, which.data(), 5, (float*)out.data());
        bool equal = true;
        for (int64_t i = 0; i < 5 * k; i++) {
            const int64_t row = which[i / k], column = i % k;
            equal = equal && get(out.data(), i, Float::f32) == double(float(m.scale_of(row, column) * m.level(row, column)));
        }
        std::snprintf(subject, sizeof subject, "rows: %d bits, group %d, kind %d", bits, int(group), int(kind));
        check(equal, "decoded weights are rounded once");
    });
    for (int bits = 2; bits <= LOOKED_UP; bits++) {
        for (const ScaleType bytes : {ScaleType::f32, ScaleType::int8, ScaleType::e4m3}) {
            for (const int64_t group : {0, 16, 32, 64}) {
                const int64_t k = 192, n = random.between(1, 40), block = bytes == ScaleType::int8 && group ? 64 : 0;
                const Matrix m = make({n, k, group, bits, symmetric, TYPES[random.below(3)], false, false, -1,
                                       random.below(2) == 0, bytes, block}, random);
                const int64_t which[] = {random.below(n)};
                const Exact out(k, 4);
                decode_rows(m.weights, which, 1, (float*)out.data());
                bool equal = true;
                for (int64_t i = 0; i < k; i++) {
                    const float value = float(m.scale_of(*which, i) * m.level(*which, i)) + float(m.minimum_of(*which, i));
                    equal = equal && get(out.data(), i, Float::f32) == double(value);
                }
                std::snprintf(subject, sizeof subject, "rows: %d bits, group %d, scales %d", bits, int(group), int(bytes));
                check(equal, "the scale's product, plus the minimum");
            }
        }
    }
}

void limits() {
    for (const Engine& engine : engines()) {
        std::snprintf(subject, sizeof subject, "limits: %s", engine.isa);
        check(engine.spin(3, false) > engine.spin(3, true), "spin counts its operations");
        const Exact memory(4099, 1);
        engine.read(memory.data(), memory.bytes());
    }
}

}  // namespace

void spicerack::test_results(Random& random) {
    not_finite(random);
    rounding(random);
    gelu(random);
    decoded_rows(random);
    limits();
}
