// Memory of large results, which goes from a result that nobody has any more to the next one.
//
// The system hands out pages when they are first touched, 0.25 to 2.6 us for 4 KB, and malloc gives large blocks back to
// it: a model's forward with large batches then pays for the same pages again and again (docs/kernels.md). What is kept
// here is bounded, and `release` gives it back. Blocks belong to whoever took them until `give_back`.
#pragma once

#include <cstdint>

namespace spicerack {

// Bytes that are kept at most, of all blocks that nobody has.
constexpr int64_t POOL_BYTES = int64_t(256) << 20;

// At least `bytes` bytes that hold anything, aligned to a cache line; null if the system has none.
void* take(int64_t bytes);
void give_back(void* block);

// Gives what is kept back to the system -> its bytes.
int64_t release();

}  // namespace spicerack
