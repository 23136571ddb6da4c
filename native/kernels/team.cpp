#include "team.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
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
    void (*barrier)() = nullptr;
    int (*max_threads)() = nullptr;
    int (*index)() = nullptr;
    int (*count)() = nullptr;
};

#if defined(__linux__)
// Of the runtimes in this process the one that came with torch, else the first.
int look_at(dl_phdr_info* object, size_t, void* library) {
    const char* path = object->dlpi_name;
    const char* name = std::strrchr(path, '/');
    name = name ? name + 1 : path;
    if (std::strncmp(name, "libgomp", 7) != 0 && std::strncmp(name, "libomp", 6) != 0 &&
        std::strncmp(name, "libiomp", 7) != 0) {
        return 0;
    }
    const char** best = (const char**)library;
    if (*best == nullptr || std::strstr(path, "/torch")) *best = path;
    return 0;
}

OpenMP look() {
    const char* path = nullptr;
    dl_iterate_phdr(look_at, &path);
    void* library = path ? dlopen(path, RTLD_NOLOAD | RTLD_LAZY) : nullptr;
    if (!library) return {};
    OpenMP runtime;
    runtime.parallel = (decltype(runtime.parallel))dlsym(library, "GOMP_parallel");
    runtime.barrier = (decltype(runtime.barrier))dlsym(library, "GOMP_barrier");
    runtime.max_threads = (decltype(runtime.max_threads))dlsym(library, "omp_get_max_threads");
    runtime.index = (decltype(runtime.index))dlsym(library, "omp_get_thread_num");
    runtime.count = (decltype(runtime.count))dlsym(library, "omp_get_num_threads");
    const bool whole = runtime.parallel && runtime.barrier && runtime.max_threads && runtime.index && runtime.count;
    return whole ? runtime : OpenMP{};
}
#else
OpenMP look() { return {}; }
#endif

// Looked for until it is there: torch may be imported after us.
const OpenMP& openmp() {
    static OpenMP runtime;
    static std::atomic<bool> known{false};
    static std::mutex looking;
    if (!known.load(std::memory_order_acquire)) {
        const std::lock_guard<std::mutex> alone(looking);
        if (!runtime.parallel) runtime = look();
        known.store(runtime.parallel != nullptr, std::memory_order_release);
    }
    return runtime;
}

// Where there is no such runtime: a barrier for threads of our own.
struct Barrier {
    std::mutex mutex;
    std::condition_variable all_here;
    int here = 0;
    unsigned round = 0;

    void wait(int count) {
        std::unique_lock<std::mutex> lock(mutex);
        const unsigned mine = round;
        if (++here == count) {
            here = 0;
            round++;
            all_here.notify_all();
        } else {
            all_here.wait(lock, [&] { return round != mine; });
        }
    }
};
thread_local Barrier* barrier = nullptr;

// A thread that lets an exception out would end the process.
struct Task {
    void (*work)(void*, Member);
    void* context;
    std::exception_ptr thrown;
    std::atomic<bool> failed{false};

    void run(Member me) {
        try {
            work(context, me);
        } catch (...) {
            if (!failed.exchange(true)) thrown = std::current_exception();
        }
    }
};

}  // namespace

int team_size() { return openmp().parallel ? openmp().max_threads() : 1; }

void run_team(int threads, void (*work)(void*, Member), void* context) {
    if (threads <= 1) return work(context, {0, 1});
    Task task{work, context, {}};
    if (openmp().parallel) {
        openmp().parallel([](void* given) { ((Task*)given)->run({openmp().index(), openmp().count()}); }, &task,
                          unsigned(threads), 0);
    } else {
        Barrier shared;
        const auto member = [&](int index) {
            barrier = &shared;
            task.run({index, threads});
            barrier = nullptr;
        };
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back(member, i);
        member(0);
        for (std::thread& other : others) other.join();
    }
    if (task.thrown) std::rethrow_exception(task.thrown);
}

void wait_for_all(Member me) {
    if (me.count == 1) return;
    if (barrier) {
        barrier->wait(me.count);
    } else {
        openmp().barrier();
    }
}

}  // namespace spicerack
