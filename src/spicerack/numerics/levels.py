"""Rounding: numbers to codes, codes to levels, scales to the type they are stored in. Float32, in torch."""

from __future__ import annotations

import torch

from spicerack.numerics.scheme import FloatType, IntLevels, Levels, TableLevels

SMALLEST = 2.0**-126
"""The smallest scale, whatever the type: below it 1 / scale would overflow."""


def nearest(u: torch.Tensor, levels: Levels, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Codes whose level minus `zero` is nearest to u (float32); halfway goes to the even code, in tables downwards.

    Half-integer levels are integers with a zero of -1/2. Of codes with equal levels (+0 and -0) the first is chosen.
    """
    if isinstance(levels, IntLevels):
        return torch.clamp(torch.round(u + _offset(levels, zero)), levels.lo, levels.hi)
    values, codes = _sorted_table(levels)
    middles = torch.tensor(values, device=u.device)
    return torch.tensor(codes, device=u.device)[torch.bucketize(u, (middles[1:] + middles[:-1]) / 2)]


def level_values(codes: torch.Tensor, levels: Levels, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
    """float32 level[code] - zero."""
    if isinstance(levels, IntLevels):
        return codes.float() - _offset(levels, zero)
    return torch.tensor(levels.values, device=codes.device)[codes.long()]


def _offset(levels: IntLevels, zero: torch.Tensor | float) -> torch.Tensor | float:
    return -0.5 if levels.half else zero


def _sorted_table(levels: TableLevels) -> tuple[list[float], list[int]]:
    first: dict[float, int] = {}
    for code, value in enumerate(levels.values):
        first.setdefault(value, code)
    values = sorted(first)
    return values, [first[value] for value in values]


def dtype_of(kind: FloatType, source: torch.dtype) -> torch.dtype:
    """The stored type of a scale for weights of type `source`."""
    if kind != "source":
        dtype = getattr(torch, kind)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if source == torch.bfloat16 else torch.float16


def store(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 -> the nearest value of the stored type, as float32; 0 if that is below SMALLEST."""
    stored = scale.to(dtype).float()
    return torch.where(stored.abs() < SMALLEST, 0.0, stored)
