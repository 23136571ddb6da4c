// Which body multiplies: by the rows of x, the width of the codes, and where scales change. Part of linear.cpp.
//
// A table has the bodies there are; two functions choose. What is chosen changes how fast a result comes, not its bits.
#pragma once

#include "blocks.h"

namespace spicerack::SPICERACK_ISA {
namespace {

typedef void (*Body)(const Panels&, const Strip&, float*);
typedef void (*Unpack)(const uint8_t* tile, uint8_t* bytes, const uint8_t* table);

// Bodies that read codes in one way: of each scaling, for strips of 1, 2, ... rows (null: of no use), and their panels.
struct Bodies {
    Body of[SCALINGS][ROWS_MOST];
    int panels[SCALINGS];
};

// ---- the bodies there are -------------------------------------------------------------------------------------------

// For strips of LEAST to M rows.
template <int BITS, int M, int LEAST, int P>
constexpr void add_scaled(Bodies& bodies) {
    bodies.of[scale_of_row][M - 1] = scaled<BITS, M, P, scale_of_row>;
    bodies.of[scale_of_tile][M - 1] = scaled<BITS, M, P, scale_of_tile>;
    bodies.of[scale_of_group][M - 1] = scaled<BITS, M, P, scale_of_group>;
    bodies.panels[scale_of_row] = bodies.panels[scale_of_tile] = bodies.panels[scale_of_group] = P;
    if constexpr (BITS != TRITS) {
        bodies.of[of_blocks][M - 1] = blocks<BITS, M, P, 1>;
        bodies.of[of_half_blocks][M - 1] = blocks<BITS, M, P, 2>;
        bodies.panels[of_blocks] = bodies.panels[of_half_blocks] = P;
    }
    if constexpr (M > LEAST) add_scaled<BITS, M - 1, LEAST, P>(bodies);
}

template <int BITS, int M, int LEAST, int P>
constexpr void add_summed(Bodies& bodies) {
    bodies.of[unscaled][M - 1] = summed<BITS, M, P>;
    bodies.panels[unscaled] = P;
    if constexpr (M > LEAST) add_summed<BITS, M - 1, LEAST, P>(bodies);
}

template <int BITS, int M, int LEAST>
constexpr void add_floating(Bodies& bodies) {
    bodies.of[of_floats][M - 1] = floating<BITS, M>;
    if constexpr (BITS != TRITS) bodies.of[of_block_floats][M - 1] = floating_blocks<BITS, M>;
    bodies.panels[of_floats] = bodies.panels[of_block_floats] = 1;
    if constexpr (M > LEAST) add_floating<BITS, M - 1, LEAST>(bodies);
}

// The fewest rows of a strip, where x has more than `beyond` rows and strips of nearly equal size have at most `most`.
constexpr int fewest(int64_t beyond, int most) {
    int64_t least = most;
    for (int64_t rows = beyond + 1; rows <= beyond + most * most; rows++) {
        const int64_t strips = (rows + most - 1) / most;
        if (rows / strips < least) least = rows / strips;
    }
    return int(least);
}

template <int BITS>
constexpr Bodies reading_once() {
    constexpr int rows = READ_ONCE.rows, least = fewest(IN_REGISTERS.rows, rows);
    Bodies bodies{};
    add_scaled<BITS, rows, least, READ_ONCE.panels_scaled>(bodies);
    add_summed<BITS, rows, least, READ_ONCE.panels_summed>(bodies);
    return bodies;
}

template <int BITS, int ROWS, int FLOATS>
constexpr Bodies reading_planes() {
    Bodies bodies{};
    add_scaled<BITS, ROWS, 1, IN_REGISTERS.panels_scaled>(bodies);
    add_summed<BITS, ROWS, 1, IN_REGISTERS.panels_summed>(bodies);
    add_floating<BITS, FLOATS, 1>(bodies);
    return bodies;
}

// Unpacked codes whose width makes a difference: as 4 bits come all that are narrower. Where a dot product takes bytes
// of any width, all are the same.
constexpr int unpacked(int bits) { return UNPACKED + (!PAIRS ? 7 : bits < 4 ? 4 : bits); }

// Planes and trits that were unpacked. Planes may share x with 8 bits, which take larger strips from fewer rows on.
template <int BITS>
constexpr Bodies reading_bytes() {
    constexpr int rows = FROM_BYTES.rows, planes = fewest(ROWS_IN_REGISTERS_8_BITS, rows);
    constexpr int trits = fewest(ROWS_IN_REGISTERS_TRITS_SCALED, rows), codes = unpacked(BITS);
    Bodies bodies{};
    add_scaled<codes, rows, (trits < planes ? trits : planes), FROM_BYTES.panels_scaled>(bodies);
    add_summed<codes, rows, planes, FROM_BYTES.panels_summed>(bodies);
    add_floating<unpacked(7), FLOAT_ROWS, fewest(ROWS_IN_REGISTERS_8_BITS, FLOAT_ROWS)>(bodies);
    return bodies;
}

constexpr Bodies reading_trits() {
    Bodies bodies{};
    add_scaled<TRITS, TRITS_ROWS_SCALED, 1, BUNDLE>(bodies);
    add_summed<TRITS, TRITS_ROWS_SUMMED, 1, BUNDLE>(bodies);
    add_floating<TRITS, 1, 1>(bodies);
    return bodies;
}

// Bundles that were unpacked. Scaled, they are panels like others; summed, strips may be as tall as those of another
// product that shares x and is scaled.
constexpr Bodies reading_bytes_of_trits() {
    Bodies bodies{};
    constexpr int rows = FROM_BYTES.rows, shared = fewest(ROWS_IN_REGISTERS_TRITS_SCALED, rows);
    constexpr int own = fewest(ROWS_IN_REGISTERS_TRITS_SUMMED, TRITS_ROWS_SUMMED_FROM_BYTES);
    if constexpr (!SCALAR) add_summed<unpacked(TRITS), rows, (own < shared ? own : shared), BUNDLE>(bodies);
    return bodies;
}

// By bits, TRITS and LOOKED_UP among them. 8 bits are read as they are for any number of rows, if products of words are
// not faster; what was looked up is, too.
constexpr int FEW_FLOATS = IN_REGISTERS.rows < FLOAT_ROWS ? IN_REGISTERS.rows : FLOAT_ROWS;
constexpr Bodies BODIES_IN_REGISTERS[10] = {
    {},
    reading_trits(),
    reading_planes<2, IN_REGISTERS.rows, FEW_FLOATS>(),
    reading_planes<3, IN_REGISTERS.rows, FEW_FLOATS>(),
    reading_planes<4, IN_REGISTERS.rows, FEW_FLOATS>(),
    reading_planes<5, IN_REGISTERS.rows, FEW_FLOATS>(),
    reading_planes<6, IN_REGISTERS.rows, FEW_FLOATS>(),
    reading_planes<7, IN_REGISTERS.rows, FEW_FLOATS>(),
    reading_planes<8, (PAIRS ? IN_REGISTERS.rows : FROM_BYTES.rows), FLOAT_ROWS>(),
    reading_planes<LOOKED_UP, IN_REGISTERS.rows, FEW_FLOATS>()};
constexpr Bodies BODIES_READ_ONCE[10] = {
    {}, {}, reading_once<2>(), reading_once<3>(), reading_once<4>(),
    reading_once<5>(), reading_once<6>(), reading_once<7>(), reading_once<8>(), reading_once<LOOKED_UP>()};
constexpr Bodies BODIES_FROM_BYTES[9] = {
    {}, reading_bytes<TRITS>(), reading_bytes<2>(), reading_bytes<3>(), reading_bytes<4>(),
    reading_bytes<5>(), reading_bytes<6>(), reading_bytes<7>(), reading_bytes<8>()};
constexpr Bodies BODIES_FROM_BYTES_OF_TRITS = reading_bytes_of_trits();
constexpr Unpack UNPACK[9] = {nullptr,        unpack_tile<TRITS>, unpack_tile<2>, unpack_tile<3>, unpack_tile<4>,
                              unpack_tile<5>, unpack_tile<6>,     unpack_tile<7>, unpack_words<8>};

// ---- the choice -----------------------------------------------------------------------------------------------------

// How codes are read: the same for all products of a call, which share the strips of x.
enum class Reading {
    in_registers,  // unpacked by the body
    once,          // the same, by bodies with more rows and fewer panels
    from_bytes,    // unpacked before, once for all rows; 8 bits need not be
};

INLINE bool takes_floats(Scaling scaling) { return scaling == of_floats || scaling == of_block_floats; }
INLINE bool in_blocks(Scaling scaling) {
    return scaling == of_blocks || scaling == of_half_blocks || scaling == of_block_floats;
}

INLINE Scaling scaling_of(Activations how, const Weights& w) {
    if (how == Activations::floats) return w.in_blocks() ? of_block_floats : of_floats;
    if (w.in_blocks()) return w.group == TILE / 2 ? of_half_blocks : of_blocks;
    if (w.group == TILE) return scale_of_tile;
    if (w.group != 0) return scale_of_group;
    return how == Activations::spans ? scale_of_row : unscaled;
}

// How the rows of x are read, and how many a strip has at most.
struct Strips {
    Reading reading;
    int rows;
};

INLINE Strips strips_for(int64_t rows, Activations how, const Product* products, int count) {
    const bool floats = how == Activations::floats;
    bool bytes = false, all_unscaled = true;
    for (int i = 0; i < count; i++) {
        bytes |= products[i].weights.bits == 8;
        all_unscaled &= scaling_of(how, products[i].weights) == unscaled;
    }
    if (products[0].weights.bits == TRITS) {  // then all are
        if (floats) return {Reading::in_registers, 1};
        const int64_t limit = all_unscaled ? ROWS_IN_REGISTERS_TRITS_SUMMED : ROWS_IN_REGISTERS_TRITS_SCALED;
        if (rows <= limit) return {Reading::in_registers, all_unscaled ? TRITS_ROWS_SUMMED : TRITS_ROWS_SCALED};
        return {Reading::from_bytes, all_unscaled ? TRITS_ROWS_SUMMED_FROM_BYTES : FROM_BYTES.rows};
    }
    if (rows > (bytes ? ROWS_IN_REGISTERS_8_BITS : ROWS_IN_REGISTERS)) {
        return {Reading::from_bytes, floats ? FLOAT_ROWS : FROM_BYTES.rows};
    }
    if (floats) return {Reading::in_registers, FEW_FLOATS};
    if (rows <= IN_REGISTERS.rows) return {Reading::in_registers, IN_REGISTERS.rows};
    return {Reading::once, READ_ONCE.rows};
}

// How the units of one product are multiplied.
struct Method {
    Scaling scaling;
    const Body* bodies;  // for strips of so many rows, one less than the index
    int body_panels;     // that a body multiplies at once
    int unit_panels;     // of a unit of work, a multiple of that
    Unpack unpack;       // called once for each tile; null: bodies read the packed codes
    bool words;          // x, and what is unpacked, are words
    int shift;           // what products leave out of every code

    INLINE int tile_bytes() const { return words ? WORD_TILE : BYTE_TILE; }  // of a panel's unpacked tile
};

INLINE Method method_of(Activations how, const Weights& w, Reading reading) {
    const Scaling scaling = scaling_of(how, w);
    const bool trits = w.bits == TRITS;
    const int shift = trits ? SHIFT<TRITS> : in_bytes(w.bits) ? SHIFT<8> : 0;
    const auto with = [&](const Bodies& bodies, Unpack unpack) FLAT {
        return Method{scaling, bodies.of[scaling], bodies.panels[scaling], bodies.panels[scaling], unpack, false, shift};
    };
    if (PAIRS && in_bytes(w.bits) && reading == Reading::from_bytes && !takes_floats(scaling)) {
        Method method = with(BODIES_FROM_BYTES[8], w.bits == 8 ? UNPACK[8] : unpack_words<LOOKED_UP>);
        method.words = true;
        method.shift = 0;
        return method;
    }
    if (reading == Reading::once) return with(BODIES_READ_ONCE[w.bits], nullptr);
    if (reading == Reading::in_registers || w.bits == 8) return with(BODIES_IN_REGISTERS[w.bits], nullptr);
    if (w.bits == LOOKED_UP) return with(BODIES_IN_REGISTERS[8], unpack_tile<LOOKED_UP>);
    if (!trits) return with(BODIES_FROM_BYTES[w.bits], UNPACK[w.bits]);
    if (scaling == unscaled) return with(BODIES_FROM_BYTES_OF_TRITS, UNPACK[TRITS]);
    Method method = with(BODIES_FROM_BYTES[TRITS], UNPACK[TRITS]);
    method.unit_panels = 2 * BUNDLE;  // whole bundles, of which bodies multiply an even number of panels
    return method;
}

}  // namespace
}  // namespace spicerack::SPICERACK_ISA
