// The native code without Python, so that sanitizers and emulators of other processors can run it.
//
// Every engine must give the scalar engine's bits, and that must be right: products within the bound of exact.cpp,
// attention, norms, activations and fake quantization within theirs. All memory ends where its last value ends and
// begins on no more than its values' own alignment.
//
//     native_tests          all of it
//     native_tests once     enough that all code runs: every body, with every instruction that it has
#include <chrono>

#include "support.h"

using namespace spicerack;

int main(int count, char** arguments) {
    once = count > 1 && !std::strcmp(arguments[1], "once");
    std::printf("engines:");
    for (const Engine& engine : engines()) std::printf(" %s", engine.isa);
    std::printf("\n");
    std::fflush(stdout);
    const struct {
        const char* name;
        void (*run)(Random&);
    } tests[] = {{"bodies", test_bodies}, {"sharing", test_sharing}, {"results", test_results},
                 {"attention", test_attention}, {"dense", test_dense}, {"rows", test_rows},
                 {"plan", test_plan}, {"fake", test_fake}, {"search", test_search}, {"superblocks", test_superblocks}};
    for (const auto& test : tests) {
        const auto begin = std::chrono::steady_clock::now();
        Random random{7};
        test.run(random);
        const auto end = std::chrono::steady_clock::now();
        std::printf("%6.2f s  %s\n", std::chrono::duration<double>(end - begin).count(), test.name);
        std::fflush(stdout);
    }
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
