// The Python face of the native code: checks types and sizes, releases the GIL, calls. Its only users, in
// src/spicerack: numerics/native.py (search, codes, bit streams, fake quantization), and of the kernels kernels/panels.py
// (layout), multiply.py (products), attention.py, plan.py, guard.py and limits.py. What they hand in is told in _native.pyi.
//
// Those of numerics work on one thread, and callers split rows among threads, which never changes a result; those of
// training and of the kernels bring torch's team. isa: an instruction set of quantizers(), "" for the widest.
//
// numbers.cpp has what numerics asks for, products.cpp products, attention and plans, panels.cpp what lies in memory.
#include "arrays.h"

NB_MODULE(_native, m) {
    nanobind::set_leak_warnings(false);  // layers that live until the interpreter ends are no leak
    spicerack::bind_numbers(m);
    spicerack::bind_products(m);
    spicerack::bind_panels(m);
}
