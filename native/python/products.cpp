// Products, attention, and plans of them.
#include "../kernels/plan.h"
#include "../kernels/team.h"
#include "arrays.h"

#include <cmath>
#include <memory>

namespace spicerack {
namespace {

// Addresses come as integers: a call costs less than a microsecond, and kernels/multiply.py and attention.py have checked
// the tensors behind them.
void* address(nb::handle h) { return (void*)nb::cast<uintptr_t>(h); }

// Addresses of packed tensors, and what they hold: kernels/multiply.py has checked them.
// scale_type: of ScaleType; outer_type: of Float, where `outer` is not 0. table: empty, or 16 bytes that codes are places
// in.
void bind(Bound* self, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t outer, int scale_type, int outer_type,
          int64_t n, int64_t k, int64_t group, int bits, int offset, bool half, bool minima, int64_t block,
          const std::vector<int>& table) {
    require(codes && scale && n > 0 && k > 0 && bits >= TRITS && bits <= 8, "not a matrix of 2 to 8 bits, or trits");
    require(group >= 0 && (group % TILE == 0 || group == TILE / 2) && (group == 0 || k % group == 0),
            "groups have 16 columns, or a multiple of 32");
    require(group % TILE == 0 || k % TILE == 0, "groups of 16 make whole tiles");
    require(scale_type >= 0 && scale_type <= int(ScaleType::e4m3) && outer_type >= 0 && outer_type <= 2, "no such type");
    require((scale_type >= int(ScaleType::int8)) == (outer != 0), "bytes have outer scales, and floats have none");
    require(block >= 0 && (block == 0 || (outer && group && block % group == 0 && block % TILE == 0 && k % block == 0)),
            "blocks are whole groups, and multiples of 32");
    require(table.empty() || (table.size() == TABLE && bits == 4), "a table has 16 bytes, and codes of 4 bits");
    Weights w{(const uint8_t*)codes, (const void*)scale, (const uint8_t*)zero, n, k, group, ScaleType(scale_type), bits,
              offset, half, minima, (const void*)outer, block, Float(outer_type)};
    require(!w.in_blocks() || (bits != TRITS && !zero && !half), "blocks have neither trits, zeros nor half levels");
    require(bits != TRITS || (!zero && !half), "trits have neither zeros nor half levels");
    for (size_t i = 0; i < table.size(); i++) w.table[i] = uint8_t(table[i]);
    if (!table.empty()) w.bits = LOOKED_UP;
    new (self) Bound{w};
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

// Address, type and number of values of a tensor; address 0 for none.
using Tensor = std::tuple<uintptr_t, int, int64_t>;

// Number of a buffer, its first column and how many.
using Slice = std::tuple<int, int64_t, int64_t>;

// A packed matrix, or None; address and type of its floats [rows, width]; rows.
using Rows = std::tuple<nb::object, uintptr_t, int, int64_t>;

Float float_type(int type) {
    require(type >= 0 && type <= 2, "no such type");
    return Float(type);
}

// A plan of steps, as plan.h tells. Addresses are of tensors that kernels/plan.py has checked and keeps; buffers are told
// by their numbers, and their widths are checked here.
struct Planned {
    Plan plan;
    int64_t widened = 0;
    bool takes_ids = false, takes_states = false;

    Planned(int index, int type, const std::vector<int64_t>& widths, int64_t pad) {
        for (const int64_t width : widths) require(width > 0, "buffers have columns");
        plan = {&engine(index), float_type(type), widths, {pad >= 0, pad}, {}, 0, {}, {}, false};
        takes_ids = pad >= 0;
    }
    int64_t width(int buffer) const {
        require(buffer >= 0 && buffer < int(plan.widths.size()), "no such buffer");
        return plan.widths[buffer];
    }
    Columns columns(const Slice& slice) const {
        const auto [buffer, first, count] = slice;
        require(first >= 0 && count > 0 && first + count <= width(buffer), "no such columns");
        return {buffer, first, count};
    }
    Parameter floats(const Tensor& tensor, int64_t count) {
        Parameter f{(const void*)std::get<0>(tensor), float_type(std::get<1>(tensor)), count, 0};
        if (!f.data) return f;
        require(std::get<2>(tensor) == count, "a tensor fits its buffer");
        if (f.type == Float::f32) return f;
        f.place = widened;
        widened += count;
        plan.widened.push_back(f);
        return f;
    }
    Table table(const Rows& given, int64_t width) const {
        const auto& [packed, at, type, rows] = given;
        Table table{rows, (const void*)at, float_type(type), {}};
        require(rows > 0 && (at == 0) != packed.is_none(), "a table has rows, and is packed, or floats");
        if (at) return table;
        table.packed = nb::cast<const Bound&>(packed).weights;
        require(table.packed.n == rows && table.packed.k == width, "tables are as wide as what is made of them");
        return table;
    }
    // parts: for each a table, and what tells its row.
    void look_up(const std::vector<std::tuple<Rows, int>>& parts, int y) {
        LookUp step{{}, y};
        for (const auto& [rows, index] : parts) {
            require(index >= 0 && index < INDEXES, "not an index");
            takes_ids |= Index(index) == Index::ids;
            step.parts.push_back({Index(index), table(rows, width(y))});
        }
        require(!step.parts.empty() && width(y) > 0, "one table at least");
        plan.steps.push_back(step);
    }
    void take(int y) {
        require(width(y) > 0, "a buffer");
        takes_states = true;
        plan.steps.push_back(TakeStep{y});
    }
    void norm(int x, int more, int y, const Tensor& weight, const Tensor& bias, float epsilon, bool centered) {
        require(std::get<0>(weight) && width(x) == width(y) && (more < 0 || width(more) == width(y)),
                "a norm keeps the width");
        const Parameter w = floats(weight, width(y)), b = floats(bias, width(y));
        plan.steps.push_back(NormStep{x, more, y, w, b, epsilon, centered});
    }
    // parts: for each (matrix, its bias, buffer, whether GELU follows).
    void product(int index, int x, int activations, uintptr_t scale, const nb::list& parts) {
        ProductStep step{&engine(index), x, Activations(activations), (const float*)scale, {}};
        require(activations >= 0 && activations <= 3, "not an input");
        require((Activations(activations) == Activations::fixed) == (scale != 0), "fixed activations have a scale");
        for (const nb::handle h : parts) {
            const nb::tuple t = nb::cast<nb::tuple>(h);
            const Weights& w = nb::cast<const Bound&>(t[0]).weights;
            const int y = nb::cast<int>(t[2]);
            require(w.k == width(x) && w.n == width(y), "a product fits its buffers");
            step.parts.push_back({w, floats(nb::cast<Tensor>(t[1]), w.n), y, nb::cast<bool>(t[3])});
            require((w.bits == TRITS) == (step.parts[0].weights.bits == TRITS), "trits share no input with other codes");
        }
        require(!step.parts.empty() && step.parts.size() <= MOST_PRODUCTS, "1 to 16 matrices share an input");
        plan.steps.push_back(step);
    }
    void dense(int x, const Tensor& weights, const Tensor& bias, int y, bool gelu) {
        require(std::get<0>(weights) && std::get<2>(weights) == width(x) * width(y), "a product fits its buffers");
        const Parameter b = floats(bias, width(y));
        plan.steps.push_back(DenseStep{x, y, (const void*)std::get<0>(weights), float_type(std::get<1>(weights)), b, gelu});
    }
    // window: below 0 for none; bias: what `bias` returned, or -1.
    void attention(const Slice& q, const Slice& k, const Slice& v, int y, int64_t heads, int64_t kv_heads, float scale,
                   int64_t window, int bias) {
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "not heads");
        const AttentionStep step{columns(q), columns(k), columns(v), y, heads, kv_heads, scale, window, bias};
        require(step.q.width % (heads * PANEL) == 0 && step.k.width % kv_heads == 0 &&
                    step.v.width % (kv_heads * PANEL) == 0 && step.k.width / kv_heads == step.q.width / heads &&
                    width(y) == step.v.width / kv_heads * heads,
                "heads do not fit their buffers");
        require(bias < int(plan.biases.size()) && (bias < 0 || plan.biases[bias].heads == heads), "no such bias");
        plan.measures |= window >= 0 || bias >= 0;
        plan.steps.push_back(step);
    }
    // buckets: the table's row for each distance -reach .. reach -> the number of this bias.
    int bias(const Rows& rows, int64_t heads, const std::vector<int64_t>& buckets) {
        require(heads > 0 && buckets.size() % 2 == 1, "distances reach as far to both sides");
        const Bias bias{table(rows, heads), heads, buckets};
        for (const int64_t bucket : buckets) require(bucket >= 0 && bucket < bias.table.rows, "no such bucket");
        plan.biases.push_back(bias);
        return int(plan.biases.size()) - 1;
    }
    void turns(const Tensor& frequencies, float scale, int y) {
        require(std::get<0>(frequencies) && width(y) % 2 == 0, "not frequencies");
        const Parameter f = floats(frequencies, width(y) / 2);
        plan.steps.push_back(TurnStep{f, scale, y});
    }
    void rotate(const Slice& x, int64_t heads, int turns) {
        const RotateStep step{columns(x), heads, turns};
        require(heads > 0 && step.x.width % heads == 0 && width(turns) <= step.x.width / heads, "not heads");
        plan.steps.push_back(step);
    }
    // more: None for none.
    void gate(const Slice& x, const std::optional<Slice>& more, int y, int function) {
        const GateStep step{columns(x), more ? columns(*more) : Columns{-1, 0, width(y)}, y, Function(function)};
        require(function >= 0 && function < FUNCTIONS, "no such function");
        require(step.x.width == width(y) && step.more.width == width(y), "a gate keeps the width");
        require(step.x.buffer != y || step.x.width == width(step.x.buffer), "in place only whole buffers");
        require(step.more.buffer != y || step.more.width == width(step.more.buffer), "in place only whole buffers");
        plan.steps.push_back(step);
    }
    void add(int x, int more, int y, const Tensor& factor) {
        require(width(x) == width(y) && width(more) == width(y), "a sum keeps the width");
        const Parameter f = floats(factor, width(y));
        plan.steps.push_back(AddStep{x, more, y, f});
    }
    // y [batch, length, width of the buffer `result`] and states in the plan's type; ids, mask, types and positions:
    // addresses of int64 [batch, length]; 0 for none. Whether y was computed, as by run_plan.
    bool run(uintptr_t ids, uintptr_t mask, uintptr_t types, uintptr_t positions, uintptr_t states, int64_t batch,
             int64_t length, int result, uintptr_t y) {
        require(y && batch > 0 && length > 0, "an empty batch");
        require((ids || !takes_ids) && (states || !takes_states), "what the plan reads is not there");
        require(width(result) > 0 && !plan.steps.empty(), "an empty plan");
        plan.result = result;
        const Batch b{(const int64_t*)ids, (const int64_t*)mask, (const int64_t*)types, (const int64_t*)positions,
                      (const void*)states, batch, length};
        nb::gil_scoped_release unlocked;
        return run_plan(plan, b, (void*)y, team_size());
    }
};

}  // namespace

void bind_products(nb::module_& m) {
    m.def("engines", [] {
        std::vector<std::string> names;
        for (const Engine& e : engines()) names.push_back(e.isa);
        return names;
    });
    nb::class_<Bound>(m, "Matrix")
        .def("__init__", &bind, "codes"_a, "scale"_a, "zero"_a, "outer"_a, "scale_type"_a, "outer_type"_a, "n"_a, "k"_a,
             "group"_a, "bits"_a, "offset"_a, "half"_a, "minima"_a, "block"_a, "table"_a);
    m.def("linear", &linear, "engine"_a, "x"_a, "type"_a, "m"_a, "activations"_a, "scale"_a,
          "products"_a);
    m.def("attention", &attention, "engine"_a, "type"_a, "q"_a, "k"_a, "v"_a, "mask"_a, "y"_a, "sizes"_a,
          "causal"_a, "scale"_a);
    nb::class_<Planned>(m, "Plan")
        .def(nb::init<int, int, const std::vector<int64_t>&, int64_t>(), "engine"_a, "type"_a, "widths"_a, "pad"_a)
        .def("look_up", &Planned::look_up, "parts"_a, "y"_a)
        .def("take", &Planned::take, "y"_a)
        .def("norm", &Planned::norm, "x"_a, "more"_a, "y"_a, "weight"_a, "bias"_a, "epsilon"_a, "centered"_a)
        .def("product", &Planned::product, "engine"_a, "x"_a, "activations"_a, "scale"_a, "parts"_a)
        .def("dense", &Planned::dense, "x"_a, "weights"_a, "bias"_a, "y"_a, "gelu"_a)
        .def("attention", &Planned::attention, "q"_a, "k"_a, "v"_a, "y"_a, "heads"_a, "kv_heads"_a, "scale"_a,
             "window"_a, "bias"_a)
        .def("bias", &Planned::bias, "table"_a, "heads"_a, "buckets"_a)
        .def("turns", &Planned::turns, "frequencies"_a, "scale"_a, "y"_a)
        .def("rotate", &Planned::rotate, "x"_a, "heads"_a, "turns"_a)
        .def("gate", &Planned::gate, "x"_a, "more"_a.none(), "y"_a, "function"_a)
        .def("add", &Planned::add, "x"_a, "more"_a, "y"_a, "factor"_a)
        .def("run", &Planned::run, "ids"_a, "mask"_a, "types"_a, "positions"_a, "states"_a, "batch"_a, "length"_a,
             "result"_a, "y"_a);
    m.def("unchanged", &unchanged, "watched"_a);
    m.def("team_size", &team_size);
}

}  // namespace spicerack
