// Which instruction sets this processor has.
#include "search.h"

namespace spicerack {
namespace {

std::vector<Searcher> usable() {
    std::vector<Searcher> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        found.push_back({"avx512", avx512::search, avx512::encode, avx512::judge, avx512::compare});
    }
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", avx2::search, avx2::encode, avx2::judge, avx2::compare});
#endif
    found.push_back({"baseline", baseline::search, baseline::encode, baseline::judge, baseline::compare});
    return found;
}

}  // namespace

const std::vector<Searcher>& searchers() {
    static const std::vector<Searcher> all = usable();
    return all;
}

}  // namespace spicerack
