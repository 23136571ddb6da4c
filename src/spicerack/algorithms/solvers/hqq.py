"""HQQ: scale and zero for which most weights are close and a few may be far, without data (Badri & Shaji 2023).

    minimise  sum_j |w_j - s (q_j - z)|^p,   p = 0.7,   split into e ~ w - s (q - z) and a penalty beta on the rest:

    q = nearest code to w / s + z
    e = shrink(w - s (q - z)),    shrink(r) = sign(r) max(|r| - |r|^(p-1) / beta, 0)
    z = mean(q - (w - e) / s)     where the scheme has zero points
    s = sum v (w - e) / sum v^2,    v = q - z
    beta *= kappa

It is what there is for low bits without a text: rounding to nearest weighs all errors by their squares, so that a far
outlier widens its group's steps for all; to the power 0.7 it may be off instead. Where calibration text tells which
columns matter, `gptq` is nearer (docs/quantization/quality.md).

After each step scale and zero are judged as they are stored, by the sum itself; each group keeps its best, those of
`start` among them, so that no group gets worse by this measure. https://mobiusml.github.io/hqq_blog
"""

from __future__ import annotations

import dataclasses

import torch

from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import WeightSolver
from spicerack.numerics.codec import from_groups, to_groups
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import store
from spicerack.numerics.scheme import Scheme

P = 0.7
"""p, the authors' for weights of language models: the smaller, the more a few weights may be off."""
BETA = 10.0
"""beta at first, the authors'; of weights divided by the mean magnitude of their group: the penalty has no unit."""
KAPPA = 1.01
"""kappa, the authors': what beta grows by in a step."""
STEPS = 20
"""The authors' number of steps; the best step counts, so that more of them cost time only."""
_CHUNK = 1 << 24
"""Weights whose groups are worked on at once: 64 MB for each of the float32 temporaries of a step."""


def obstacle(scheme: Scheme) -> str | None:
    """Why the equations above do not hold for the scheme; None if they do. Groups may have any shape."""
    return scheme.scale_obstacle or scheme.levels_obstacle


def memory(n: int, k: int) -> int:
    """Bytes for a weight [N, K]: 24 of a weight, planned as for rounding to nearest, which comes before.

    Its own temporaries are those of a step over `_CHUNK` weights, however large the weight is.
    """
    return 24 * n * k


def solve(w: torch.Tensor, start: QTensor) -> Solved:
    """Codes, scales and zero points of w [..., N, K], float; no group has more error to the power P than in `start`."""
    group = start.scheme.group_shape(*start.shape[-2:])
    x = to_groups(w, group)
    s = start.plain_scale.float().reshape(-1, 1)
    z = torch.zeros_like(s) if start.zero is None else start.zero.float().reshape(-1, 1)
    count = max(_CHUNK // x.shape[1], 1)
    solved = [
        _solve_groups(*some, start.scheme, start.plain_scale.dtype)
        for some in zip(x.split(count), s.split(count), z.split(count), strict=True)
    ]
    q, s, z = (torch.cat(parts) for parts in zip(*solved, strict=True))
    return Solved(
        dataclasses.replace(
            start,
            codes=from_groups(q, start.shape, group).to(start.codes.dtype).contiguous(),
            scale=s.reshape(start.plain_scale.shape).to(start.plain_scale.dtype),
            zero=None if start.zero is None else z.reshape(start.zero.shape).to(start.zero.dtype),
        )
    )


def shrink(r: torch.Tensor, beta: float, p: float = P) -> torch.Tensor:
    """The e, of r's shape, that (nearly) minimises |e|^p + beta / 2 (e - r)^2; for p = 1 exactly, the soft threshold.

    Below 1e-8 the power of a residual is that of 1e-8: of 0 it would be infinite.
    """
    size = r.abs()
    return r.sign() * (size - size.clamp(min=1e-8) ** (p - 1) / beta).clamp(min=0)


def _solve_groups(
    w: torch.Tensor, s: torch.Tensor, z: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """M groups w [M, B] and their first s and z [M, 1] -> q [M, B], s and z [M, 1], float32; s is as stored."""
    levels = scheme.integers
    unit = w.float().abs().mean(1, keepdim=True)
    unit = torch.where(unit == 0, 1.0, unit)
    w = w.float() / unit
    best_s, best_z, least = s, z, _error(w, s / unit, z, levels)
    beta = BETA
    for _ in range(STEPS):
        scaled = s / unit
        v = levels.decode(levels.encode(w / scaled, z), z)
        rest = w - shrink(w - scaled * v, beta)
        if scheme.zero:
            shift = (v - rest / scaled).mean(1, keepdim=True)
            z, v = z + shift, v - shift
        fitted = (v * rest).sum(1, keepdim=True) / v.square().sum(1, keepdim=True) * unit
        s = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, s)
        beta *= KAPPA
        stored, whole = store(s, dtype), z.round().clamp(levels.lo, levels.hi)
        usable = (stored != 0) & torch.isfinite(stored)
        stored = torch.where(usable, stored, best_s)
        error = _error(w, stored / unit, whole, levels)
        better = error < least
        least = torch.where(better, error, least)
        best_s, best_z = torch.where(better, stored, best_s), torch.where(better, whole, best_z)
    return levels.encode(w * unit / best_s, best_z), best_s, best_z


def _error(w: torch.Tensor, s: torch.Tensor, z: torch.Tensor, levels: IntLevels) -> torch.Tensor:
    """float64 [M, 1]: sum |w - s (q - z)|^P over each group of w [M, B], q the nearest codes; s and z are [M, 1]."""
    decoded = s * levels.decode(levels.encode(w / s, z), z)
    return (w - decoded).abs().pow(P).sum(1, keepdim=True, dtype=torch.float64)


SOLVER = WeightSolver(solve=solve, obstacle=obstacle, memory=memory)
