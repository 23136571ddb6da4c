"""How a scheme's numbers become those of panels: small integers u, minus an offset, times scales.

    levels   integers lie as they are, less the lowest. Of a table of 16 that are integers, maybe doubled (iq4_nl; the
             4-bit floats of mxfp4 and nvfp4), the codes lie as they are and u is looked up when they are multiplied;
             two levels (q1_0) are u = 0 and 1 or 2. What doubling adds to u is taken from the scale.
    scales   floats lie in their own type, powers of two as bfloat16. Those that are quantized themselves (q4_k, nvfp4)
             keep their codes, a byte each, and the floats that these are multiplied by: outer scales, of blocks.
    minima   each lies behind its group's scale, in the same type, and so do their outer scales.

All of it is exact, and `from_steps` gives back what `steps` was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from spicerack.errors import SchemeError
from spicerack.numerics.levels import FloatLevels, Levels, TableLevels
from spicerack.numerics.qtensor import QTensor, Scale, codes_dtype
from spicerack.numerics.scheme import Scheme

_E4M3 = FloatLevels(4, 3, max_value=448)
"""Scales that a byte may hold beside integers."""


class Laid(NamedTuple):
    """How levels lie: level * factor = u - offset + half / 2, u = step * (code - lo) or, in a table, table[code].

    bits     of what lies in a tile
    offset   u of the level 0
    half     levels are a half more
    step     what codes are multiplied by
    factor   1 or 2
    table    u of each of 16 codes, or nothing
    """

    bits: int
    offset: int
    half: bool = False
    step: int = 1
    factor: int = 1
    table: tuple[int, ...] = ()


def laid(scheme: Scheme) -> Laid:
    """How the levels of a scheme lie. Raises SchemeError for a scheme with an `obstacle` in its levels."""
    levels = _laid(scheme.levels)
    if levels is None:
        raise SchemeError(f"{scheme}: {scheme.levels_obstacle}", "use integer levels, such as w4g32")
    return levels


def _laid(levels: Levels) -> Laid | None:
    """How levels lie, or None. It is plain Python on numbers, which torch.compile traces; a cache it does not."""
    integers = levels.integers
    if integers is not None:
        return Laid(levels.bits, -integers.lo, integers.half) if levels.bits > 1 else None
    if not isinstance(levels, TableLevels | FloatLevels) or len(levels.values) not in (2, 16):
        return None
    for factor in (1, 2):
        scaled = [value * factor for value in levels.values]
        if all(-128 <= value <= 127 and value == int(value) for value in scaled):
            break
    else:
        return None
    u = [int(value) for value in scaled]
    if len(u) == 16:
        return Laid(4, 128, factor=factor, table=tuple(whole + 128 for whole in u))
    return Laid(2, -u[0], step=u[1] - u[0], factor=factor) if u[0] <= 0 < u[1] <= u[0] + 3 else None


def obstacle(scheme: Scheme) -> str | None:
    """Why a scheme's numbers cannot lie in panels, as the end of a sentence; None if they can."""
    levels = _laid(scheme.levels)
    if levels is None:
        return scheme.levels_obstacle or "codes have 2 to 8 bits"
    if scheme.rows_obstacle is not None:
        return scheme.rows_obstacle
    kinds = [scheme.scale] if scheme.min is None else [scheme.scale, scheme.min]
    if len({_kind(kind) for kind in kinds}) > 1:
        return "its scales and minima are stored in different ways"
    if isinstance(scheme.scale, Scheme):
        if not all(isinstance(kind, Scheme) and _byte_scales(kind) for kind in kinds):
            return "its scales are quantized themselves, and not to bytes with one float scale"
        if levels.factor != 1 and scheme.scale.scale != "float32":
            return "its scales could not be halved"
    elif scheme.scale == "float8_e8m0fnu":
        if scheme.min is not None:
            return "its minima are powers of two"
    elif levels.factor != 1:
        return "its scales could not be halved"
    return None


def block_columns(scheme: Scheme) -> int:
    """Columns of a row that share an outer scale; 0 for the whole row, or where there are none."""
    if not isinstance(scheme.scale, Scheme) or scheme.scale.group_columns is None:
        return 0
    return scheme.scale.group_columns * (scheme.group_columns or 0)


def steps(scheme: Scheme, scale: Scale, low: Scale | None) -> dict[str, torch.Tensor]:
    """Scales and minima of a matrix [N, K] as panels keep them, on the same device: "scale" and maybe "outer".

    scheme      without an `obstacle`
    scale, low  of a QTensor, [N or 1, groups]; minima may be None

    scale  [N or 1, groups], with minima [N or 1, 2 groups]: floats, or the codes of scales, int8 or float8_e4m3fn
    outer  the same of blocks, floats
    """
    factor, parts = laid(scheme).factor, [scale] if low is None else [scale, low]
    if isinstance(scale, QTensor):
        codes = [part.codes for part in parts if isinstance(part, QTensor)]
        outer = [part.plain_scale for part in parts if isinstance(part, QTensor)]
        outer[0] = outer[0] / factor if factor != 1 else outer[0]
        of_bytes = torch.int8 if scale.scheme.levels.integers is not None else torch.float8_e4m3fn
        return {"scale": _beside(codes).view(of_bytes), "outer": _beside(outer)}
    floats = [part for part in parts if isinstance(part, torch.Tensor)]
    if scheme.scale == "float8_e8m0fnu":
        floats[0] = (floats[0].float() / factor).bfloat16()
    return {"scale": _beside(floats)}


def from_steps(scheme: Scheme, kept: Mapping[str, torch.Tensor]) -> tuple[Scale, Scale | None]:
    """Inverse of `steps`: the scales and minima of a matrix [N, K], of which every row has its own copy."""
    count, factor = 1 if scheme.min is None else 2, laid(scheme).factor
    apart = {name: list(values.unflatten(1, (-1, count)).unbind(-1)) for name, values in kept.items()}
    scales = [values.contiguous() for values in apart["scale"]]
    if not isinstance(scheme.scale, Scheme):
        if scheme.scale == "float8_e8m0fnu":
            scales[0] = (scales[0].float() * factor).to(torch.float8_e8m0fnu)
        if scheme.group == (None, None):
            scales = [values[:1] for values in scales]  # all rows have a copy of it
        return scales[0], scales[1] if count == 2 else None
    outer = [values.contiguous() for values in apart["outer"]]
    outer[0] = outer[0] * factor if factor != 1 else outer[0]
    parts = []
    for kind, codes, floats in zip((scheme.scale, scheme.min), scales, outer, strict=False):
        assert isinstance(kind, Scheme)
        floats = floats[:1] if kind.group == (None, None) else floats
        parts.append(QTensor(kind, codes.view(codes_dtype(kind)), floats))
    return parts[0], parts[1] if count == 2 else None


def _beside(parts: list[torch.Tensor]) -> torch.Tensor:
    """[N, G] of each -> [N, G * parts]: those of a group side by side."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, -1).flatten(1)


def _kind(kind: object) -> object:
    """What scales and minima of one matrix have in common."""
    return (_is_e4m3(kind), kind.group, kind.scale) if isinstance(kind, Scheme) else kind


def _is_e4m3(scheme: Scheme) -> bool:
    return scheme.levels == _E4M3


def _byte_scales(scheme: Scheme) -> bool:
    """Whether scales of this scheme are a byte times a float of a row, of a block of its groups, or of the tensor."""
    levels = scheme.levels.integers
    in_a_byte = levels is not None and not levels.half and levels.lo >= -128 and levels.hi <= 127
    floats = not isinstance(scheme.scale, Scheme) and scheme.scale != "float8_e8m0fnu"
    return (
        (in_a_byte or _is_e4m3(scheme))
        and floats
        and not scheme.zero
        and scheme.min is None
        and not scheme.rows_obstacle
    )
