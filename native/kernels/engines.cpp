// Which engines this processor runs, of those that this build holds: libraries.cmake defines SPICERACK_WITH_<isa>.
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
    { #isa, isa::linear, isa::attention, isa::dense, isa::norm, isa::gate, isa::add, isa::rotate, isa::convert, isa::spin, \
      isa::read }

// The instruction sets that engines are compiled for, and whether this processor has them.
struct Processor {
    bool avx2 = false, avxvnni = false, avx512vnni = false, avx512vbmi = false, neon = false;

    Processor() {
#if defined(__x86_64__)
        __builtin_cpu_init();
        avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        avxvnni = avx2 && __builtin_cpu_supports("avxvnni");
        avx512vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni");
        avx512vbmi = avx512vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
#elif defined(__aarch64__) && defined(__linux__)
        neon = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__aarch64__) && defined(__APPLE__)
        neon = true;  // every processor of Apple's that runs macOS has dot products
#endif
    }
};

struct Usable {
    Engine all[6];
    int count = 0;

    Usable() {
        const Processor has;
        (void)has;
#if defined(SPICERACK_WITH_avx512vbmi)
        if (has.avx512vbmi) add(ENGINE(avx512vbmi));
#endif
#if defined(SPICERACK_WITH_avx512vnni)
        if (has.avx512vnni) add(ENGINE(avx512vnni));
#endif
#if defined(SPICERACK_WITH_avx512vlvnni)
        if (has.avx512vnni) add(ENGINE(avx512vlvnni));
#endif
#if defined(SPICERACK_WITH_avxvnni)
        if (has.avxvnni) add(ENGINE(avxvnni));
#endif
#if defined(SPICERACK_WITH_avx2)
        if (has.avx2) add(ENGINE(avx2));
#endif
#if defined(SPICERACK_WITH_neon)
        if (has.neon) add(ENGINE(neon));
#endif
        add(ENGINE(scalar));
    }
    void add(const Engine& engine) { all[count++] = engine; }
};

}  // namespace

Engines engines() {
    static const Usable usable;
    return {usable.all, usable.count};
}

}  // namespace spicerack
