"""Activations as int8, as kernels round them: with a scale for each token, or one that calibration chose.

Codes are -127..127: no sign is favoured, and the sum of two products with codes of 8 bits stays below 2^15, as AVX2's
instructions need it. This is the specification: kernels make the same codes on the way to their products, and training
multiplies by what they count for.
"""

from __future__ import annotations

import torch


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [..., K] -> (integers -127..127 as float32 [..., K], scale float32 [..., 1]); x ~ integers * scale.

    A token's scale is its largest magnitude / 127, so that nothing is clipped; one of zeros has scale 1. Halfway goes
    to the even integer.
    """
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.round(x / scale).clamp(-127, 127), scale


def quantize_fixed(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x float32 -> integers -127..127 as float32; x ~ integers * scale, but for what lies beyond 127 * scale.

    scale: a positive number, or a tensor that broadcasts to x. x is divided by the scale, not multiplied by its
    inverse: that is what other readers of a stored scale do, and the two differ by a code now and then.
    """
    return torch.round(x / scale).clamp(-127, 127)
