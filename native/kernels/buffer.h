// Memory that a thread keeps from call to call, so that no call waits until the system hands out pages.
#pragma once

#include <new>

#include "../simd.h"

namespace spicerack::SPICERACK_ISA {

template <class T>
struct Buffer {
    T* data = nullptr;
    int64_t size = 0;
    ~Buffer() { release(); }
    // At least `count` values, aligned; the old ones are lost.
    INLINE T* need(int64_t count) {
        if (count > size) {
            release();
            data = (T*)operator new(count * sizeof(T), std::align_val_t(64));
            size = count;
        }
        return data;
    }
    INLINE void release() {
        if (data) operator delete(data, std::align_val_t(64));
        data = nullptr;
        size = 0;
    }
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace spicerack::SPICERACK_ISA
