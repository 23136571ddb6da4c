// What the files of the Python face share: arrays, checks, and how a matrix comes in.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "../kernels/kernel.h"

namespace spicerack {

namespace nb = nanobind;
using namespace nb::literals;

// Arguments that are written to are bound with noconvert(): nanobind would otherwise fill a copy of another type, which
// nobody sees, and the caller's memory would stay what it was.
using Floats = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline void require(bool fact, const char* message) {
    if (!fact) throw std::invalid_argument(message);
}

inline const Engine& engine(int index) {
    require(index >= 0 && index < engines().count, "no such engine");
    return engines().first[index];
}

// A packed matrix whose tensors somebody else keeps.
struct Bound {
    Weights weights;
};

// Each file's part of the module.
void bind_numbers(nb::module_& m);
void bind_products(nb::module_& m);
void bind_panels(nb::module_& m);

}  // namespace spicerack
