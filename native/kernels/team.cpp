#include "team.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace spicerack {
namespace {

// The entry points of GNU's OpenMP runtime, which LLVM's and Intel's export as well.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*max_threads)() = nullptr;
};

#if defined(__linux__)
// Of the runtimes in this process the one that came with torch, else the first.
int look_at(dl_phdr_info* object, size_t, void* found) {
    const char* path = object->dlpi_name;
    const char* name = std::strrchr(path, '/');
    name = name ? name + 1 : path;
    if (std::strncmp(name, "libgomp", 7) != 0 && std::strncmp(name, "libomp", 6) != 0 &&
        std::strncmp(name, "libiomp", 7) != 0) {
        return 0;
    }
    const char** best = (const char**)found;
    if (*best == nullptr || std::strstr(path, "/torch")) *best = path;
    return 0;
}

OpenMP look() {
    const char* path = nullptr;
    dl_iterate_phdr(look_at, &path);
    void* library = path ? dlopen(path, RTLD_NOLOAD | RTLD_LAZY) : nullptr;
    if (!library) return {};
    OpenMP found;
    found.parallel = (decltype(found.parallel))dlsym(library, "GOMP_parallel");
    found.max_threads = (decltype(found.max_threads))dlsym(library, "omp_get_max_threads");
    return found.parallel && found.max_threads ? found : OpenMP{};
}
#else
OpenMP look() { return {}; }
#endif

// Looked for until it is there: torch may be imported after us.
const OpenMP& openmp() {
    static OpenMP found;
    static std::atomic<bool> known{false};
    static std::mutex looking;
    if (!known.load(std::memory_order_acquire)) {
        const std::lock_guard<std::mutex> alone(looking);
        if (!found.parallel) found = look();
        known.store(found.parallel != nullptr, std::memory_order_release);
    }
    return found;
}

}  // namespace

int team_size() { return openmp().parallel ? openmp().max_threads() : 1; }

void run_team(int threads, void (*work)(void*), void* context) {
    if (threads <= 1) {
        work(context);
    } else if (openmp().parallel) {
        openmp().parallel(work, context, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back(work, context);
        work(context);
        for (std::thread& other : others) other.join();
    }
}

}  // namespace spicerack
