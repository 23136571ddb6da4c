// The Python face of the native code: checks types and sizes, releases the GIL, calls. Its only users, in
// src/spicerack: numerics/native.py (search, codes, bit streams, fake quantization), and of the kernels kernels/panels.py
// (layout), multiply.py (products), attention.py, plan.py, guard.py and limits.py. What they hand in is told in _native.pyi.
//
// Those of numerics work on one thread, and callers split rows among threads, which never changes a result; those of
// training and of the kernels bring torch's team. isa: an instruction set of quantizers(), "" for the widest.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/arena.h"
#include "kernels/kernel.h"
#include "kernels/layout.h"
#include "kernels/plan.h"
#include "kernels/pool.h"
#include "kernels/stored.h"
#include "kernels/team.h"
#include "quantizers/dispatch.h"
#include "quantizers/pack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace spicerack {
namespace {

using Floats = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool fact, const char* message) {
    if (!fact) throw std::invalid_argument(message);
}

Float float_type(const Floats& w) {
    if (w.dtype() == nb::dtype<float>()) return Float::f32;
    require(w.dtype().bits == 16 && w.dtype().lanes == 1, "weights must be float32, float16 or bfloat16");
    if (w.dtype().code == uint8_t(nb::dlpack::dtype_code::Float)) return Float::f16;
    require(w.dtype().code == uint8_t(nb::dlpack::dtype_code::Bfloat), "weights must be float32, float16 or bfloat16");
    return Float::bf16;
}

Float float_type(const std::string& name) {
    if (name == "float32") return Float::f32;
    if (name == "float16") return Float::f16;
    require(name == "bfloat16", "scales are float32, float16 or bfloat16");
    return Float::bf16;
}

Groups groups_of(const Floats& w) {
    require(w.shape(1) > 0, "empty groups");
    return {w.data(), float_type(w), int64_t(w.shape(0)), int64_t(w.shape(1))};
}

const Quantizers& quantizers_for(const std::string& isa) {
    for (const Quantizers& q : quantizers()) {
        if (isa.empty() || isa == q.isa) return q;
    }
    throw std::invalid_argument("this processor has no " + isa);
}

// Scales [count], zeros [count] and codes [count, size] of groups w [count, size], as search.h tells -> every weight is
// finite, every scale is usable. importance: one value for each weight, or a length that repeats.
std::pair<bool, bool> search(const Floats& w, Levels levels, const std::string& scale_type,
            const std::vector<float>& coarse, const std::vector<float>& shifts, const std::vector<float>& fine, int refinements,
            std::optional<Vector<const float>> importance, Vector<float> scale, Vector<int8_t> zero, Matrix<int8_t> codes,
            const std::string& isa) {
    const Groups groups = groups_of(w);
    const size_t count = groups.count, size = groups.size;
    require(scale.shape(0) == count && zero.shape(0) == count, "one scale and zero for each group");
    require(codes.shape(0) == count && codes.shape(1) == size, "codes are shaped like weights");
    require(fine.size() % 2 == 0, "fine factors come in pairs");
    require(!importance || (importance->shape(0) > 0 && importance->shape(0) % size == 0 &&
                            count * size % importance->shape(0) == 0),
            "importance must repeat over whole groups");
    const SearchSettings settings{levels, float_type(scale_type), !coarse.empty(), coarse.data(), int(coarse.size()),
                                  shifts.data(), int(shifts.size()), fine.data(), int(fine.size()), refinements};
    const Quantizers& q = quantizers_for(isa);
    nb::gil_scoped_release unlocked;
    const Outcome outcome =
        q.search(groups, settings, importance ? importance->data() : nullptr,
                 importance ? int64_t(importance->shape(0)) : 1, scale.data(), zero.data(), codes.data());
    return {outcome.finite, outcome.fits};
}

// Codes [count, size] of groups w [count, size] against scale [count] and zero [count].
void encode(const Floats& w, Levels levels, Vector<const float> scale, std::optional<Vector<const int8_t>> zero,
            Matrix<int8_t> codes, const std::string& isa) {
    const Groups groups = groups_of(w);
    const size_t count = groups.count, size = groups.size;
    require(scale.shape(0) == count && (!zero || zero->shape(0) == count), "one scale and zero for each group");
    require(codes.shape(0) == count && codes.shape(1) == size, "codes are shaped like weights");
    const Quantizers& q = quantizers_for(isa);
    nb::gil_scoped_release unlocked;
    q.encode(groups, levels, scale.data(), zero ? zero->data() : nullptr, codes.data());
}

// One scale and zero over pieces [count, size] of a long group: error, sum x v, sum v v, sum x, sum v of each, [count, 5].
void judge(const Floats& pieces, Levels levels, float scale, float zero, Matrix<double> out, const std::string& isa) {
    const Groups groups = groups_of(pieces);
    require(out.shape(0) == size_t(groups.count) && out.shape(1) == 5, "five sums for each piece");
    const Quantizers& q = quantizers_for(isa);
    nb::gil_scoped_release unlocked;
    q.judge(groups, levels, scale, zero, (Sums*)out.data());
}

// -> sum (decoded - w)^2, sum w^2 over groups w [count, size] with given codes, scale [count] and zero [count].
std::pair<double, double> compare(const Floats& w, Levels levels, Vector<const float> scale,
                                  std::optional<Vector<const int8_t>> zero, Matrix<const int8_t> codes) {
    const Groups groups = groups_of(w);
    const size_t count = groups.count, size = groups.size;
    require(scale.shape(0) == count && (!zero || zero->shape(0) == count), "one scale and zero for each group");
    require(codes.shape(0) == count && codes.shape(1) == size, "codes are shaped like weights");
    const Quantizers& q = quantizers_for("");
    nb::gil_scoped_release unlocked;
    Misfit misfit;
    q.compare(groups, levels, scale.data(), zero ? zero->data() : nullptr, codes.data(), misfit);
    return {misfit.wrong, misfit.total};
}

void check_packed(int bits, size_t rows, size_t columns, size_t packed_rows, size_t words) {
    require(bits >= 1 && bits <= 8, "1 to 8 bits");
    require(packed_rows == rows && words == (columns * bits + 31) / 32, "codes and words do not belong together");
}

// Codes [rows, columns] as little-endian bit streams, words [rows, ceil(columns * bits / 32)]; and back. pack.h.
void pack_codes(Matrix<const uint8_t> codes, int bits, int offset, Matrix<int32_t> words) {
    check_packed(bits, codes.shape(0), codes.shape(1), words.shape(0), words.shape(1));
    nb::gil_scoped_release unlocked;
    pack(codes.data(), codes.shape(0), codes.shape(1), bits, offset, (uint8_t*)words.data());
}

void unpack_words(Matrix<const int32_t> words, int bits, int offset, Matrix<uint8_t> codes) {
    check_packed(bits, codes.shape(0), codes.shape(1), words.shape(0), words.shape(1));
    nb::gil_scoped_release unlocked;
    unpack((const uint8_t*)words.data(), codes.shape(0), codes.shape(1), bits, offset, codes.data());
}

// ---- training: addresses of tensors that numerics/native.py has checked ---------------------------------------------

constexpr int64_t WEIGHTS_A_THREAD = 1 << 15;  // that are worth a thread

// Calls work(first, last) on pieces of the rows, on torch's team.
template <class Work>
void for_rows(const Fake& f, const Work& work) {
    struct Shared {
        const Work& work;
        int64_t rows;
    } shared{work, f.n};
    const int64_t worth = f.n * f.k / WEIGHTS_A_THREAD + 1;
    run_team(int(worth < team_size() ? worth : team_size()), [](void* context, Member me) {
        const Shared& s = *(const Shared*)context;
        s.work(s.rows * me.index / me.count, s.rows * (me.index + 1) / me.count);
    }, &shared);
}

Fake fake_of(uintptr_t w, int type, const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes, uintptr_t scale,
             uintptr_t zero, const Levels& levels) {
    const auto [n, k, rows, columns] = sizes;
    require(type >= 0 && type <= 2, "no such type");
    require(n >= 0 && k >= 0 && rows > 0 && columns > 0 && n % rows == 0 && k % columns == 0, "groups do not fit");
    return {(const void*)w, Float(type), n, k, rows, columns, (const float*)scale, (const float*)zero, levels};
}

// w [N, K] rounded to its grid, to out [N, K]. sizes: N, K, rows and columns of a group; scale and zero: float32, one
// for each group, zero 0 for none.
void fake(uintptr_t w, int type, const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes, uintptr_t scale,
          uintptr_t zero, const Levels& levels, uintptr_t out, int out_type, const std::string& isa) {
    const Fake f = fake_of(w, type, sizes, scale, zero, levels);
    require(out_type >= 0 && out_type <= 2, "no such type");
    const Quantizers& q = quantizers_for(isa);
    nb::gil_scoped_release unlocked;
    for_rows(f, [&](int64_t first, int64_t last) { q.fake(f, first, last, (void*)out, Float(out_type)); });
}

// Sums of float64 [n, across] over rows of a group, in their order, to float32 [n / rows, across].
void add_rows(const Fake& f, const double* partial, float* out) {
    for (int64_t group = 0; group < f.n / f.rows * f.across(); group++) {
        double total = 0;
        for (int64_t row = 0; row < f.rows; row++) {
            total += partial[(group / f.across() * f.rows + row) * f.across() + group % f.across()];
        }
        out[group] = float(total);
    }
}

// What follows from grad [N, K], as fake.h tells: by_weight [N, K], by_scale and by_zero for each group, rounded [N, K].
// Address 0: not wanted. by_weight may be grad; by_scale and by_zero get sums without factors.
void fake_gradients(uintptr_t grad, int grad_type, uintptr_t w, int type,
                    const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes, uintptr_t scale, uintptr_t zero,
                    const Levels& levels, bool cells, uintptr_t by_weight, uintptr_t by_scale, uintptr_t by_zero,
                    uintptr_t rounded, int rounded_type, const std::string& isa) {
    const Fake f = fake_of(w, type, sizes, scale, zero, levels);
    require(grad_type >= 0 && grad_type <= 2 && rounded_type >= 0 && rounded_type <= 2, "no such type");
    const Quantizers& q = quantizers_for(isa);
    nb::gil_scoped_release unlocked;
    const size_t count = size_t(f.n * f.across());
    const std::unique_ptr<double[]> scales(by_scale ? new double[count] : nullptr);
    const std::unique_ptr<double[]> zeros(by_zero ? new double[count] : nullptr);
    const Slopes slopes{(const void*)grad, Float(grad_type), cells, (float*)by_weight, scales.get(), zeros.get(),
                        (void*)rounded, Float(rounded_type)};
    for_rows(f, [&](int64_t first, int64_t last) { q.fake_gradients(f, slopes, first, last); });
    if (by_scale) add_rows(f, scales.get(), (float*)by_scale);
    if (by_zero) add_rows(f, zeros.get(), (float*)by_zero);
}

// ---- kernels --------------------------------------------------------------------------------------------------------

const Engine& engine(int index) {
    require(index >= 0 && index < engines().count, "no such engine");
    return engines().first[index];
}

// Addresses come as integers: a call costs less than a microsecond, and kernels/multiply.py and attention.py have checked
// the tensors behind them.
void* address(nb::handle h) { return (void*)nb::cast<uintptr_t>(h); }

struct Bound {
    Weights weights;
};

// Addresses of packed tensors, and what they hold: kernels/multiply.py has checked them.
void bind(Bound* self, uintptr_t codes, uintptr_t scale, uintptr_t zero, int scale_type, int64_t n, int64_t k,
          int64_t group, int bits, int offset, bool half) {
    require(codes && scale && n > 0 && k > 0 && bits >= TRITS && bits <= 8, "not a matrix of 2 to 8 bits, or trits");
    require(bits != TRITS || (!zero && !half), "trits have neither zeros nor half levels");
    require(group >= 0 && group % TILE == 0 && (group == 0 || k % group == 0), "groups are multiples of 32");
    require(scale_type >= 0 && scale_type <= 2, "no such type");
    new (self) Bound{{(const uint8_t*)codes, (const void*)scale, (const uint8_t*)zero, n, k, group, Float(scale_type),
                      bits, offset, half}};
}

constexpr int MOST_PRODUCTS = 16;

// y = x W^T + bias for each product; x [m, K] and y [m, N] in `type`, activations as in kernel.h.
// scale: address of the float that a code of x counts for where activations are fixed, else 0.
// products: for each (matrix, address of its bias or 0, of y, whether GELU follows).
void linear(int index, uintptr_t x, int type, int64_t m, int activations, uintptr_t scale, const nb::list& products) {
    Product all[MOST_PRODUCTS];
    const int count = int(products.size());
    require(count >= 1 && count <= MOST_PRODUCTS, "1 to 16 matrices share an input");
    for (int i = 0; i < count; i++) {
        const nb::tuple t = nb::cast<nb::tuple>(products[i]);
        require(t.size() == 4, "a product has four parts");
        all[i] = {nb::cast<const Bound&>(t[0]).weights, address(t[1]), address(t[2]), nb::cast<bool>(t[3])};
        require(all[i].y && all[i].weights.k == all[0].weights.k, "products share K and have somewhere to go");
        require((all[i].weights.bits == TRITS) == (all[0].weights.bits == TRITS), "trits share no input with other codes");
    }
    require(x && m >= 0 && type >= 0 && type <= 2 && activations >= 0 && activations <= 3, "not an input");
    const bool given = Activations(activations) == Activations::fixed;
    require(given == (scale != 0), "fixed activations have a scale, others find theirs");
    const float fixed = given ? *(const float*)scale : 0.0f;
    require(!given || (fixed > 0 && std::isfinite(fixed)), "the scale of activations is finite and above 0");
    const Engine& e = engine(index);
    nb::gil_scoped_release unlocked;
    e.linear({(const void*)x, Float(type), m, Activations(activations), fixed, all, count, team_size()});
}

// Address and steps (batch, head, row) of a tensor.
using Place = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Strided strided(const Place& p) {
    return {(const void*)std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p)};
}

// y [batch, queries, heads, value_width] = softmax(q k^T * scale) v, as kernel.h tells.
// mask: address 0 for none. sizes: batch, heads, kv_heads, queries, keys, width, value_width.
void attention(int index, int type, const Place& q, const Place& k, const Place& v, const Place& mask, uintptr_t y,
               const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, bool causal,
               float scale) {
    const auto [batch, heads, kv_heads, queries, keys, width, value_width] = sizes;
    require(type >= 0 && type <= 2 && std::get<0>(q) && std::get<0>(k) && std::get<0>(v) && y, "not tensors");
    require(batch > 0 && queries > 0 && keys > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "not heads");
    require(width > 0 && width % PANEL == 0 && value_width > 0 && value_width % PANEL == 0, "widths are multiples of 16");
    const Engine& e = engine(index);
    nb::gil_scoped_release unlocked;
    const Attention call{strided(q), strided(k), strided(v), strided(mask), (void*)y, Float(type), batch, heads, kv_heads,
                         queries, keys, width, value_width, causal, scale};
    e.attention(&call, 1, team_size());
}

// Whether each (dictionary, key, value) still holds, by identity, a key that is missing counting as None; each (dictionary,
// None, number of entries); and each (object, None, class).
bool unchanged(const nb::tuple& watched) {
    PyObject* const all = watched.ptr();
    const Py_ssize_t count = PyTuple_GET_SIZE(all);
    for (Py_ssize_t i = 0; i + 2 < count; i += 3) {
        PyObject *const place = PyTuple_GET_ITEM(all, i), *const key = PyTuple_GET_ITEM(all, i + 1);
        PyObject* const want = PyTuple_GET_ITEM(all, i + 2);
        PyObject* have = (PyObject*)Py_TYPE(place);
        if (PyDict_Check(place)) {
            if (key == Py_None) {
                if (PyDict_Size(place) != PyLong_AsSsize_t(want)) return false;
                continue;
            }
            have = PyDict_GetItemWithError(place, key);  // borrowed
            if (!have && PyErr_Occurred()) throw nb::python_error();
            if (!have) have = Py_None;
        }
        if (have != want) return false;
    }
    return true;
}

// A plan of steps, as plan.h tells. Addresses are of float32 tensors that kernels/plan.py has checked and keeps; buffers
// are told by their numbers, and their widths are checked here.
struct Planned {
    Plan plan;

    Planned(int index, const std::vector<int64_t>& widths, int64_t pad) {
        for (const int64_t width : widths) require(width > 0, "buffers have columns");
        plan = {&engine(index), widths, {pad >= 0, pad}, {}, 0};
    }
    int64_t width(int buffer) const {
        require(buffer >= 0 && buffer < int(plan.widths.size()), "no such buffer");
        return plan.widths[buffer];
    }
    // tables: for each (a packed matrix, or None; address of its floats [rows, width]; rows; what tells its row).
    void look_up(const nb::list& tables, int y) {
        LookUp step{{}, y};
        for (const nb::handle h : tables) {
            const nb::tuple t = nb::cast<nb::tuple>(h);
            const int64_t rows = nb::cast<int64_t>(t[2]);
            const int index = nb::cast<int>(t[3]);
            require(rows > 0 && index >= 0 && index < INDEXES, "not a table");
            step.tables.push_back({Index(index), rows, (const float*)address(t[1]), {}});
            LookUp::Table& table = step.tables.back();
            require((table.floats == nullptr) != t[0].is_none(), "a table is packed, or floats");
            if (table.floats) continue;
            table.packed = nb::cast<const Bound&>(t[0]).weights;
            require(table.packed.n == rows && table.packed.k == width(y), "tables are as wide as their sum");
        }
        require(!step.tables.empty() && width(y) > 0, "one table at least");
        plan.steps.push_back(step);
    }
    void norm(int x, int more, int y, uintptr_t weight, uintptr_t bias, float epsilon, bool centered) {
        require(weight && width(x) == width(y) && (more < 0 || width(more) == width(y)), "a norm keeps the width");
        plan.steps.push_back(NormStep{x, more, y, (const float*)weight, (const float*)bias, epsilon, centered});
    }
    // parts: for each (matrix, address of its bias or 0, buffer, whether GELU follows).
    void product(int index, int x, int activations, uintptr_t scale, const nb::list& parts) {
        ProductStep step{&engine(index), x, Activations(activations), (const float*)scale, {}};
        require(activations >= 0 && activations <= 3, "not an input");
        require((Activations(activations) == Activations::fixed) == (scale != 0), "fixed activations have a scale");
        for (const nb::handle h : parts) {
            const nb::tuple t = nb::cast<nb::tuple>(h);
            const Weights& w = nb::cast<const Bound&>(t[0]).weights;
            step.parts.push_back({w, (const float*)address(t[1]), nb::cast<int>(t[2]), nb::cast<bool>(t[3])});
            require(w.k == width(x) && w.n == width(step.parts.back().y), "a product fits its buffers");
            require((w.bits == TRITS) == (step.parts[0].weights.bits == TRITS), "trits share no input with other codes");
        }
        require(!step.parts.empty() && step.parts.size() <= MOST_PRODUCTS, "1 to 16 matrices share an input");
        plan.steps.push_back(step);
    }
    void attention(int q, int k, int v, int y, int64_t heads, int64_t kv_heads, float scale) {
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "not heads");
        require(width(q) % (heads * PANEL) == 0 && width(k) % kv_heads == 0 && width(v) % (kv_heads * PANEL) == 0 &&
                    width(k) / kv_heads == width(q) / heads && width(y) == width(v) / kv_heads * heads,
                "heads do not fit their buffers");
        plan.steps.push_back(AttentionStep{q, k, v, y, heads, kv_heads, scale});
    }
    void add(int x, int more, int y) {
        require(width(x) == width(y) && width(more) == width(y), "a sum keeps the width");
        plan.steps.push_back(AddStep{x, more, y});
    }
    // y [batch, length, width of the buffer `result`]; ids, mask, types and positions: addresses of int64
    // [batch, length], 0 for none but of ids.
    void run(uintptr_t ids, uintptr_t mask, uintptr_t types, uintptr_t positions, int64_t batch, int64_t length,
             int result, uintptr_t y) {
        require(ids && y && batch > 0 && length > 0, "an empty batch");
        require(width(result) > 0 && !plan.steps.empty(), "an empty plan");
        plan.result = result;
        const Batch b{(const int64_t*)ids, (const int64_t*)mask, (const int64_t*)types, (const int64_t*)positions,
                      batch, length};
        nb::gil_scoped_release unlocked;
        run_plan(plan, b, (float*)y, team_size());
    }
};

// out [count, K]: the rows `which` [count] of a matrix, decoded.
void rows(const Bound& matrix, Vector<const int64_t> which, Matrix<float> out) {
    const Weights& w = matrix.weights;
    require(out.shape(0) == which.shape(0) && int64_t(out.shape(1)) == w.k, "one row of K floats for each index");
    for (size_t i = 0; i < which.shape(0); i++) {
        require(which(i) >= 0 && which(i) < w.n, "row index out of range");
    }
    nb::gil_scoped_release unlocked;
    decode_rows(w, which.data(), int64_t(which.shape(0)), out.data());
}

using Tiles = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void check_panels(int bits, size_t n, size_t k, const Tiles& tiles) {
    require(bits >= TRITS && bits <= 8, "2 to 8 bits, or trits");
    Weights w{};
    w.n = n, w.k = k, w.bits = bits;
    require(int64_t(tiles.shape(0)) == w.bundles() && int64_t(tiles.shape(1)) == w.tiles() &&
                int64_t(tiles.shape(2)) == w.tile_bytes(),
            "codes and tiles do not belong together");
}

// Tiles [bundles, tiles of a panel, bytes of a tile] as codes [N, K]. layout.h.
void from_panels(Tiles tiles, int bits, int offset, Matrix<uint8_t> codes) {
    check_panels(bits, codes.shape(0), codes.shape(1), tiles);
    nb::gil_scoped_release unlocked;
    unpack_panels(tiles.data(), codes.shape(0), codes.shape(1), bits, offset, codes.data());
}

// Values for each row and group, [rows, groups * size] bytes, and their lanes [panels, groups, 16 * size].
struct Lanes {
    Matrix<const uint8_t> values;
    Tiles lanes;
    int size, add;
};

// A matrix on its way from a folder to panels: what it is made from and what it fills, which live as long as it does.
struct Packing {
    nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> data;
    Tiles tiles;
    StoredCodes codes;
    int bits;
    std::vector<Lanes> lanes;
    std::atomic<bool> good{true};

    Packing(Matrix<const uint8_t> data_, int order, int64_t n, int64_t k, int stored_bits, int offset, int most,
            int bits_, Tiles tiles_)
        : data(data_), tiles(tiles_), codes{data_.data(), Order(order), n, k, stored_bits, offset, most}, bits(bits_) {
        require(order >= 0 && order <= 2, "no such order of codes");
        require(n > 0 && k > 0 && k < int64_t(1) << 40, "not a matrix");
        require(stored_bits >= 2 && stored_bits <= 8 && (bits == stored_bits || bits == TRITS), "2 to 8 bits, or trits");
        require(codes.order == Order::stream || codes.order == Order::bytes || (n % 4 == 0 && stored_bits == 2),
                "quarters have rows in fours, of two bits");
        require(bits != TRITS || most <= 2, "trits are 0, 1 and 2");
        require(int64_t(data.shape(0)) == codes.rows() && int64_t(data.shape(1)) == codes.stride(),
                "codes are not as long as their matrix");
        check_panels(bits, size_t(n), size_t(k), tiles);
    }

    // values [N or 1, groups * size] -> lanes [panels, groups, 16 * size], with `add` more where size is 1.
    void add_lanes(Matrix<const uint8_t> values, int size, int add, Tiles out) {
        require(size == 1 || size == 2 || size == 4, "lanes of 1, 2 or 4 bytes");
        require(values.shape(0) == 1 || int64_t(values.shape(0)) == codes.n, "values for each row, or for all");
        require(int64_t(out.shape(0)) == (codes.n + PANEL - 1) / PANEL && int(out.shape(2)) == PANEL * size &&
                    out.shape(1) * size == values.shape(1),
                "values and lanes do not belong together");
        lanes.push_back({values, out, size, add});
    }

    // Bundles first..last, and the lanes of their panels.
    void run(int64_t first, int64_t last) {
        if (!pack_stored(codes, bits, first, last, tiles.data())) good = false;
        const int64_t panels = bits == TRITS ? BUNDLE : 1, all = (codes.n + PANEL - 1) / PANEL;
        for (const Lanes& l : lanes) {
            to_lanes(l.values.data(), int64_t(l.values.shape(0)), int64_t(l.lanes.shape(1)), l.size, l.add, codes.n,
                     first * panels, std::min(last * panels, all), l.lanes.data());
        }
    }
};

constexpr int64_t PIECE_BYTES = 1 << 20;  // of tiles that a thread takes at once: .2 ms

// Fills all of them, on `threads` threads of its own: torch's team belongs to the thread that computes, and this runs
// beside it. -> for each whether its codes are levels.
std::vector<bool> pack_all(const std::vector<Packing*>& packings, int threads) {
    struct Piece {
        Packing* packing;
        int64_t first, last;
    };
    std::vector<Piece> pieces;
    for (Packing* p : packings) {
        const int64_t bundles = int64_t(p->tiles.shape(0)), bytes = int64_t(p->tiles.shape(1) * p->tiles.shape(2));
        const int64_t step = std::max<int64_t>(1, PIECE_BYTES / bytes);
        for (int64_t at = 0; at < bundles; at += step) pieces.push_back({p, at, std::min(at + step, bundles)});
    }
    {
        nb::gil_scoped_release unlocked;
        std::atomic<size_t> next{0};
        const auto work = [&] {
            for (size_t i; (i = next++) < pieces.size();) pieces[i].packing->run(pieces[i].first, pieces[i].last);
        };
        std::vector<std::thread> others;
        for (int i = 1; i < threads && size_t(i) < pieces.size(); i++) others.emplace_back(work);
        work();
        for (std::thread& other : others) other.join();
    }
    std::vector<bool> good;
    for (const Packing* p : packings) good.push_back(p->good);
    return good;
}

// Make huge pages of the small ones of these ranges (address, bytes), one after the other, each from one huge page's
// beginning to another's end; in a thread of its own that nobody waits for (Linux 6.1; else nothing happens). It keeps
// nothing alive: of memory that is gone meanwhile, or is another's, no byte is changed.
void merge_pages(const std::vector<std::pair<uintptr_t, size_t>>& ranges) {
#if defined(__linux__)
    std::thread([ranges] {
        constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which glibc's headers may not know yet
        for (const auto& [address, bytes] : ranges) madvise((void*)address, bytes, COLLAPSE);
    }).detach();
#endif
}

// A tensor that holds anything; its memory goes to the next one when it and all that share it are gone.
nb::ndarray<nb::pytorch> pooled(const std::vector<size_t>& shape, int type) {
    require(0 <= type && type <= int(Float::bf16), "results are float32, float16 or bfloat16");
    const Float as = Float(type);
    int64_t count = 1;
    for (const size_t size : shape) {
        require(size <= size_t(INT64_MAX / 8) && (size == 0 || count <= INT64_MAX / 8 / int64_t(size)), "too large");
        count *= int64_t(size);
    }
    void* memory = take(count * size_of(as));
    if (!memory) throw std::bad_alloc();
    const nb::capsule owner(memory, [](void* p) noexcept { give_back(p); });
    const auto code = as == Float::bf16 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
    const nb::dlpack::dtype dtype{uint8_t(code), uint8_t(8 * size_of(as)), 1};
    return nb::ndarray<nb::pytorch>(memory, shape.size(), shape.data(), owner, nullptr, dtype);
}

// Operations of `rounds` rounds of dot products, or of multiply-adds of floats, on each of `threads` threads.
int64_t spin(int index, int64_t rounds, int threads, bool floats) {
    struct Work {
        const Engine* engine;
        int64_t rounds, done;
        bool floats;
    } work{&engine(index), rounds, 0, floats};
    nb::gil_scoped_release unlocked;
    run_team(threads, [](void* context, Member) {
        Work& w = *(Work*)context;
        __atomic_fetch_add(&w.done, w.engine->spin(w.rounds, w.floats), __ATOMIC_RELAXED);
    }, &work);
    return work.done;
}

// Reads all of `data` once, in pieces shared among threads.
void read_all(int index, Vector<const uint8_t> data, int threads) {
    struct Work {
        const Engine* engine;
        const uint8_t* data;
        int64_t bytes, next, piece, checksum;
    } work{&engine(index), data.data(), int64_t(data.shape(0)), 0, 1 << 20, 0};
    nb::gil_scoped_release unlocked;
    run_team(threads, [](void* context, Member) {
        Work& w = *(Work*)context;
        int64_t checksum = 0;
        for (int64_t at; (at = __atomic_fetch_add(&w.next, w.piece, __ATOMIC_RELAXED)) < w.bytes;) {
            checksum ^= w.engine->read(w.data + at, w.bytes - at < w.piece ? w.bytes - at : w.piece);
        }
        __atomic_fetch_xor(&w.checksum, checksum, __ATOMIC_RELAXED);
    }, &work);
}

}  // namespace
}  // namespace spicerack

NB_MODULE(_native, m) {
    using namespace spicerack;
    nb::set_leak_warnings(false);  // layers that live until the interpreter ends are no leak
    nb::class_<Bound>(m, "Matrix")
        .def("__init__", &bind, "codes"_a, "scale"_a, "zero"_a, "scale_type"_a, "n"_a, "k"_a, "group"_a, "bits"_a,
             "offset"_a, "half"_a);
    nb::class_<Levels>(m, "Levels").def(nb::init<int, int, bool, bool>(), "lo"_a, "hi"_a, "half"_a, "zero"_a);
    m.def("search", &spicerack::search, "w"_a, "levels"_a, "scale_type"_a, "coarse"_a, "shifts"_a, "fine"_a, "refinements"_a,
          "importance"_a.none(), "scale"_a, "zero"_a, "codes"_a, "isa"_a = "");
    m.def("encode", &spicerack::encode, "w"_a, "levels"_a, "scale"_a, "zero"_a.none(), "codes"_a, "isa"_a = "");
    m.def("judge", &spicerack::judge, "pieces"_a, "levels"_a, "scale"_a, "zero"_a, "out"_a, "isa"_a = "");
    m.def("compare", &spicerack::compare, "w"_a, "levels"_a, "scale"_a, "zero"_a.none(), "codes"_a);
    m.def("pack", &pack_codes, "codes"_a, "bits"_a, "offset"_a, "words"_a);
    m.def("unpack", &unpack_words, "words"_a, "bits"_a, "offset"_a, "codes"_a);
    m.def("fake", &spicerack::fake, "w"_a, "type"_a, "sizes"_a, "scale"_a, "zero"_a, "levels"_a, "out"_a, "out_type"_a,
          "isa"_a = "");
    m.def("fake_gradients", &spicerack::fake_gradients, "grad"_a, "grad_type"_a, "w"_a, "type"_a, "sizes"_a, "scale"_a,
          "zero"_a, "levels"_a, "cells"_a, "by_weight"_a, "by_scale"_a, "by_zero"_a,
          "rounded"_a, "rounded_type"_a, "isa"_a = "");
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Quantizers& q : quantizers()) names.push_back(q.isa);
        return names;
    });
    m.def("engines", [] {
        std::vector<std::string> names;
        for (const Engine& e : engines()) names.push_back(e.isa);
        return names;
    });
    m.def("linear", &spicerack::linear, "engine"_a, "x"_a, "type"_a, "m"_a, "activations"_a, "scale"_a,
          "products"_a);
    m.def("attention", &spicerack::attention, "engine"_a, "type"_a, "q"_a, "k"_a, "v"_a, "mask"_a, "y"_a, "sizes"_a,
          "causal"_a, "scale"_a);
    nb::class_<Planned>(m, "Plan")
        .def(nb::init<int, const std::vector<int64_t>&, int64_t>(), "engine"_a, "widths"_a, "pad"_a)
        .def("look_up", &Planned::look_up, "tables"_a, "y"_a)
        .def("norm", &Planned::norm, "x"_a, "more"_a, "y"_a, "weight"_a, "bias"_a, "epsilon"_a, "centered"_a)
        .def("product", &Planned::product, "engine"_a, "x"_a, "activations"_a, "scale"_a, "parts"_a)
        .def("attention", &Planned::attention, "q"_a, "k"_a, "v"_a, "y"_a, "heads"_a, "kv_heads"_a, "scale"_a)
        .def("add", &Planned::add, "x"_a, "more"_a, "y"_a)
        .def("run", &Planned::run, "ids"_a, "mask"_a, "types"_a, "positions"_a, "batch"_a, "length"_a, "result"_a, "y"_a);
    m.def("unchanged", &unchanged, "watched"_a);
    m.def("rows", &spicerack::rows, "matrix"_a, "which"_a, "out"_a);
    m.def("from_panels", &from_panels, "tiles"_a, "bits"_a, "offset"_a, "codes"_a);
    nb::class_<Packing>(m, "Packing")
        .def(nb::init<Matrix<const uint8_t>, int, int64_t, int64_t, int, int, int, int, Tiles>(), "data"_a, "order"_a, "n"_a,
             "k"_a, "stored_bits"_a, "offset"_a, "most"_a, "bits"_a, "tiles"_a)
        .def("add_lanes", &Packing::add_lanes, "values"_a, "size"_a, "add"_a, "lanes"_a);
    m.def("merge_pages", &merge_pages, "ranges"_a);
    m.def("pack_all", &pack_all, "packings"_a, "threads"_a);
    m.def("pooled", &pooled, "shape"_a, "type"_a);
    m.def("release", [] {
        nb::gil_scoped_release unlocked;
        return release() + release_arenas();
    });
    m.def("spin", &spin, "engine"_a, "rounds"_a, "threads"_a, "floats"_a);
    m.def("read_all", &read_all, "engine"_a, "data"_a, "threads"_a);
    m.def("team_size", &team_size);
}
