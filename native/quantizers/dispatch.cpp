// Which instruction sets this processor has.
#include "dispatch.h"

namespace spicerack {
namespace {

#define SPICERACK_QUANTIZERS(isa) \
    { #isa, isa::search, isa::encode, isa::judge, isa::compare, isa::fake, isa::fake_gradients }

std::vector<Quantizers> usable() {
    std::vector<Quantizers> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        found.push_back(SPICERACK_QUANTIZERS(avx512));
    }
    if (__builtin_cpu_supports("avx2")) found.push_back(SPICERACK_QUANTIZERS(avx2));
#endif
    found.push_back(SPICERACK_QUANTIZERS(baseline));
    return found;
}

#undef SPICERACK_QUANTIZERS

}  // namespace

const std::vector<Quantizers>& quantizers() {
    static const std::vector<Quantizers> all = usable();
    return all;
}

}  // namespace spicerack
