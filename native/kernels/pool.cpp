#include "pool.h"

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spicerack {
namespace {

constexpr int64_t HUGE_PAGE = int64_t(2) << 20, LINE = 64;
constexpr int BLOCKS = 64;  // that are kept at most

// In front of what the taker sees, a line long so that this stays aligned.
struct alignas(LINE) Header {
    int64_t bytes;  // behind it
};

// Kept blocks. A flag and not a mutex: who does not get it at once allocates, so that a process that was forked while
// another thread had it is not stuck.
std::atomic_flag busy = ATOMIC_FLAG_INIT;
Header* kept[BLOCKS];
int count = 0;
int64_t kept_bytes = 0;

struct Lock {
    const bool owned = !busy.test_and_set(std::memory_order_acquire);
    ~Lock() {
        if (owned) busy.clear(std::memory_order_release);
    }
};

Header* allocate(int64_t bytes) {
    // Whole pages: one entry of the translation buffer instead of 512, and one fault.
    const int64_t size = (bytes + int64_t(sizeof(Header)) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* memory = nullptr;
    if (posix_memalign(&memory, HUGE_PAGE, size) != 0) return nullptr;
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    return new (memory) Header{size - int64_t(sizeof(Header))};
}

// The smallest kept block that holds `bytes`, and not more than twice as much.
Header* reuse(int64_t bytes) {
    const Lock lock;
    if (!lock.owned) return nullptr;
    int best = -1;
    for (int i = 0; i < count; i++) {
        const int64_t size = kept[i]->bytes;
        if (size >= bytes && size / 2 <= bytes + HUGE_PAGE && (best < 0 || size < kept[best]->bytes)) best = i;
    }
    if (best < 0) return nullptr;
    Header* block = kept[best];
    kept[best] = kept[--count];
    kept_bytes -= block->bytes;
    return block;
}

bool keep(Header* block) {
    const Lock lock;
    if (!lock.owned || count == BLOCKS || kept_bytes + block->bytes > POOL_BYTES) return false;
    kept[count++] = block;
    kept_bytes += block->bytes;
    return true;
}

}  // namespace

void* take(int64_t bytes) {
    Header* block = reuse(bytes);
    if (!block) block = allocate(bytes);
    return block ? block + 1 : nullptr;
}

void give_back(void* block) {
    Header* header = (Header*)block - 1;
    if (!keep(header)) std::free(header);
}

int64_t release() {
    const Lock lock;
    if (!lock.owned) return 0;
    const int64_t bytes = kept_bytes;
    while (count) std::free(kept[--count]);
    kept_bytes = 0;
    return bytes;
}

}  // namespace spicerack
