"""Scales as they are stored: in which type, and rounded to it. Torch.

A scale is judged, and codes are chosen against it, only after it has been rounded to the type in which it will lie on
disk; nobody computes with a scale that no reader will see.
"""

from __future__ import annotations

import torch

from spicerack.numerics.scheme import FloatType, Scheme

SMALLEST = 2.0**-126
"""The smallest scale, whatever the type: the smallest normal float32. Below it 1 / scale would overflow."""
_TYPES: dict[FloatType, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}


def dtype_of(kind: FloatType | Scheme, source: torch.dtype) -> torch.dtype:
    """The type of a scale or minimum `kind` for weights that were of type `source`.

    "source" is bfloat16 for bfloat16 and float16 for all others. Scales that are themselves quantized are float32 until
    they are encoded, and again once they are decoded.
    """
    if isinstance(kind, Scheme):
        return torch.float32
    if kind == "source":
        return torch.bfloat16 if source == torch.bfloat16 else torch.float16
    return _TYPES[kind]


def store(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales float32 -> the nearest values that `dtype` stores, as float32; 0 for those below SMALLEST, infinity above
    its largest: both are refused later, by name."""
    stored = scale.to(dtype).float()
    return torch.where(stored.abs() < SMALLEST, 0.0, stored)


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest positive scale that is stored in `dtype`: its smallest subnormal, but never below SMALLEST."""
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, SMALLEST)
