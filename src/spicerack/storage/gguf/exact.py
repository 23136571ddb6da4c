"""Which type of GGUF holds the numbers of a scheme to the bit, and a tensor of that scheme as the type has it.

A type holds its own scheme. The numbers of others are sometimes the same: of integers times a float, which is most of
them, a type of integers holds all whose range it has and whose groups are whole blocks of its own; their scale is then
repeated. What a scheme adds to integers is turned into such first:

    zero points    code - zero is an integer, of twice the range: w4g32z lies in Q5_0 whatever its scales, and in Q4_1,
                   which is smaller, where float16 holds -zero * scale
    halves         code + 1/2 is an odd integer, with half the scale: w2g32h lies in Q4_0
    minima         those of floats are repeated like scales: w4g64m lies in Q4_1
    long groups    where a scale is that of 256 columns at least, a super-block has it, with scales of blocks that are
                   all 1: rows of w3 lie in Q3_K, of w6 in Q6_K, of w4 with zero points in Q4_K

A type's `Rule` says what it takes of these; what its numbers then are is exact in float32, step by step, so that
whoever decodes them gets the bits that the codec gives. What depends on values alone is whether float16 holds the
scales (those of models in bfloat16 have three bits less and a far wider range).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.qtensor import QTensor, Scale, codes_dtype
from spicerack.numerics.scheme import Scheme, parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.gguf.ggml import GgmlType


@dataclass(frozen=True, slots=True)
class Integers:
    """The integers that a scheme's numbers are, in units of its scale or, of halves, of half its scale.

    lo, hi   the least and the greatest that any tensor of the scheme may have
    halves   the scale is to be halved
    """

    lo: int
    hi: int
    halves: bool


def scheme_of(type_: GgmlType) -> Scheme:
    """The scheme that the blocks of a type are. The type has one (`GgmlType.scheme`)."""
    assert type_.scheme is not None
    return parse(type_.scheme)


def same_numbers(scheme: Scheme, own: Scheme) -> bool:
    """Whether two schemes differ in nothing but their names, the float type of scales, and activations."""

    def part(kind: object) -> object:
        return (kind.levels, kind.group) if isinstance(kind, Scheme) else kind is not None and kind != "float8_e8m0fnu"

    return (scheme.levels, scheme.group, scheme.zero, part(scheme.scale), part(scheme.min)) == (
        own.levels, own.group, own.zero, part(own.scale), part(own.min)
    )  # fmt: skip


def scheme_obstacle(type_: GgmlType, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why no tensor of `scheme`, [.., N, K] of `shape`, has numbers that `type_` holds, or None; known without one."""
    if type_.scheme is None:
        return "it has no scheme of ours"
    if shape[-1] % type_.block:
        return f"rows of {shape[-1]} are no whole blocks of {type_.block}"
    own = scheme_of(type_)
    if same_numbers(scheme, own):
        return None
    minimum = _has_minima(scheme)
    reason = scheme.levels_obstacle or (None if minimum else scheme.scale_obstacle)
    if reason or scheme.scale == "float8_e8m0fnu":
        return reason or "its scales are powers of two"
    if own.levels.integers is None:
        return f"{type_} has no integers"
    if minimum and own.min != "float16":
        return f"its groups have minima, {type_} has none of their own"
    columns = scheme.group[1] or shape[-1]
    if columns % type_.block:
        return f"its groups of {columns} are no whole blocks of {type_.block}"
    return _range_obstacle(type_, scheme, own)


def _has_minima(scheme: Scheme) -> bool:
    """Whether groups are codes from 0 on times a float, plus a float."""
    floats = not isinstance(scheme.scale, Scheme) and not isinstance(scheme.min, Scheme)
    return scheme.min is not None and floats and scheme.levels.lo == 0


def _range_obstacle(type_: GgmlType, scheme: Scheme, own: Scheme) -> str | None:
    """Why the codes of a scheme of integers are none of the type's, or None."""
    levels, integers = own.integers, integers_of(scheme)
    if own.min is not None:
        return None if scheme.bits <= own.bits else f"{type_} has {own.bits} bits"
    if (levels.lo <= integers.lo and integers.hi <= levels.hi) or _negated(levels, integers):
        return None
    return f"its numbers are {integers.lo} to {integers.hi} times a float, {type_} has {levels.lo} to {levels.hi}"


def integers_of(scheme: Scheme) -> Integers:
    """The `Integers` of a scheme whose levels are integers."""
    levels = scheme.integers
    if levels.half:
        return Integers(2 * levels.lo + 1, 2 * levels.hi + 1, halves=True)
    width = levels.hi - levels.lo
    return Integers(-width, width, halves=False) if scheme.zero else Integers(levels.lo, levels.hi, halves=False)


def _negated(levels: IntLevels, integers: Integers) -> bool:
    """Whether the integers fit with the other sign (those of w2 in Q2_0, which has -1 to 2), and only so."""
    fits = levels.lo <= integers.lo and integers.hi <= levels.hi
    return not fits and levels.lo <= -integers.hi and -integers.lo <= levels.hi


def is_rare(type_: GgmlType, scheme: Scheme) -> bool:
    """Whether a type without a `scheme_obstacle` holds a tensor of `scheme` only by chance: where float16 has room for
    the product of every scale with its zero point, of which most have more bits than that."""
    own, levels = scheme_of(type_), scheme.levels.integers
    return own.min == "float16" and scheme.min is None and (scheme.zero or (levels is not None and levels.half))


class InexactError(Exception):
    """A number that float16 does not hold; its text says which, and where."""


def converted(type_: GgmlType, q: QTensor | Undecoded) -> QTensor | Undecoded:
    """The numbers of q, of a scheme without a `scheme_obstacle`, in the type's own scheme; undecoded where they were
    and every code is what it was.

    Raises InexactError, naming the first row, where float16 does not hold its scales or minima.
    """
    own = scheme_of(type_)
    if same_numbers(q.scheme, own):
        return _renamed(q, own)
    if _keeps_codes(q.scheme, own):
        scale = _of_blocks(own.scale, _halves(q.plain_scale, q.shape, type_.block, "scale"), 1)
        low = _halves(q.min, q.shape, type_.block, "minimum") if isinstance(q.min, torch.Tensor) else None
        return replace(q, scheme=own, scale=scale, zero=None, min=low, input_scale=None)
    q = q.qtensor() if isinstance(q, Undecoded) else q
    scale = _spread(q.plain_scale, q.shape, type_.block).float()
    zero = None if q.zero is None else _spread(q.zero, q.shape, type_.block)
    if isinstance(q.min, torch.Tensor):
        low = in_float16(_spread(q.min, q.shape, type_.block).float(), "minimum")
        return QTensor(own, q.codes, in_float16(scale, "scale"), min=low)
    if own.min is not None:
        return _with_minimum(q, own, scale, zero)
    codes = q.codes
    if q.scheme.integers.half:
        codes, scale = 2 * codes + 1, scale / 2
    elif zero is not None:
        # in bytes: what a type holds has at most 8 bits, and is right modulo 256
        codes = (codes.view(torch.int8).unflatten(-1, (-1, type_.block)) - zero[..., None]).flatten(-2)
    if _negated(own.integers, integers_of(q.scheme)):
        codes, scale = -codes, -scale
    return QTensor(own, codes.to(codes_dtype(own)), _of_blocks(own.scale, in_float16(scale, "scale"), 1))


def _keeps_codes(scheme: Scheme, own: Scheme) -> bool:
    """Whether a type's codes are those of a scheme that it holds: the same integers, in as many bits."""
    levels, others = scheme.integers, own.integers
    same = (levels.lo, levels.half, scheme.bits) == (others.lo, others.half, own.bits)
    return same and not scheme.zero and _has_minima(scheme) == (own.min is not None)


def _halves(part: torch.Tensor, shape: tuple[int, ...], block: int, noun: str) -> torch.Tensor:
    """One float16 for each block of each row. Raises InexactError; looked at are those that are there."""
    stored = part.to(torch.float16)
    if part.dtype != torch.float16 and bool((stored.float() - part.float()).any()):  # NaN is not 0
        return in_float16(_spread(part, shape, block).float(), noun)
    return _spread(stored, shape, block)


def _renamed(q: QTensor | Undecoded, own: Scheme) -> QTensor | Undecoded:
    """q in the scheme `own`, which is its own but for the name and the types of floats."""

    def part(part: Scale, kind: object, noun: str) -> Scale:
        if isinstance(part, QTensor):
            assert isinstance(kind, Scheme)
            renamed = _renamed(part, kind)
            assert isinstance(renamed, QTensor), "scales are decoded"
            return renamed
        narrow = kind in ("source", "float16") and part.dtype != torch.float16
        return in_float16(part.float(), noun) if narrow else part

    low = None if q.min is None else part(q.min, own.min, "minimum")
    return replace(q, scheme=own, scale=part(q.scale, own.scale, "scale"), min=low, input_scale=None)


def _with_minimum(q: QTensor, own: Scheme, scale: torch.Tensor, zero: torch.Tensor | None) -> QTensor:
    """Integers as codes from 0 on and a minimum: scale * code + min, where min = -scale * (zero - lowest code).

    own: of floats, or of super-blocks, whose minimum is an integer times the scale or, of halves, half of it. scale,
    zero: of each block, float32 and integers.
    """
    levels = q.scheme.integers
    codes = (q.codes - levels.lo).view(torch.uint8)  # int8 has room: types with minima have at most 5 bits
    below = torch.full_like(scale, -levels.lo) if zero is None else zero.float() - levels.lo
    if levels.half:
        below = below - 0.5
    stored = in_float16(scale, "scale")
    if not isinstance(own.min, Scheme):
        return QTensor(own, codes, stored, min=in_float16(-scale * below, "minimum, -zero * scale,"))
    parts = 2 if levels.half else 1
    unit = in_float16(-scale / parts, "scale")
    return QTensor(own, codes, _of_blocks(own.scale, stored, 1), min=_of_blocks(own.min, unit, below * parts))


def _of_blocks(kind: object, scale: torch.Tensor, count: torch.Tensor | int) -> Scale:
    """Scales of super-blocks as a scheme has them: themselves where it has floats, else `count` for each of its
    blocks."""
    if not isinstance(kind, Scheme):
        return scale
    size = kind.group[1]
    assert size is not None
    codes = torch.as_tensor(count, dtype=torch.float32, device="cpu").expand(scale.shape)
    return QTensor(kind, codes.to(codes_dtype(kind)).repeat_interleave(size, -1), scale)


def _spread(part: torch.Tensor, shape: tuple[int, ...], block: int) -> torch.Tensor:
    """One scale (or zero point) for each block of each row, [.., N, K / block], of those of whole groups."""
    *_, rows, columns = shape
    part = part.repeat_interleave(rows // part.shape[-2], -2) if part.shape[-2] != rows else part
    blocks = columns // block
    return part.repeat_interleave(blocks // part.shape[-1], -1) if part.shape[-1] != blocks else part


def in_float16(values: torch.Tensor, noun: str) -> torch.Tensor:
    """float32 [.., N, blocks] in float16. Raises InexactError for the first number that it does not hold, with its
    row."""
    stored = values.to(torch.float16)
    lost = (stored.float() != values) | ~torch.isfinite(stored)
    if bool(lost.any()):
        place = [int(i) for i in lost.nonzero()[0]]
        others = f" and of {count - 1} others" if (count := int(lost.sum())) > 1 else ""
        raise InexactError(
            f"float16 does not hold the {noun} {float(values[tuple(place)]):.9g} of {row_of(place)}, "
            f"block {place[-1]}{others}"
        )
    return stored


def row_of(place: list[int]) -> str:
    """Words for the row of [.., row, block]; of stacks the matrix, too."""
    return f"row {place[-2]}" if len(place) == 2 else f"matrix {', '.join(map(str, place[:-2]))}, row {place[-2]}"
