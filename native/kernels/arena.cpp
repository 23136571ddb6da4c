#include "arena.h"

#include <atomic>
#include <cstddef>
#include <new>

namespace spicerack {
namespace {

constexpr int64_t HEAD = 64;  // bytes before the floats, of which the first eight tell how many bytes follow

std::atomic<void*> kept[ARENAS_KEPT];

int64_t bytes_of(const void* block) { return *(const int64_t*)block; }

void* make(int64_t bytes) {
    void* block = operator new(std::size_t(HEAD + bytes), std::align_val_t(HEAD));
    *(int64_t*)block = bytes;
    return block;
}

void drop(void* block) { operator delete(block, std::align_val_t(HEAD)); }

}  // namespace

Arena::Arena(int64_t floats) : block_(nullptr) {
    const int64_t bytes = floats * int64_t(sizeof(float));
    for (std::atomic<void*>& place : kept) {
        if (!place.load(std::memory_order_relaxed)) continue;
        void* block = place.exchange(nullptr, std::memory_order_acquire);
        if (!block) continue;
        if (bytes_of(block) >= bytes) {
            block_ = block;
            return;
        }
        drop(block);  // the larger one that is made now will come to its place
        break;
    }
    block_ = make(bytes);
}

Arena::~Arena() {
    if (!block_) return;
    if (bytes_of(block_) <= ARENA_KEPT_BYTES) {
        for (std::atomic<void*>& place : kept) {
            void* empty = nullptr;
            if (place.compare_exchange_strong(empty, block_, std::memory_order_release)) return;
        }
    }
    drop(block_);
}

float* Arena::data() const { return (float*)((char*)block_ + HEAD); }

int64_t release_arenas() {
    int64_t bytes = 0;
    for (std::atomic<void*>& place : kept) {
        void* block = place.exchange(nullptr, std::memory_order_acquire);
        if (!block) continue;
        bytes += bytes_of(block);
        drop(block);
    }
    return bytes;
}

}  // namespace spicerack
