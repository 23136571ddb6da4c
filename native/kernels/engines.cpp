// Which engines this processor runs.
#include "kernel.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace spicerack {
namespace {

#define ENGINE(isa) \
    { #isa, isa::linear, isa::attention, isa::spin, isa::read }

struct Found {
    Engine all[6];
    int count = 0;
    void add(const Engine& engine) { all[count++] = engine; }
};

Found usable() {
    Found found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    if (vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni")) found.add(ENGINE(avx512vbmi));
    if (vnni) found.add(ENGINE(avx512vnni));
    if (vnni) found.add(ENGINE(avx512vlvnni));
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.add(ENGINE(avxvnni));
    if (avx2) found.add(ENGINE(avx2));
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.add(ENGINE(neon));
#elif defined(__aarch64__) && defined(__APPLE__)
    found.add(ENGINE(neon));  // every processor of Apple's that runs macOS has dot products
#endif
    found.add(ENGINE(scalar));
    return found;
}

}  // namespace

Engines engines() {
    static const Found found = usable();
    return {found.all, found.count};
}

}  // namespace spicerack
