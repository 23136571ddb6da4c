"""What codes stand for: `Levels`, the interface, and the three kinds that there are. Imports no torch by itself.

A code is an integer; its level is what it counts for in units of its group's scale. Everything else asks a scheme's
levels the questions of `Levels` and never which class they are, so that another kind (a codebook whose codes stand for
several weights each, say) is one more class, in the file of the scheme that needs it:

    IntLevels     lo..hi, or halfway between: uniform grids        w4g128, w2g32h, ternary, q4_k
    TableLevels   any values, by code                              nf4
    FloatLevels   a small float's values, by bit pattern           fp8, and the codes and scales of mxfp4 and nvfp4

Only integers have zero points. That they are integers is asked with `integers`, by those whose arithmetic is that of
integers: native code, kernels, and algorithms that learn where a grid lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Levels(Protocol):
    """What each code lo..hi of a scheme stands for, in units of the scale; frozen, hashable, compared by value."""

    @property
    def lo(self) -> int:
        """The smallest code; negative codes are stored as int8, others as uint8."""

    @property
    def hi(self) -> int:
        """The largest code. All codes from `lo` to `hi` stand for something."""

    @property
    def bits(self) -> int:
        """Bits that a code takes where codes are packed: 1 to 8, see `scheme.MAX_BITS`."""

    @property
    def weights(self) -> int:
        """How many weights, neighbours in a row, one code stands for: 1 but for codebooks. A power of two."""

    @property
    def lowest(self) -> float:
        """The smallest level."""

    @property
    def highest(self) -> float:
        """The largest level."""

    @property
    def mirrored(self) -> bool:
        """Whether -x is a level wherever x is: then scales of one sign give all that scales of both signs would."""

    @property
    def integers(self) -> IntLevels | None:
        """The levels themselves where they are integers (or halfway between), with `lo`, `hi` and `half`; else None."""

    def encode(self, u: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Numbers u float32 [..., B], in units of the scale -> [..., B / weights], the codes whose level is nearest.

        zero: of integers, what is subtracted from the level; it broadcasts to u. Of codes that are equally near, which
        one is the kind's own rule. Codes come in whatever type is at hand: those who keep them convert.
        """

    def decode(self, codes: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Codes [..., B / weights] of any type -> level[code] - zero, float32 [..., B]."""


@dataclass(frozen=True, slots=True)
class IntLevels:
    """Codes are the integers lo..hi and stand for themselves, or, with `half`, for code + 1/2.

    Half-integer levels are integers with a zero of -1/2: that is how they are computed, here as in C++. They therefore
    have no other zero point.
    """

    lo: int
    hi: int
    half: bool = False

    @property
    def bits(self) -> int:
        """See `Levels.bits`."""
        return _bits(self.hi - self.lo)

    @property
    def weights(self) -> int:
        """One: a code is a weight's own."""
        return 1

    @property
    def lowest(self) -> float:
        """lo, or lo + 1/2 of half-integer levels."""
        return self.lo + 0.5 * self.half

    @property
    def highest(self) -> float:
        """hi, or hi + 1/2 of half-integer levels."""
        return self.hi + 0.5 * self.half

    @property
    def mirrored(self) -> bool:
        """See `Levels.mirrored`: -1, 0, 1 are, and all halves; the full range of two's complement is not."""
        return -self.lowest == self.highest

    @property
    def integers(self) -> IntLevels:
        """These: they are what the question asks for."""
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """The level of each code, in code order from `lo`."""
        return tuple(code + 0.5 * self.half for code in range(self.lo, self.hi + 1))

    def encode(self, u: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """float32 codes: u + zero rounded, halfway to the even code, and clipped to lo..hi. See `Levels.encode`."""
        return (u + self.offset(zero)).round().clamp(self.lo, self.hi)

    def decode(self, codes: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """float32 codes - zero, with gradients where codes or zero have some. See `Levels.decode`."""
        return codes.float() - self.offset(zero)

    def offset(self, zero: torch.Tensor | float) -> torch.Tensor | float:
        """What separates codes from units of the scale: the zero point, or the -1/2 of half-integer levels."""
        return -0.5 if self.half else zero


class _Table:
    """What levels have in common that are listed, one after the other, in `values`."""

    __slots__ = ()
    values: tuple[float, ...]

    @property
    def lo(self) -> int:
        """0: codes are places in the table."""
        return 0

    @property
    def hi(self) -> int:
        """The last index."""
        return len(self.values) - 1

    @property
    def bits(self) -> int:
        """See `Levels.bits`."""
        return _bits(self.hi)

    @property
    def weights(self) -> int:
        """One: a code is a weight's own."""
        return 1

    @property
    def lowest(self) -> float:
        """See `Levels.lowest`."""
        return min(self.values)

    @property
    def highest(self) -> float:
        """See `Levels.highest`."""
        return max(self.values)

    @property
    def mirrored(self) -> bool:
        """See `Levels.mirrored`."""
        values = set(self.values)
        return values == {-value for value in values}

    @property
    def integers(self) -> None:
        """None: a table that happens to hold integers is still looked up."""
        return

    def encode(self, u: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """int64 codes: halfway goes downwards, and of codes with equal levels (+0 and -0) the first is chosen."""
        import torch

        values, codes = _sorted(self.values)
        places = torch.bucketize(u, bounds(values).to(u.device))
        return torch.tensor(codes, dtype=torch.int64, device=u.device)[places]

    def decode(self, codes: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """float32 values[code]. See `Levels.decode`."""
        import torch

        return torch.tensor(self.values, dtype=torch.float32, device=codes.device)[codes.long()]


@dataclass(frozen=True, slots=True)
class TableLevels(_Table):
    """Code i stands for values[i], in units of the scale.

    values: at most 256; they need not be sorted, and may be listed twice, of which the first is written.
    """

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FloatLevels(_Table):
    """A small float of sign, exponent and mantissa: code i is the bit pattern i. Bias 2^(e-1)-1, with subnormals.

    Patterns above `max_value` (E4M3FN's NaN) and, with `ieee_specials`, the whole top exponent, stand for the largest
    finite value: an encoder never chooses them, because the smaller code with the same value comes first.
    """

    exponent_bits: int
    mantissa_bits: int
    max_value: float = math.inf
    ieee_specials: bool = False
    values: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bias = 2 ** (self.exponent_bits - 1) - 1
        magnitudes: list[float] = []
        for exponent in range(2**self.exponent_bits):
            for mantissa in range(2**self.mantissa_bits):
                fraction = mantissa / 2**self.mantissa_bits
                value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
                special = value > self.max_value or (self.ieee_specials and exponent == 2**self.exponent_bits - 1)
                magnitudes.append(magnitudes[-1] if special else value)
        object.__setattr__(self, "values", (*magnitudes, *(-m for m in magnitudes)))


def bounds(values: tuple[float, ...]) -> torch.Tensor:
    """float32, halfway between neighbours of values that rise."""
    import torch

    levels = torch.tensor(values, dtype=torch.float32, device="cpu")
    return (levels[1:] + levels[:-1]) / 2


def in_order(levels: Levels) -> bool:
    """Whether codes are places in a table of values that rise, so that the place of a number is its code."""
    return isinstance(levels, TableLevels) and levels.weights == 1 and levels.values == _sorted(levels.values)[0]


def _bits(last: int) -> int:
    """Bits of the codes 0..last; a single level still takes one."""
    return max(last.bit_length(), 1)


@lru_cache
def _sorted(values: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The different values in rising order, and the first code of each; remembered, because every encoding asks."""
    first: dict[float, int] = {}
    for code, value in enumerate(values):
        first.setdefault(value, code)
    rising = tuple(sorted(first))
    return rising, tuple(first[value] for value in rising)
