// The float types that weights, scales and activations come in.
#pragma once

// For headers that several instruction sets include: what is not inlined could end up in common code with newer ones.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace spicerack {

enum class Float : int { f32, f16, bf16 };

ALWAYS_INLINE int size_of(Float type) { return type == Float::f32 ? 4 : 2; }

}  // namespace spicerack
