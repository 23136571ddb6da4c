// The Python face of the native code: checks types and sizes, releases the GIL, calls. src/spicerack/native.py is its only
// user. Every function works on one thread; callers split rows among threads, which never changes a result.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "pack.h"
#include "search.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace spicerack {
namespace {

using Weights = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool fact, const char* what) {
    if (!fact) throw std::invalid_argument(what);
}

Float float_type(const Weights& w) {
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

Blocks blocks_of(const Weights& w) {
    require(w.shape(1) > 0, "empty blocks");
    return {w.data(), float_type(w), int64_t(w.shape(0)), int64_t(w.shape(1))};
}

const Searcher& searcher(const std::string& isa) {
    for (const Searcher& s : searchers()) {
        if (isa.empty() || isa == s.isa) return s;
    }
    throw std::invalid_argument("this processor has no " + isa);
}

std::pair<bool, bool> search(const Weights& w, Levels levels, const std::string& scale_type,
            const std::vector<float>& coarse, const std::vector<float>& shifts, const std::vector<float>& fine, int refinements,
            std::optional<Vector<const float>> importance, Vector<float> scale, Vector<int8_t> zero, Matrix<int8_t> codes,
            const std::string& isa) {
    const Blocks blocks = blocks_of(w);
    const size_t count = blocks.count, size = blocks.size;
    require(scale.shape(0) == count && zero.shape(0) == count, "one scale and zero for each block");
    require(codes.shape(0) == count && codes.shape(1) == size, "codes are shaped like weights");
    require(fine.size() % 2 == 0, "fine factors come in pairs");
    require(!importance || (importance->shape(0) > 0 && importance->shape(0) % size == 0 &&
                            count * size % importance->shape(0) == 0),
            "importance must repeat over whole blocks");
    const Plan plan{levels, float_type(scale_type), !coarse.empty(), coarse.data(), int(coarse.size()), shifts.data(),
                    int(shifts.size()), fine.data(), int(fine.size()), refinements};
    const Searcher& s = searcher(isa);
    nb::gil_scoped_release unlocked;
    const Outcome outcome =
        s.search(blocks, plan, importance ? importance->data() : nullptr, importance ? int64_t(importance->shape(0)) : 1,
                 scale.data(), zero.data(), codes.data());
    return {outcome.finite, outcome.fits};
}

void encode(const Weights& w, Levels levels, Vector<const float> scale, std::optional<Vector<const int8_t>> zero,
            Matrix<int8_t> codes, const std::string& isa) {
    const Blocks blocks = blocks_of(w);
    const size_t count = blocks.count, size = blocks.size;
    require(scale.shape(0) == count && (!zero || zero->shape(0) == count), "one scale and zero for each block");
    require(codes.shape(0) == count && codes.shape(1) == size, "codes are shaped like weights");
    const Searcher& s = searcher(isa);
    nb::gil_scoped_release unlocked;
    s.encode(blocks, levels, scale.data(), zero ? zero->data() : nullptr, codes.data());
}

void judge(const Weights& pieces, Levels levels, float scale, float zero, Matrix<double> out, const std::string& isa) {
    const Blocks blocks = blocks_of(pieces);
    require(out.shape(0) == size_t(blocks.count) && out.shape(1) == 5, "five sums for each piece");
    const Searcher& s = searcher(isa);
    nb::gil_scoped_release unlocked;
    s.judge(blocks, levels, scale, zero, (Sums*)out.data());
}

std::pair<double, double> compare(const Weights& w, Levels levels, Vector<const float> scale,
                                  std::optional<Vector<const int8_t>> zero, Matrix<const int8_t> codes) {
    const Blocks blocks = blocks_of(w);
    const size_t count = blocks.count, size = blocks.size;
    require(scale.shape(0) == count && (!zero || zero->shape(0) == count), "one scale and zero for each block");
    require(codes.shape(0) == count && codes.shape(1) == size, "codes are shaped like weights");
    const Searcher& s = searcher("");
    nb::gil_scoped_release unlocked;
    Misfit misfit;
    s.compare(blocks, levels, scale.data(), zero ? zero->data() : nullptr, codes.data(), misfit);
    return {misfit.wrong, misfit.total};
}

void check_packed(int bits, size_t rows, size_t columns, size_t packed_rows, size_t words) {
    require(bits >= 1 && bits <= 8, "1 to 8 bits");
    require(packed_rows == rows && words == (columns * bits + 31) / 32, "codes and words do not belong together");
}

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

}  // namespace
}  // namespace spicerack

NB_MODULE(_native, m) {
    using namespace spicerack;
    nb::class_<Levels>(m, "Levels").def(nb::init<int, int, bool, bool>(), "lo"_a, "hi"_a, "half"_a, "zero"_a);
    m.def("search", &spicerack::search, "w"_a, "levels"_a, "scale_type"_a, "coarse"_a, "shifts"_a, "fine"_a, "refinements"_a,
          "importance"_a.none(), "scale"_a, "zero"_a, "codes"_a, "isa"_a = "");
    m.def("encode", &spicerack::encode, "w"_a, "levels"_a, "scale"_a, "zero"_a.none(), "codes"_a, "isa"_a = "");
    m.def("judge", &spicerack::judge, "pieces"_a, "levels"_a, "scale"_a, "zero"_a, "out"_a, "isa"_a = "");
    m.def("compare", &spicerack::compare, "w"_a, "levels"_a, "scale"_a, "zero"_a.none(), "codes"_a);
    m.def("pack", &pack_codes, "codes"_a, "bits"_a, "offset"_a, "words"_a);
    m.def("unpack", &unpack_words, "words"_a, "bits"_a, "offset"_a, "codes"_a);
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Searcher& s : searchers()) names.push_back(s.isa);
        return names;
    });
}
