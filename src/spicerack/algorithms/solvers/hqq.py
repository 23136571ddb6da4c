"""HQQ: scale and zero for which most weights are close and a few may be far, without data (Badri & Shaji 2023).

    minimise  sum_j |w_j - s (q_j - z)|^p,   p = 0.7,   split into e ~ w - s (q - z) and a penalty beta on the rest:

    q = nearest code to w / s + z
    e = shrink(w - s (q - z)),    shrink(r) = sign(r) max(|r| - |r|^(p-1) / beta, 0)
    z = mean(q - (w - e) / s)     where the scheme has zero points
    s = sum v (w - e) / sum v^2,    v = q - z
    beta *= kappa

After each step scale and zero are judged as they are stored, by the sum itself; each block keeps its best, those of
`start` among them, so that no block gets worse by this measure. https://mobiusml.github.io/hqq_blog
"""

from __future__ import annotations

import dataclasses

import torch

from spicerack.algorithms.solved import Solved
from spicerack.numerics.codec import from_blocks, to_blocks
from spicerack.numerics.levels import IntLevels, level_values, nearest
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import store
from spicerack.numerics.scheme import Scheme

P = 0.7
BETA = 10.0
"""Of weights divided by the mean magnitude of their block: the penalty is no matter of units."""
KAPPA = 1.01
STEPS = 20
_CHUNK = 1 << 24
"""Weights at once."""


def fits(scheme: Scheme) -> bool:
    """Whether levels are integers, and scales plain numbers."""
    return scheme.min is None and not isinstance(scheme.scale, Scheme) and isinstance(scheme.levels, IntLevels)


def solve(w: torch.Tensor, start: QTensor) -> Solved:
    """w [..., N, K], rounded to `start` -> codes, scales and zero points with less error to the power P.

    `start` itself, with an event, for a scheme that does not fit.
    """
    if not fits(start.scheme):
        return Solved(start, (f"hqq cannot do {start.scheme}: rounded to nearest",))
    assert isinstance(start.scale, torch.Tensor)
    block = start.scheme.block_shape(*start.shape[-2:])
    x = to_blocks(w, block)
    scale = start.scale.float().reshape(-1, 1)
    zero = torch.zeros_like(scale) if start.zero is None else start.zero.float().reshape(-1, 1)
    step = max(_CHUNK // x.shape[1], 1)
    found = [
        _blocks(some, s, z, start.scheme, start.scale.dtype)
        for some, s, z in zip(x.split(step), scale.split(step), zero.split(step), strict=True)
    ]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    q = dataclasses.replace(
        start,
        codes=from_blocks(codes, start.shape, block).to(start.codes.dtype).contiguous(),
        scale=scale.reshape(start.scale.shape).to(start.scale.dtype),
        zero=None if start.zero is None else zero.reshape(start.zero.shape).to(start.zero.dtype),
    )
    return Solved(q)


def shrink(r: torch.Tensor, beta: float, p: float = P) -> torch.Tensor:
    """The e that (nearly) minimises |e|^p + beta / 2 (e - r)^2; exactly for p = 1, the soft threshold."""
    size = r.abs()
    return r.sign() * (size - size.clamp(min=1e-8) ** (p - 1) / beta).clamp(min=0)


def _blocks(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, B], scale and zero [M, 1] -> codes, scale, zero."""
    levels = scheme.levels
    assert isinstance(levels, IntLevels)
    unit = x.float().abs().mean(1, keepdim=True)
    unit = torch.where(unit == 0, 1.0, unit)
    x = x.float() / unit
    best_scale, best_zero, best = scale, zero, _error(x, scale / unit, zero, levels)
    beta = BETA
    for _ in range(STEPS):
        s = scale / unit
        v = level_values(nearest(x / s, levels, zero), levels, zero)
        rest = x - shrink(x - s * v, beta)
        if scheme.zero:
            shift = (v - rest / s).mean(1, keepdim=True)
            zero, v = zero + shift, v - shift
        wanted = (v * rest).sum(1, keepdim=True) / v.square().sum(1, keepdim=True) * unit
        scale = torch.where(torch.isfinite(wanted) & (wanted != 0), wanted, scale)
        beta *= KAPPA
        stored, rounded = store(scale, dtype), zero.round().clamp(levels.lo, levels.hi)
        usable = (stored != 0) & torch.isfinite(stored)
        stored = torch.where(usable, stored, best_scale)
        error = _error(x, stored / unit, rounded, levels)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, stored, best_scale), torch.where(better, rounded, best_zero)
    return nearest(x * unit / best_scale, levels, best_zero), best_scale, best_zero


def _error(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: IntLevels) -> torch.Tensor:
    """float64 [M, 1]: sum |x - s (q - z)|^P."""
    decoded = scale * level_values(nearest(x / scale, levels, zero), levels, zero)
    return (x - decoded).abs().pow(P).sum(1, keepdim=True, dtype=torch.float64)
