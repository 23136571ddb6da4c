// What shares work: threads, matrices with one input, slabs of x.
#include "products.h"

using namespace spicerack;

namespace {

// Long rows, in several chunks, and each way of sharing the work: every thread prepares all of x, or some of it and
// then waits, or it has rows of its own.
void threads(Random& random) {
    for_each_family([&](int bits, int64_t group, Kind kind, Activations how) {
        if ((bits + group / 32 + kind + int(how)) % 16) return;
        for (const int64_t rows : {3, 23, 70}) {
            if (once && rows != 23) continue;
            const int64_t n = rows == 3 ? 450 : random.between(70, 90);
            const int64_t k = rows == 70 ? group ? 2 * std::max<int64_t>(group, 64) : 141 : 640;
            const Matrix m = make({n, k, group, bits, kind, Float::f32, false, false}, random);
            const Input x = input(rows, k, Float::f32, plain, random), other = input(rows, k, Float::f32, plain, random);
            Setting s{how, 0.02f};
            name("threads", m, x, s);
            const std::vector<double> want = run(scalar_engine(), x, m, nullptr, s).values;
            for (s.threads = 1; s.threads <= 3; s.threads++) {
                for (const Engine& engine : engines()) {
                    name("threads", m, x, s, engine.isa);
                    run(engine, other, m, nullptr, s);  // leaves other values in the scratch memory
                    check(equal(run(engine, x, m, nullptr, s).values, want), "the same bits as one scalar thread");
                }
            }
        }
    });
}

// Matrices of every form that share x.
void products(Random& random) {
    for (int turn = 0; turn < (once ? 12 : 48); turn++) {
        const Activations how = HOWS[turn % 4];
        const Float type = TYPES[turn % 3];
        const int64_t k = turn % 2 ? 128 : 384;
        std::vector<Matrix> matrices;
        std::vector<Exact> biases;
        const int64_t count = random.between(2, 4);
        for (int64_t i = 0; i < count; i++) {
            const bool trits = turn % 3 == 2;  // they share x only among themselves
            const Form form{random.between(1, trits ? 200 : 50), k, GROUPS[random.below(4)],
                            trits ? TRITS : int(random.between(2, 8)), trits ? symmetric : Kind(random.below(KINDS)),
                            TYPES[random.below(3)], false, false};
            matrices.push_back(make(form, random));
            biases.push_back(bias_of(form.n, type, random));
        }
        const Input x = input(random.between(1, 20), k, type, plain, random);
        std::vector<const Matrix*> these;
        std::vector<const Exact*> with;
        for (int64_t i = 0; i < count; i++) {
            these.push_back(&matrices[i]);
            with.push_back(i % 2 ? nullptr : &biases[i]);
        }
        const Setting s{how, 0.02f, int(random.between(1, 3))};
        std::vector<std::vector<double>> want;
        for (int64_t i = 0; i < count; i++) want.push_back(run(scalar_engine(), x, matrices[i], with[i], s).values);
        for (const Engine& engine : engines()) {
            const std::vector<Output> together = run(engine, x, these, with, s);
            for (int64_t i = 0; i < count; i++) {
                name("products", matrices[i], x, s, engine.isa);
                check(equal(together[i].values, want[i]), "as one by one");
            }
        }
    }
}

// More rows of x than are quantized at once.
void slabs(Random& random) {
    const Matrix m = make({2, 600, 0, 3, symmetric, Float::f32, false, false}, random);
    const int64_t rows = 1000;
    const Input x = input(rows, 600, Float::f32, [&](int64_t row, int64_t column) {
        return row == 990 && column == 7 ? NAN : random.bell();
    });
    check_engines("slabs", m, x, nullptr, {Activations::tokens});
}

}  // namespace

void spicerack::test_sharing(Random& random) {
    threads(random);
    products(random);
    if (!once) slabs(random);
}
