"""Which type of GGUF holds the numbers of a scheme to the bit, and a tensor of that scheme as the type has it.

A type holds its own scheme. The numbers of others are sometimes the same: of integers times a float, which is most of
them, a type of integers holds all whose range it has and whose groups are whole blocks of its own; their scale is then
repeated. What a scheme adds to integers is turned into such first:

    zero points    code - zero is an integer, of twice the range: w4g32z lies in Q5_0 whatever its scales, and in Q4_1,
                   which is smaller, where float16 holds -zero * scale
    halves         code + 1/2 is an odd integer, with half the scale: w2g32h lies in Q4_0
    long groups    where a scale is that of 256 columns at least, a super-block has it, with scales of blocks that are
                   all 1: rows of w3 lie in Q3_K, of w6 in Q6_K, of w4 with zero points in Q4_K

A type's `Rule` says what it takes of these; what its numbers then are is exact in float32, step by step, so that
whoever decodes them gets the bits that the codec gives. What depends on values alone is whether float16 holds the
scales (those of models in bfloat16 have three bits less and a far wider range).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage.gguf.types import GgmlType

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
    if scheme.levels_obstacle or scheme.scale_obstacle or scheme.scale == "float8_e8m0fnu":
        return scheme.levels_obstacle or scheme.scale_obstacle or "its scales are powers of two"
    if own.levels.integers is None:
        return f"{type_} has no integers"
    columns = scheme.group[1] or shape[-1]
    if columns % type_.block:
        return f"its groups of {columns} are no whole blocks of {type_.block}"
    return _range_obstacle(type_, scheme, own)


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


def converted(type_: GgmlType, q: QTensor) -> QTensor | str:
    """The numbers of q, of a scheme without a `scheme_obstacle`, in the type's own scheme; or why its values do not
    fit, naming the first row that does not."""
    own = scheme_of(type_)
    if same_numbers(q.scheme, own):
        return _renamed(q, own)
    shape, integers = q.shape, integers_of(q.scheme)
    scale, zero = (None if part is None else _spread(part, shape, type_.block) for part in (q.plain_scale, q.zero))
    assert scale is not None
    if own.min is not None:
        return _with_minimum(q, own, scale, zero)
    codes, scale = q.codes, scale.float()
    if integers.halves:
        codes, scale = 2 * codes + 1, scale / 2
    elif zero is not None:
        codes = (codes.unflatten(-1, (-1, type_.block)).short() - zero[..., None]).flatten(-2).to(torch.int8)
    if _negated(own.integers, integers):
        codes, scale = -codes, -scale
    stored = in_float16(scale, "scale")
    if isinstance(stored, str):
        return stored
    return QTensor(own, codes.to(codes_dtype(own)), _of_blocks(own.scale, stored, 1))


def _renamed(q: QTensor, own: Scheme) -> QTensor | str:
    """q in the scheme `own`, which is its own but for the name and the types of floats."""
    parts: dict[str, torch.Tensor | QTensor | None] = {}
    for name, part, kind in (("scale", q.scale, own.scale), ("min", q.min, own.min)):
        if isinstance(part, QTensor):
            assert isinstance(kind, Scheme)
            part = _renamed(part, kind)
        elif part is not None and kind in ("source", "float16") and part.dtype != torch.float16:
            part = in_float16(part.float(), "minimum" if name == "min" else "scale")
        if isinstance(part, str):
            return part
        parts[name] = part
    return dataclasses.replace(q, scheme=own, **parts, transposed=False, input_scale=None)


def _with_minimum(q: QTensor, own: Scheme, scale: torch.Tensor, zero: torch.Tensor | None) -> QTensor | str:
    """Integers as codes from 0 on and a minimum: d u + min, where min = -scale * (zero - lowest code).

    Of halves and super-blocks the minimum is an integer times half the scale.
    """
    levels = q.scheme.integers
    codes = (q.codes - levels.lo).view(torch.uint8)  # bits of int8: 8-bit codes do not come here
    below = torch.tensor(-levels.lo, dtype=torch.float32) if zero is None else zero.float() - levels.lo
    if levels.half:
        below = below - 0.5
    stored = in_float16(scale.float(), "scale")
    if isinstance(stored, str):
        return stored
    if not isinstance(own.min, Scheme):
        low = in_float16(-scale.float() * below, "minimum, -zero * scale,")
        return low if isinstance(low, str) else QTensor(own, codes, stored, min=low)
    unit = in_float16(-scale.float() / 2 if levels.half else -scale.float(), "scale")
    if isinstance(unit, str):
        return unit
    count = (below * 2 if levels.half else below).expand(scale.shape)
    return QTensor(own, codes, _of_blocks(own.scale, stored, 1), min=_of_blocks(own.min, unit, count))


def _of_blocks(kind: object, scale: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor | QTensor:
    """Scales of super-blocks as a scheme has them: itself where it has floats, else `count` for each of its blocks."""
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


def in_float16(values: torch.Tensor, noun: str) -> torch.Tensor | str:
    """float32 [.., N, blocks] in float16, if that holds each of them; else the first that it does not, with its row."""
    stored = values.to(torch.float16)
    lost = (stored.float() != values) | ~torch.isfinite(stored)
    if not bool(lost.any()):
        return stored
    place = [int(i) for i in lost.nonzero()[0]]
    value = float(values[tuple(place)])
    return (
        f"float16 does not hold the {noun} {value:.9g} of {row_of(place)}, block {place[-1]}, "
        f"and {int(lost.sum()) - 1} others"
    )


def row_of(place: list[int]) -> str:
    """Words for the row of [.., row, block]: of stacks the matrix, too."""
    return f"row {place[-2]}" if len(place) == 2 else f"matrix {', '.join(map(str, place[:-2]))}, row {place[-2]}"
