// What lies in memory: panels of weights, results, and how fast memory and products are at most.
#include "../kernels/arena.h"
#include "../kernels/layout.h"
#include "../kernels/pool.h"
#include "../kernels/stored.h"
#include "../kernels/team.h"
#include "arrays.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spicerack {
namespace {

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
// nothing alive: of memory that is gone meanwhile, or is another's, no byte is changed. It works a fifth of the time and
// begins late: at full speed it takes a core from the first results, which were 50 to 300 ms later for it.
void merge_pages(const std::vector<std::pair<uintptr_t, size_t>>& ranges) {
#if defined(__linux__)
    std::thread([ranges] {
        using Clock = std::chrono::steady_clock;
        constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which glibc's headers may not know yet
        constexpr size_t PIECE = 4 << 20;
        std::this_thread::sleep_for(std::chrono::seconds(1));
        for (const auto& [address, bytes] : ranges) {
            for (size_t at = 0; at < bytes; at += PIECE) {
                const auto begin = Clock::now();
                madvise((void*)(address + at), std::min(PIECE, bytes - at), COLLAPSE);
                std::this_thread::sleep_for(4 * (Clock::now() - begin));
            }
        }
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

void bind_panels(nb::module_& m) {
    m.def("rows", &rows, "matrix"_a, "which"_a, "out"_a.noconvert());
    m.def("from_panels", &from_panels, "tiles"_a, "bits"_a, "offset"_a, "codes"_a.noconvert());
    nb::class_<Packing>(m, "Packing")
        .def(nb::init<Matrix<const uint8_t>, int, int64_t, int64_t, int, int, int, int, Tiles>(), "data"_a, "order"_a, "n"_a,
             "k"_a, "stored_bits"_a, "offset"_a, "most"_a, "bits"_a, "tiles"_a.noconvert())
        .def("add_lanes", &Packing::add_lanes, "values"_a, "size"_a, "add"_a, "lanes"_a.noconvert());
    m.def("merge_pages", &merge_pages, "ranges"_a);
    m.def("pack_all", &pack_all, "packings"_a, "threads"_a);
    m.def("pooled", &pooled, "shape"_a, "type"_a);
    m.def("release", [] {
        nb::gil_scoped_release unlocked;
        return release() + release_arenas();
    });
    m.def("spin", &spin, "engine"_a, "rounds"_a, "threads"_a, "floats"_a);
    m.def("read_all", &read_all, "engine"_a, "data"_a, "threads"_a);
}

}  // namespace spicerack
