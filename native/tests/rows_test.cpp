// What is done to rows number by number, against float64; all engines and numbers of threads give the same bits.
#include <functional>

#include "support.h"

using namespace spicerack;

namespace {

const int64_t WIDTHS[] = {1, 4, 7, 16, 17, 40, 384};
const double UNIT = 0x1p-24;

// [rows, step], of which the first columns are used.
Exact floats(int64_t rows, int64_t step, Random& random, double scale = 2) {
    Exact memory(rows * step, sizeof(float));
    for (int64_t i = 0; i < rows * step; i++) put(memory.data(), i, random.bell() * scale, Float::f32);
    return memory;
}

const float* data(const Exact& memory) { return (const float*)memory.data(); }

// Of each engine and number of threads, what it makes in a copy of y; the scalar engine's values, which are all others'.
std::vector<double> check_engines(const char* what, const Exact& y, const std::function<void(const Engine&, float*, int)>& run) {
    const int64_t count = y.bytes() / int64_t(sizeof(float));
    const auto made = [&](const Engine& engine, int threads) {
        Exact copy(count, sizeof(float));
        std::memcpy(copy.data(), y.data(), size_t(y.bytes()));
        run(engine, (float*)copy.data(), threads);
        std::vector<double> values;
        for (int64_t i = 0; i < count; i++) values.push_back(get(copy.data(), i, Float::f32));
        return values;
    };
    std::snprintf(subject, sizeof subject, "%s: scalar", what);
    const std::vector<double> want = made(scalar_engine(), 1);
    for (const Engine& engine : engines()) {
        for (int threads = 1; threads <= 3; threads++) {
            std::snprintf(subject, sizeof subject, "%s: %s, %d threads", what, engine.isa, threads);
            check(equal(made(engine, threads), want), "the same bits as scalar");
        }
    }
    std::snprintf(subject, sizeof subject, "%s", what);
    return want;
}

double exactly(Function function, double x) {
    switch (function) {
        case Function::gelu: return x * std::erfc(-x / std::sqrt(2.0)) / 2;
        case Function::gelu_tanh: return x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) / 2;
        case Function::gelu_quick: return x / (1 + std::exp(-1.702 * x));
        case Function::silu: return x / (1 + std::exp(-x));
    }
    return NAN;
}

void gates(Random& random) {
    for (const int64_t width : WIDTHS) {
        for (int kind = 0; kind < 2 * FUNCTIONS; kind++) {
            const Function function = Function(kind / 2);
            const int64_t rows = width == 384 ? 90 : 3, step = width + random.below(5);
            const Exact x = floats(rows, step, random, width == 40 ? 30 : 2), more = floats(rows, step + 3, random);
            const bool gated = kind % 2;
            const std::vector<double> y = check_engines("gate", Exact(rows * width, 4), [&](const Engine& engine, float* to, int threads) {
                engine.gate({data(x), gated ? data(more) : nullptr, step, step + 3, to, rows, width, function, threads});
            });
            bool right = true;
            for (int64_t i = 0; i < rows * width; i++) {
                const double value = get(x.data(), i / width * step + i % width, Float::f32);
                const double times = gated ? get(more.data(), i / width * (step + 3) + i % width, Float::f32) : 1;
                // An exponent's rounding counts as often as it is large, and is e^-that of the result.
                const double bound = (4e-7 + 10 * UNIT * std::fabs(exactly(function, value))) * std::fabs(times);
                right = right && std::fabs(y[i] - exactly(function, value) * times) <= bound;
            }
            check(right, "y is within the bound");
        }
    }
    // In place, and what is no number stays where it is.
    const int64_t width = 40;
    Exact y = floats(2, width, random);
    put(y.data(), 3, NAN, Float::f32);
    put(y.data(), 4, INFINITY, Float::f32);
    for (int kind = 0; kind < FUNCTIONS; kind++) {
        const std::vector<double> values = check_engines("gate in place", y, [&](const Engine& engine, float* to, int threads) {
            engine.gate({to, nullptr, width, 0, to, 2, width, Function(kind), threads});
        });
        bool right = std::isnan(values[3]) && values[4] == INFINITY;
        for (int64_t i = 0; i < 2 * width; i++) right = right && (i == 3 || !std::isnan(values[i]));
        check(right, "NaN stays, and infinity");
    }
}

void sums(Random& random) {
    for (const int64_t width : WIDTHS) {
        for (const bool factored : {false, true}) {
            const int64_t rows = width == 384 ? 90 : 3;
            const Exact x = floats(rows, width, random), more = floats(rows, width, random), factor = floats(1, width, random);
            const std::vector<double> y = check_engines("sum", x, [&](const Engine& engine, float* to, int threads) {
                engine.add({to, data(more), factored ? data(factor) : nullptr, to, rows, width, threads});
            });
            bool right = true;
            for (int64_t i = 0; i < rows * width; i++) {
                const float times = factored ? float(get(factor.data(), i % width, Float::f32)) : 1.0f;
                const float product = float(get(more.data(), i, Float::f32)) * times;
                right = right && y[i] == double(float(get(x.data(), i, Float::f32)) + product);
            }
            check(right, "rounded twice");
        }
    }
}

void rotations(Random& random) {
    for (const int64_t width : {16, 32, 48, 80}) {
        for (const int64_t rotated : {int64_t(2), width / 2, width}) {
            const int64_t rows = width == 80 ? 120 : 3, heads = random.between(1, 3), step = heads * width + 5;
            const Exact x = floats(rows, step, random), turns = floats(rows, rotated, random, 0.5);
            const std::vector<double> y = check_engines("rotation", x, [&](const Engine& engine, float* to, int threads) {
                engine.rotate({to, step, data(turns), rows, heads, width, rotated, threads});
            });
            bool right = true;
            for (int64_t i = 0; i < rows * step; i++) {
                const int64_t row = i / step, column = i % step % width, half = rotated / 2;
                const bool turned = i % step < heads * width && column < rotated, low = column < half;
                double want = get(x.data(), i, Float::f32), bound = 0;
                if (turned) {
                    const double other = get(x.data(), low ? i + half : i - half, Float::f32);
                    const double cosine = get(turns.data(), row * rotated + column % half, Float::f32);
                    const double sine = get(turns.data(), row * rotated + half + column % half, Float::f32);
                    bound = 3 * UNIT * (std::fabs(want * cosine) + std::fabs(other * sine));
                    want = want * cosine + (low ? -other : other) * sine;
                }
                right = right && std::fabs(y[i] - want) <= bound;
            }
            check(right, "pairs are turned, and nothing else");
        }
    }
}

void conversions(Random& random) {
    for (const Float type : TYPES) {
        for (const int64_t count : WIDTHS) {
            const Exact x = floats(1, count, random);
            for (const Engine& engine : engines()) {
                std::snprintf(subject, sizeof subject, "conversion: %s, %s, %d", engine.isa, TYPE_NAMES[int(type)], int(count));
                Exact narrow(count, size_of(type)), wide(count, sizeof(float));
                engine.convert(x.data(), Float::f32, narrow.data(), type, count);
                engine.convert(narrow.data(), type, wide.data(), Float::f32, count);
                bool right = true;
                for (int64_t i = 0; i < count; i++) {
                    const double want = rounded(get(x.data(), i, Float::f32), type);
                    right = right && get(narrow.data(), i, type) == want && get(wide.data(), i, Float::f32) == want;
                }
                check(right, "there, rounded once, and back");
            }
        }
    }
}

}  // namespace

void spicerack::test_rows(Random& random) {
    gates(random);
    sums(random);
    rotations(random);
    conversions(random);
}
