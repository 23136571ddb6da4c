// Search, codes, bit streams, fake quantization.
#include "../kernels/team.h"
#include "../quantizers/dispatch.h"
#include "../quantizers/pack.h"
#include "../quantizers/planes.h"
#include "arrays.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace spicerack {
namespace {

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

// Levels that are listed, in rising order, with the bounds between each two.
Levels table(const std::vector<float>& values, const std::vector<float>& bounds) {
    require(values.size() > 1 && values.size() <= 16 && bounds.size() + 1 == values.size(), "2 to 16 levels");
    Levels levels{0, int(values.size()) - 1, false, false};
    levels.count = int(values.size());
    std::copy(values.begin(), values.end(), levels.values);
    std::copy(bounds.begin(), bounds.end(), levels.bounds);
    return levels;
}

// Scales [count], zeros [count] and codes [count, size] of groups w [count, size], as search.h tells -> every weight is
// finite, every scale is usable. importance: one value for each weight, or a length that repeats.
std::pair<bool, bool> search(const Floats& w, Levels levels, const std::string& scale_type,
            const std::vector<float>& coarse, const std::vector<float>& shifts, const std::vector<float>& fine, int refinements,
            float empty,
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
                                  shifts.data(), int(shifts.size()), fine.data(), int(fine.size()), refinements, empty};
    const Quantizers& q = quantizers_for(isa);
    nb::gil_scoped_release unlocked;
    const Outcome outcome =
        q.search(groups, settings, importance ? importance->data() : nullptr,
                 importance ? int64_t(importance->shape(0)) : 1, scale.data(), zero.data(), codes.data());
    return {outcome.finite, outcome.fits};
}

using ShareTuple = std::tuple<bool, int, int, std::string>;

Share share_of(const ShareTuple& given) {
    const auto& [coded, lo, hi, type] = given;
    require(!coded || (lo >= -128 && lo <= 0 && hi > 0 && hi <= 127), "integers of scales fit in a byte");
    return {coded, lo, hi, float_type(type)};
}

// Super-blocks w [count, groups * columns], as superblocks.h tells, with codes lo..hi -> every weight is finite, every
// float is usable. shape: groups, columns. scale, min: coded, lo, hi and type; without minima `has_min` is false.
std::pair<bool, bool> superblocks(const Floats& w, std::pair<int, int> levels, std::pair<int64_t, int64_t> shape,
                                  bool has_min, const ShareTuple& scale, const ShareTuple& min,
                                  const std::vector<float>& steps, const std::vector<float>& shares, int refinements,
                                  int rounds, std::optional<Vector<const float>> importance, Vector<float> d,
                                  Vector<float> e, Matrix<int8_t> p, Matrix<int8_t> r, Matrix<int8_t> codes,
                                  const std::string& isa) {
    const Groups blocks = groups_of(w);
    const auto [groups, columns] = shape;
    const size_t count = blocks.count, size = blocks.size;
    require(groups > 0 && columns > 0 && groups * columns == blocks.size, "a super-block is whole groups");
    require(levels.first <= 0 && levels.second > 0 && levels.second - levels.first <= 255, "codes fit in a byte");
    require(d.shape(0) == count && e.shape(0) == count, "two floats for each super-block");
    require(p.shape(0) == count && p.shape(1) == size_t(groups), "a scale for each group");
    require(r.shape(0) == count && r.shape(1) == size_t(groups), "a minimum for each group");
    require(codes.shape(0) == count && codes.shape(1) == size, "codes are shaped like weights");
    require(!importance || (importance->shape(0) > 0 && importance->shape(0) % size == 0 &&
                            count * size % importance->shape(0) == 0),
            "importance must repeat over whole super-blocks");
    const SuperSettings settings{levels.first, levels.second, groups, columns, has_min, !steps.empty(),
                                 share_of(scale), share_of(min), steps.data(), int(steps.size()), shares.data(),
                                 int(shares.size()), refinements, rounds};
    require((settings.scale.coded && (!has_min || settings.min.coded)) || groups == 1, "a float for each group");
    const Quantizers& q = quantizers_for(isa);
    nb::gil_scoped_release unlocked;
    const Outcome outcome = q.superblocks(blocks, settings, importance ? importance->data() : nullptr,
                                          importance ? int64_t(importance->shape(0)) : 1,
                                          {d.data(), e.data(), p.data(), r.data(), codes.data()});
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
    require(!levels.count, "levels are integers");
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
    require(!levels.count, "levels are integers");
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

using PlaneTuple = std::tuple<int, int, int, int64_t>;

// Codes [rows, columns] of `bits` in words, and in blocks as planes.h tells; the block: codes, bytes.
struct PlanesOf {
    std::vector<Plane> each;
    Planes planes;
    int64_t rows, columns;

    PlanesOf(size_t word_rows, size_t words, int bits, size_t raw_rows, size_t raw_bytes,
             const std::pair<int64_t, int64_t>& block, const std::vector<PlaneTuple>& given) {
        const auto [count, nbytes] = block;
        require(count > 0 && count <= Planes::MAX_CODES && count % 32 == 0 && nbytes > 0, "a block of 32 to 256 codes");
        for (const auto& [width, stride, shift, offset] : given) {
            require(width == 1 || width == 2 || width == 4 || width == 8, "planes of 1, 2, 4 or 8 bits");
            require(stride == 1 || (stride > 0 && stride % 8 == 0 && count % (stride * (8 / width)) == 0),
                    "runs do not fit in the block");
            require(offset >= 0 && offset + count * width / 8 <= nbytes && shift >= 0 && shift < 8, "beyond the block");
            each.push_back({width, stride, shift, offset});
        }
        require(raw_rows == word_rows && raw_bytes % nbytes == 0, "rows of whole blocks");
        columns = int64_t(raw_bytes) / nbytes * count;
        check_packed(bits, word_rows, size_t(columns), word_rows, words);
        rows = int64_t(word_rows);
        planes = {count, nbytes, each.data(), int(each.size())};
    }
};

void words_to_blocks(Matrix<const int32_t> words, int bits, const std::pair<int64_t, int64_t>& block,
                     const std::vector<PlaneTuple>& given, Matrix<uint8_t> raw) {
    const PlanesOf of(words.shape(0), words.shape(1), bits, raw.shape(0), raw.shape(1), block, given);
    nb::gil_scoped_release unlocked;
    to_blocks((const uint8_t*)words.data(), of.rows, of.columns, bits, of.planes, raw.data());
}

void blocks_to_words(Matrix<const uint8_t> raw, int bits, const std::pair<int64_t, int64_t>& block,
                     const std::vector<PlaneTuple>& given, Matrix<int32_t> words) {
    const PlanesOf of(words.shape(0), words.shape(1), bits, raw.shape(0), raw.shape(1), block, given);
    nb::gil_scoped_release unlocked;
    from_blocks(raw.data(), of.rows, of.columns, bits, of.planes, (uint8_t*)words.data());
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

}  // namespace

void bind_numbers(nb::module_& m) {
    nb::class_<Levels>(m, "Levels")
        .def(nb::init<int, int, bool, bool>(), "lo"_a, "hi"_a, "half"_a, "zero"_a)
        .def_static("table", &table, "values"_a, "bounds"_a);
    m.def("search", &search, "w"_a, "levels"_a, "scale_type"_a, "coarse"_a, "shifts"_a, "fine"_a, "refinements"_a, "empty"_a,
          "importance"_a.none(), "scale"_a.noconvert(), "zero"_a.noconvert(), "codes"_a.noconvert(), "isa"_a = "");
    m.def("superblocks", &superblocks, "w"_a, "levels"_a, "shape"_a, "has_min"_a, "scale"_a, "min"_a, "steps"_a,
          "shares"_a, "refinements"_a, "rounds"_a, "importance"_a.none(), "d"_a.noconvert(), "e"_a.noconvert(),
          "p"_a.noconvert(), "r"_a.noconvert(), "codes"_a.noconvert(), "isa"_a = "");
    m.def("encode", &encode, "w"_a, "levels"_a, "scale"_a, "zero"_a.none(), "codes"_a.noconvert(), "isa"_a = "");
    m.def("judge", &judge, "pieces"_a, "levels"_a, "scale"_a, "zero"_a, "out"_a.noconvert(), "isa"_a = "");
    m.def("compare", &compare, "w"_a, "levels"_a, "scale"_a, "zero"_a.none(), "codes"_a);
    m.def("pack", &pack_codes, "codes"_a, "bits"_a, "offset"_a, "words"_a.noconvert());
    m.def("unpack", &unpack_words, "words"_a, "bits"_a, "offset"_a, "codes"_a.noconvert());
    m.def("to_blocks", &words_to_blocks, "words"_a, "bits"_a, "block"_a, "planes"_a, "raw"_a.noconvert());
    m.def("from_blocks", &blocks_to_words, "raw"_a, "bits"_a, "block"_a, "planes"_a, "words"_a.noconvert());
    m.def("fake", &fake, "w"_a, "type"_a, "sizes"_a, "scale"_a, "zero"_a, "levels"_a, "out"_a, "out_type"_a,
          "isa"_a = "");
    m.def("fake_gradients", &fake_gradients, "grad"_a, "grad_type"_a, "w"_a, "type"_a, "sizes"_a, "scale"_a,
          "zero"_a, "levels"_a, "cells"_a, "by_weight"_a, "by_scale"_a, "by_zero"_a,
          "rounded"_a, "rounded_type"_a, "isa"_a = "");
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Quantizers& q : quantizers()) names.push_back(q.isa);
        return names;
    });
}

}  // namespace spicerack
