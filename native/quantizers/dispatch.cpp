// Which instruction sets this processor has, of those that this build holds: libraries.cmake defines
// SPICERACK_WITH_<isa> for each.
#include "dispatch.h"

namespace spicerack {
namespace {

#define QUANTIZERS(isa) \
    { #isa, isa::search, isa::superblocks, isa::encode, isa::judge, isa::compare, isa::fake, isa::fake_gradients }

std::vector<Quantizers> usable() {
    std::vector<Quantizers> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(SPICERACK_WITH_avx512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        all.push_back(QUANTIZERS(avx512));
    }
#endif
#if defined(SPICERACK_WITH_avx2)
    if (__builtin_cpu_supports("avx2")) all.push_back(QUANTIZERS(avx2));
#endif
    all.push_back(QUANTIZERS(baseline));
    return all;
}

}  // namespace

const std::vector<Quantizers>& quantizers() {
    static const std::vector<Quantizers> all = usable();
    return all;
}

}  // namespace spicerack
