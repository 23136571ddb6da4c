"""Activations as int8, as kernels round them: with a scale for each token, or one that calibration found."""

from __future__ import annotations

import torch


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [..., K] -> (integers -127..127 as float32 [..., K], scale [..., 1]); x ~ integers * scale."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.round(x / scale).clamp(-127, 127), scale


def quantize_fixed(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x float32 -> integers -127..127 as float32; x ~ integers * scale, but for what lies beyond 127 * scale."""
    return torch.round(x / scale).clamp(-127, 127)
