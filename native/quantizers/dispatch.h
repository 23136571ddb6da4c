// The quantizers that this processor runs: search.h, superblocks.h and fake.h, compiled once per instruction set.
// kernels/kernel.h has the kernels' engines.
#pragma once

#include <vector>

#include "fake.h"
#include "search.h"
#include "superblocks.h"

namespace spicerack {

struct Quantizers {
    const char* isa;
    decltype(&baseline::search) search;
    decltype(&baseline::superblocks) superblocks;
    decltype(&baseline::encode) encode;
    decltype(&baseline::judge) judge;
    decltype(&baseline::compare) compare;
    decltype(&baseline::fake) fake;
    decltype(&baseline::fake_gradients) fake_gradients;
};

// Those that run on this processor, widest first. All give the same results.
const std::vector<Quantizers>& quantizers();

}  // namespace spicerack
