"""The specification of the range search: which scale (and zero) a block gets. In torch; native/search.cpp equals it.

For a block x with importance a >= 0 (one by default) the search looks for the stored scale s and zero z that minimize

    E(s, z) = sum_j a_j (s * v_j - x_j)^2,      v_j = level[q_j] - z,     q_j = nearest code to x_j / s

`absmax` takes the scale that puts the block's largest magnitude on the outermost code (with a zero point: that spans
minimum and maximum). `opt` starts there and goes from coarse to fine: scales down to 1/12 of that one, of both signs;
then a few percent up and down from the best; then least squares with the codes fixed, s = sum(a x v) / sum(a v v).
Every candidate is rounded to the type it will be stored in before it is judged, so `opt` is never worse than `absmax`,
and what is judged is what is shipped.

Arithmetic is float32, unfused. Sums fold runs of 16 neighbours in pairs in float32 and add the runs in turn in float64,
so that vector code of any width can equal them bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from spicerack.levels import level_values, nearest, store
from spicerack.scheme import IntLevels, Scheme

Range = Literal["absmax", "opt"]

COARSE: tuple[float, ...] = tuple(1.25**i for i in range(12))
"""Divisors of the absmax scale. The largest, 11.6, is for 2-bit rows with far outliers."""
FINE: tuple[float, ...] = (1.12, 1.06, 1.03, 1.015)
"""Factors tried up and down from the best scale so far."""
SHIFTS: tuple[float, ...] = (-1.0, 0.0, 1.0)
"""Zero points tried at every coarse scale, around the one that centres the range."""
REFINEMENTS = 2
RUN = 16
PIECE = 1 << 20
"""Long blocks are judged in pieces of this many elements, to bound memory; the result does not depend on it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One candidate per block: scale [M] (stored values, float32), zero [M], error and the sums that refine it [M]."""

    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor
    xv: torch.Tensor
    vv: torch.Tensor
    x: torch.Tensor
    v: torch.Tensor

    def better(self, other: Fit) -> Fit:
        """Blockwise the one with the smaller error; `self` on a tie (1e-9 relative: sums of equal candidates)."""
        take = other.error < self.error * (1 - 1e-9)
        return Fit(*(torch.where(take, getattr(other, f), getattr(self, f)) for f in Fit.__slots__))


def search(
    x: torch.Tensor, scheme: Scheme, dtype: torch.dtype, range_: Range = "opt", importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero for blocks x [M, B] float32 -> (scale [M] as stored in `dtype`, zero [M]), both float32.

    importance: [M, B] float32, not negative, or None for ones. Blocks of zeros get scale 1: nothing divides by 0.
    """
    raw, centre = _start(x, scheme)
    scale = torch.where(raw == 0, 1.0, store(raw, dtype))
    zero = _zero_for(centre, scale, scheme)
    if range_ == "absmax":
        return scale, zero
    best = _judge(x, importance, scheme, scale, zero)
    for candidate in _coarse(raw, scheme, dtype):
        base = _zero_for(centre, candidate, scheme)
        for shift in SHIFTS if scheme.zero else (0.0,):
            moved = _clip_zero(base + shift, scheme) if scheme.zero else base
            best = best.better(_judge(x, importance, scheme, candidate, moved))
    for factor in FINE:
        middle = best
        for step in (factor, 1 / factor):
            candidate = store(middle.scale * torch.tensor(step), dtype)
            best = best.better(_judge(x, importance, scheme, candidate, middle.zero))
    total = ordered_sum(run_sums(torch.ones_like(x) if importance is None else importance))
    for _ in range(REFINEMENTS):
        best = best.better(_judge(x, importance, scheme, *_refined(best, scheme, total, dtype)))
    empty = raw == 0
    return torch.where(empty, 1.0, best.scale), torch.where(empty, zero, best.zero)


def run_sums(terms: torch.Tensor) -> torch.Tensor:
    """float32 [M, B] -> sums of runs of 16 [M, ceil(B/16)], neighbours folded in pairs."""
    sums = torch.nn.functional.pad(terms, (0, -terms.shape[1] % RUN))
    for _ in range(RUN.bit_length() - 1):
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums


def ordered_sum(runs: torch.Tensor) -> torch.Tensor:
    """float32 [M, R] -> float64 [M], added in turn."""
    return runs.double().cumsum(1)[:, -1]


def _judge(
    x: torch.Tensor, importance: torch.Tensor | None, scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor
) -> Fit:
    """Error and sums of stored scales and zeros, one per block. A scale of 0 or infinity never wins."""
    usable = (scale != 0) & torch.isfinite(scale)
    inverse = torch.where(usable, 1 / scale, 0)[:, None]
    runs: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, x.shape[1], PIECE):
        piece = x[:, start : start + PIECE]
        v = level_values(nearest(piece * inverse, scheme.levels, zero[:, None]), scheme.levels, zero[:, None])
        e = scale[:, None] * v - piece
        if importance is None:
            av, ax, ae = v, piece, e
        else:
            a = importance[:, start : start + PIECE]
            av, ax, ae = a * v, a * piece, a * e
        line = (ax, av) if scheme.zero else ()
        runs.append(tuple(run_sums(term) for term in (ae * e, av * piece, av * v, *line)))
    error, xv, vv, *line_sums = (ordered_sum(torch.cat(parts, dim=1)) for parts in zip(*runs, strict=True))
    ax_sum, av_sum = line_sums or (xv, vv)
    return Fit(scale, zero, torch.where(usable, error, torch.inf), xv, vv, ax_sum, av_sum)


def _coarse(raw: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> list[torch.Tensor]:
    """Candidate scales [M] in the order in which they are judged."""
    signs = (1.0,) if scheme.zero or _symmetric(scheme) else (1.0, -1.0)
    return [store(raw * torch.tensor(sign / divisor), dtype) for divisor in COARSE for sign in signs]


def _refined(fit: Fit, scheme: Scheme, total: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares with the codes fixed: the best scale, and with a zero point the best line through them."""
    if not scheme.zero:
        return store((fit.xv / fit.vv).float(), dtype), fit.zero
    # x ~ s*v + m over all elements; v counts from the present zero, so the zero moves by -m/s.
    slope = (total * fit.xv - fit.v * fit.x) / (total * fit.vv - fit.v * fit.v)
    intercept = (fit.x - slope * fit.v) / total
    return store(slope.float(), dtype), _clip_zero(fit.zero - (intercept / slope).float(), scheme)


def _symmetric(scheme: Scheme) -> bool:
    """Every level has its negative: the sign of the scale changes nothing."""
    return set(scheme.levels.values) == {-value for value in scheme.levels.values}


def _start(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax: unrounded scale [M], and the centre [M] of the range that it spans (0 without a zero point)."""
    levels = scheme.levels
    top, bottom = x.amax(1), x.amin(1)
    if scheme.zero:
        assert isinstance(levels, IntLevels)
        low, high = bottom.clamp(max=0), top.clamp(min=0)
        return (high - low) / (levels.hi - levels.lo), (high + low) / 2
    lowest, highest = min(levels.values), max(levels.values)
    if -lowest == highest:
        raw = torch.maximum(top, -bottom) / highest
    else:  # the longer side takes the weight of largest magnitude, whatever its sign
        raw = torch.where(top > -bottom, top, bottom) / (lowest if -lowest > highest else highest)
    return raw, torch.zeros_like(raw)


def _zero_for(centre: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The zero point that puts `centre` in the middle of the codes."""
    if not scheme.zero:
        return torch.zeros_like(scale)
    assert isinstance(scheme.levels, IntLevels)
    return _clip_zero((scheme.levels.lo + scheme.levels.hi) / 2 - centre / scale, scheme)


def _clip_zero(zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    assert isinstance(scheme.levels, IntLevels)
    return torch.nan_to_num(torch.round(zero), nan=0.0).clamp(scheme.levels.lo, scheme.levels.hi)
