// How packed integer weights multiply. linear.cpp is compiled once per instruction set; all give the same bits.
//
// Weights lie in panels of 16 output rows. For every 32 columns a panel has one tile of 64 * bits bytes, made of planes
// of 4, 2 and 1 bits, widest first, each a part of the code from its low bits up (3 bits = 2 + 1; 8 bits are one
// plane). The 64 bytes of a vector are 16 rows by 4 columns (a quad): what one integer dot-product instruction
// multiplies. Plane of 8: quad q is vector q. Of 4: quads 2v and 2v+1 are the low and high nibbles of vector v. Of 2:
// quads 4v..4v+3 are bits 0-1, 2-3, 4-5, 6-7 of vector v. Of 1: quad q is bit q. N is filled up to 16 and K to 32 with
// zeros.
//
// Trits, the codes 0, 1, 2 of ternary weights, may instead lie in bundles of 5 panels, N filled up to 80: a tile of 32
// columns has 512 bytes, vector q is quad q, and each byte the sum of code * 3^p over the panels p = 0..4: 1.6 bits a
// code.
//
// Four bits may also be places in a table of 16 bytes, whose u are then looked up.
#pragma once

#include <cstdint>

#include "../number.h"

namespace spicerack {

constexpr int PANEL = 16;                // rows of a panel
constexpr int TILE = 32;                 // columns of a tile, and of a span of activations that share a scale
constexpr int QUADS = 8;                 // groups of 4 columns in a tile
constexpr int TILE_UNIT = 64;            // bytes of a tile, for each bit of a code
constexpr int BYTE_TILE = PANEL * TILE;  // bytes of a tile with one byte a code
constexpr int TRITS = 1;                 // instead of a number of bits
constexpr int LOOKED_UP = 9;             // instead of a number of bits: 4, which are places in a table
constexpr int TABLE = 16;                // bytes of a table
constexpr int BUNDLE = 5;                // panels of trits in a byte

// What scales are stored as: floats, or what an outer scale is multiplied by.
enum class ScaleType : int { f32, f16, bf16, int8, e4m3 };

ALWAYS_INLINE int size_of(ScaleType type) { return type == ScaleType::f32 ? 4 : type >= ScaleType::int8 ? 1 : 2; }

// w[n, k] = scale[n, k / group] * (u[n, k] - z), z = zero[n, k / group], or offset without zeros; and 1/2 more if half.
//
// Groups in blocks (`in_blocks`): there are minima, which are added; or scales and minima are products of what is stored
// and outer scales, one for each block of groups, rounded to float32; or groups have 16 columns. They have no zeros and
// no halves.
struct Weights {
    const uint8_t* codes;  // [ceil(N/16), ceil(K/32), 64 * bits]; trits: [ceil(N/80), ceil(K/32), 512]
    const void* scale;     // [ceil(N/16), groups, 16]; with minima [ceil(N/16), groups, 2, 16]: scales, then minima
    const uint8_t* zero;   // like scale, or null
    int64_t n, k;
    int64_t group;  // columns that share a scale, 16 or a multiple of 32; 0: the whole row
    ScaleType scale_type;
    int bits, offset;      // bits: 2 to 8, TRITS, or LOOKED_UP
    bool half;
    bool minima = false;
    const void* outer = nullptr;  // like scale, of blocks; or null
    int64_t block = 0;            // columns that share an outer scale, a multiple of group and of 32; 0: the whole row
    Float outer_type = Float::f32;
    uint8_t table[TABLE] = {};  // u by place, where they are looked up

    ALWAYS_INLINE int64_t panels() const { return (n + PANEL - 1) / PANEL; }
    ALWAYS_INLINE int64_t tiles() const { return (k + TILE - 1) / TILE; }
    ALWAYS_INLINE int64_t groups() const { return group == 0 ? 1 : k / group; }
    ALWAYS_INLINE int64_t blocks() const { return block == 0 ? 1 : k / block; }
    ALWAYS_INLINE int kinds() const { return minima ? 2 : 1; }  // of what a group has: a scale, a minimum
    ALWAYS_INLINE bool in_blocks() const { return minima || outer || group == TILE / 2; }
    // Panels whose codes lie together.
    ALWAYS_INLINE int64_t bundles() const { return bits == TRITS ? (panels() + BUNDLE - 1) / BUNDLE : panels(); }
    ALWAYS_INLINE int64_t tile_bytes() const {
        return int64_t(bits == TRITS ? QUADS : bits == LOOKED_UP ? 4 : bits) * TILE_UNIT;
    }
    ALWAYS_INLINE const uint8_t* tile(int64_t bundle, int64_t number) const {
        return codes + (bundle * tiles() + number) * tile_bytes();
    }
};

// How activations enter the product.
enum class Activations : int {
    floats,  // as they are, in float32
    spans,   // int8, one scale for 32 columns of a row
    tokens,  // int8, one scale for a row
    fixed,   // int8, one given scale
};

// y = x W^T + bias for one of the matrices that share x.
struct Product {
    Weights weights;
    const void* bias;  // [N] in the type of x, or null
    void* y;           // [M, N] in the type of x
    bool gelu;         // applied to y before it is rounded to its type
};

struct Call {
    const void* x;  // [M, K]
    Float type;     // of x, y and bias
    int64_t m;
    Activations activations;
    float fixed_scale;
    const Product* products;
    int count;
    int threads;
};

// A tensor [batch, heads, rows, columns] whose columns lie together; the other steps are in elements, and may be 0.
struct Strided {
    const void* data;
    int64_t batch, head, row;
};

// y = softmax(q k^T * scale) v for each head: q heads h * heads / kv_heads .. share one head of k and v.
struct Attention {
    Strided q, k, v;  // [batch, heads, queries, width], [batch, kv_heads, keys, width], [batch, kv_heads, keys, value_width]
    Strided mask;     // bytes [batch, heads, queries, keys]: 0 hides a key; data null: none is hidden
    void* y;          // [batch, queries, heads, value_width]
    Float type;       // of q, k, v and y
    int64_t batch, heads, kv_heads, queries, keys, width, value_width;
    bool causal;      // query i sees the keys 0..i
    float scale;
    int64_t window = -1;          // query i sees the keys from i - window to i + window, of those; below 0: all
    const float* bias = nullptr;  // of scores, or null: [heads, ...] at the distance 0 of the first head; key - query + 15
                                  // may be read, too
    int64_t bias_head = 0;        // from head to head
};

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias over the columns of each row, where x is x + more. Not
// centered, as in RMSNorm: the mean counts as 0.
struct Norm {
    const float *x, *more;        // [rows, width]; more may be null
    const float *weight, *bias;  // [width]; bias may be null
    float* y;                    // [rows, width]; may be x or more
    int64_t rows, width;
    float epsilon;
    bool centered;
    int threads;
};

// y = x W^T + bias, or GELU of that, for weights that stayed float.
struct Dense {
    const float* x;       // [m, k]
    const void* weights;  // [n, k] in `type`
    Float type;
    const float* bias;  // [n], or null
    float* y;           // [m, n]
    int64_t m, n, k;    // m above 0
    bool gelu;
    int threads;
};

// What is applied to numbers one by one.
enum class Function : int { gelu, gelu_tanh, gelu_quick, silu };
constexpr int FUNCTIONS = 4;

// y = f(x), or f(x) * more.
struct Gate {
    const float *x, *more;      // [rows, width]; more may be null
    int64_t x_step, more_step;  // from row to row
    float* y;                   // [rows, width], one behind the other; may be x
    int64_t rows, width;
    Function function;
    int threads;
};

// y = x + more, or x + more * factor.
struct Sum {
    const float *x, *more;  // [rows, width]
    const float* factor;    // [width], or null
    float* y;               // [rows, width]; may be x or more
    int64_t rows, width;
    int threads;
};

// Rotary positions, in place: of the first `rotated` columns of each head, column i and i + rotated / 2 are turned as a
// pair.
struct Rotation {
    float* x;            // [rows, heads, width]
    int64_t step;        // from row to row
    const float* turns;  // [rows, rotated]: cosines of the pairs, then their sines
    int64_t rows, heads, width, rotated;
    int threads;
};

// |sum of products| < 2^31 for a row of K columns: 255 * 127 * 2^16 < 2^31. Longer rows are refused with one scale a
// row.
constexpr int64_t MAX_EXACT_COLUMNS = 1 << 16;

#define SPICERACK_KERNEL_FUNCTIONS                                                                                     \
    void linear(const Call& call);                                                                                     \
    /* `count` calls, whose work is shared among threads as if they were one. */                                       \
    void attention(const Attention* calls, int64_t count, int threads);                                                \
    void dense(const Dense& call);                                                                                     \
    void norm(const Norm& call);                                                                                       \
    void gate(const Gate& call);                                                                                       \
    void add(const Sum& call);                                                                                         \
    void rotate(const Rotation& call);                                                                                 \
    /* `count` numbers of one type as another; one of the two is float32. */                                           \
    void convert(const void* from, Float type, void* to, Float other, int64_t count);                                  \
    /* Operations of `rounds` rounds of dot products, or of multiply-adds of floats, that touch registers only (2 for  \
       each multiply-add). */                                                                                          \
    int64_t spin(int64_t rounds, bool floats);                                                                         \
    /* Reads all of it once. */                                                                                        \
    int64_t read(const void* data, int64_t bytes);

namespace scalar {
SPICERACK_KERNEL_FUNCTIONS
}
namespace avx2 {
SPICERACK_KERNEL_FUNCTIONS
}
namespace avxvnni {
SPICERACK_KERNEL_FUNCTIONS
}
namespace avx512vlvnni {
SPICERACK_KERNEL_FUNCTIONS
}
namespace avx512vnni {
SPICERACK_KERNEL_FUNCTIONS
}
namespace avx512vbmi {
SPICERACK_KERNEL_FUNCTIONS
}
namespace neon {
SPICERACK_KERNEL_FUNCTIONS
}
#undef SPICERACK_KERNEL_FUNCTIONS

struct Engine {
    const char* isa;
    decltype(&scalar::linear) linear;
    decltype(&scalar::attention) attention;
    decltype(&scalar::dense) dense;
    decltype(&scalar::norm) norm;
    decltype(&scalar::gate) gate;
    decltype(&scalar::add) add;
    decltype(&scalar::rotate) rotate;
    decltype(&scalar::convert) convert;
    decltype(&scalar::spin) spin;
    decltype(&scalar::read) read;
};

// Engines that this build holds and this processor runs, fastest first; the last is "scalar".
struct Engines {
    const Engine* first;
    int count;
    ALWAYS_INLINE const Engine* begin() const { return first; }
    ALWAYS_INLINE const Engine* end() const { return first + count; }
};
Engines engines();

}  // namespace spicerack
