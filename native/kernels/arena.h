// Memory for what a call needs and nobody keeps: lent out and given back, so that the next call, whichever thread makes
// it, finds pages that are there already.
//
// As many blocks are kept as calls ran at once, at most ARENAS_KEPT of at most ARENA_KEPT_BYTES. No lock is held at any
// time: a process that forks meanwhile cannot leave one behind.
#pragma once

#include <cstdint>

namespace spicerack {

constexpr int ARENAS_KEPT = 64;
constexpr int64_t ARENA_KEPT_BYTES = int64_t(1) << 26;

class Arena {
public:
    // Borrows a block of at least so many floats, aligned to 64 bytes. Raises std::bad_alloc.
    explicit Arena(int64_t floats);
    Arena(Arena&& other) noexcept : block_(other.block_) { other.block_ = nullptr; }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena();
    float* data() const;

private:
    void* block_;
};

// Frees what is kept and not lent; returns how many bytes those were.
int64_t release_arenas();

}  // namespace spicerack
