"""The specification: how numbers become codes and back. Slow, exact, in torch; fast paths must equal it bit for bit.

For every block x of a tensor and importance a >= 0 (one by default) the codec looks for the stored scale s and zero z
that minimize

    E(s, z) = sum_j a_j (s * v_j - x_j)^2,      v_j = level[q_j] - z,     q_j = nearest code to x_j / s

`absmax` takes the scale that puts the block's largest magnitude on the outermost code (with a zero point: that spans
minimum and maximum). `opt` starts there, tries a grid of smaller and larger scales of both signs, and refines the best
by alternating codes and least squares, s = sum(a x v) / sum(a v v), until nothing improves. Every candidate is rounded to
the type it will be stored in before it is judged, so `opt` is never worse than `absmax`, and what is judged is what is
shipped.

Arithmetic is float32, unfused, summed in a fixed order (`lane_sum`), so that vector code of any width can equal it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from spicerack.errors import WeightError
from spicerack.qtensor import QTensor, Scale
from spicerack.scheme import FloatType, IntLevels, Scheme, TableLevels

Range = Literal["absmax", "opt"]

SCALE_GRID: tuple[float, ...] = tuple(1.07**i for i in (*range(-2, 0), *range(1, 15)))
"""Divisors of the absmax scale that `opt` tries, besides 1: from 0.87 to 2.6 times finer steps."""
REFINEMENTS = 4
LANES = 16
SEGMENT = 1024
SMALLEST = 2.0**-126
FLUSH = 1e-4
"""A block this much smaller than the tensor's largest weight may be rounded up to the smallest stored scale."""


# ---- blocks ---------------------------------------------------------------------------------------------------------


def to_blocks(w: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., N, K] -> [blocks, elements], blocks in the order of the scale grid [..., N/rows, K/columns]."""
    rows, columns = block
    *leading, n, k = w.shape
    grouped = w.reshape(*leading, n // rows, rows, k // columns, columns).transpose(-3, -2)
    return grouped.reshape(-1, rows * columns)


def from_blocks(blocks: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """Inverse of `to_blocks`."""
    rows, columns = block
    *leading, n, k = shape
    return blocks.reshape(*leading, n // rows, k // columns, rows, columns).transpose(-3, -2).reshape(shape)


def lane_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum float32 [M, B] over B in the fixed order of a 16-lane machine -> float64 [M].

    Within 1024 elements, lane l adds elements l, l+16, ... in turn, and the lanes are folded 8, 4, 2, 1; those sums are
    added in turn in float64.
    """
    count = terms.shape[1]
    terms = torch.nn.functional.pad(terms, (0, -count % (SEGMENT if count > SEGMENT else LANES)))
    segments = terms.reshape(terms.shape[0], -1, min(terms.shape[1], SEGMENT) // LANES, LANES)
    lanes = segments[:, :, 0]
    for step in range(1, segments.shape[2]):
        lanes = lanes + segments[:, :, step]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    total = lanes[:, 0, 0].double()
    for segment in range(1, segments.shape[1]):
        total = total + lanes[:, segment, 0].double()
    return total


# ---- levels ---------------------------------------------------------------------------------------------------------


def nearest(u: torch.Tensor, levels: IntLevels | TableLevels, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Codes whose level minus `zero` is nearest to u (float32); halfway goes to the even code, in tables to the smaller.

    Half-integer levels are integers with a zero of -1/2.
    """
    if isinstance(levels, IntLevels):
        return torch.clamp(torch.round(u + _offset(levels, zero)), levels.lo, levels.hi)
    values, order = torch.tensor(levels.values, device=u.device).sort(stable=True)
    return order[torch.bucketize(u, (values[1:] + values[:-1]) / 2)]


def _offset(levels: IntLevels, zero: torch.Tensor | float) -> torch.Tensor | float:
    return -0.5 if levels.half else zero


def level_values(codes: torch.Tensor, levels: IntLevels | TableLevels, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
    """float32 level[codes] - zero."""
    if isinstance(levels, IntLevels):
        return codes.float() - _offset(levels, zero)
    return torch.tensor(levels.values, device=codes.device)[codes.long()]


def dtype_of(kind: FloatType, source: torch.dtype) -> torch.dtype:
    """The stored type of a scale for weights of type `source`."""
    if kind != "source":
        dtype = getattr(torch, kind)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if source == torch.bfloat16 else torch.float16


def _store(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 -> the nearest value of the stored type, as float32; below 2^-126 (where 1/scale overflows) it is 0."""
    stored = scale.to(dtype).float()
    return torch.where(stored.abs() < SMALLEST, 0.0, stored)


# ---- search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """One candidate per block: scale [M] (stored values, float32), zero [M], error and the sums that refine it."""

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


def _evaluate(x: torch.Tensor, a: torch.Tensor | None, scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor) -> Fit:
    """Judge stored scales and zeros, one per block. A scale of 0 or infinity never wins (its error is infinite)."""
    usable = (scale != 0) & torch.isfinite(scale)
    inverse = torch.where(usable, 1 / scale, 0)[:, None]
    v = level_values(nearest(x * inverse, scheme.levels, zero[:, None]), scheme.levels, zero[:, None])
    e = scale[:, None] * v - x
    av, ax, ae = (v, x, e) if a is None else (a * v, a * x, a * e)
    error = torch.where(usable, lane_sum(ae * e), torch.inf)
    sums = [lane_sum(term) for term in (av * x, av * v)]
    sums += [lane_sum(ax), lane_sum(av)] if scheme.zero else [error, error]
    return Fit(scale, zero, error, *sums)


def _refined(fit: Fit, scheme: Scheme, total: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares with the codes fixed: the best scale, and with a zero point the best line through them."""
    if not scheme.zero:
        return _store((fit.xv / fit.vv).float(), dtype), fit.zero
    # x ~ s*v + m over all elements; v counts from the present zero, so the zero moves by -m/s.
    slope = (total * fit.xv - fit.v * fit.x) / (total * fit.vv - fit.v * fit.v)
    intercept = (fit.x - slope * fit.v) / total
    scale = _store(slope.float(), dtype)
    return scale, _clip_zero(fit.zero - (intercept / slope).float(), scheme)


def _clip_zero(zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    assert isinstance(scheme.levels, IntLevels)
    return torch.nan_to_num(torch.round(zero), nan=0.0).clamp(scheme.levels.lo, scheme.levels.hi)


def _start(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax: unrounded scale [M], and the centre [M] of the range that it spans (0 without a zero point)."""
    levels = scheme.levels
    if scheme.zero:
        assert isinstance(levels, IntLevels)
        low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        return (high - low) / (levels.hi - levels.lo), (high + low) / 2
    top, bottom = x.amax(1), x.amin(1)
    signed_max = torch.where(top > -bottom, top, bottom)
    low_level, high_level = min(levels.values), max(levels.values)
    outer = low_level if -low_level > high_level else high_level
    if low_level == -high_level:  # symmetric levels: the sign of the scale changes nothing
        signed_max = signed_max.abs()
    return signed_max / outer, torch.zeros_like(signed_max)


def _zero_for(centre: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The zero point that puts `centre` in the middle of the codes."""
    if not scheme.zero:
        return torch.zeros_like(scale)
    assert isinstance(scheme.levels, IntLevels)
    return _clip_zero((scheme.levels.lo + scheme.levels.hi) / 2 - centre / scale, scheme)


def search(
    x: torch.Tensor, scheme: Scheme, dtype: torch.dtype, range_: Range = "opt", importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero for blocks x [M, B] float32 -> (scale [M] as stored in `dtype`, zero [M]), both float32.

    importance: [M, B] float32, not negative, or None for ones. Blocks of zeros get scale 1, so that nothing divides by 0.
    """
    raw, centre = _start(x, scheme)
    scale = torch.where(raw == 0, 1.0, _store(raw, dtype))
    zero = _zero_for(centre, scale, scheme)
    if range_ == "absmax":
        return scale, zero
    best = _evaluate(x, importance, scheme, scale, zero)
    signs = (1.0,) if scheme.zero or min(scheme.levels.values) == -max(scheme.levels.values) else (1.0, -1.0)
    shifts = (-1.0, 0.0, 1.0) if scheme.zero else (0.0,)
    for divisor in (1.0, *SCALE_GRID):
        for sign in signs:
            candidate = _store(raw * torch.tensor(sign / divisor), dtype)
            base = _zero_for(centre, candidate, scheme)
            for shift in shifts:
                moved = _clip_zero(base + shift, scheme) if scheme.zero else base
                best = best.better(_evaluate(x, importance, scheme, candidate, moved))
    total = lane_sum(torch.ones_like(x) if importance is None else importance)
    for _ in range(REFINEMENTS):
        best = best.better(_evaluate(x, importance, scheme, *_refined(best, scheme, total, dtype)))
    empty = raw == 0
    return torch.where(empty, 1.0, best.scale), torch.where(empty, zero, best.zero)


# ---- encode and decode ----------------------------------------------------------------------------------------------


def encode(
    w: torch.Tensor, scheme: Scheme, *, range_: Range = "opt", importance: torch.Tensor | None = None, name: str = "weight"
) -> QTensor:
    """Quantize w [..., N, K] (any float type). Raises ShapeError, and WeightError naming tensor, place and value.

    importance: [K] or of w's shape, not negative: how much an error in each weight matters (mean square of its input).
    """
    scheme.check_shape(name, tuple(w.shape))
    check_finite(w, name)
    shape = tuple(w.shape)
    block = scheme.block_shape(*shape[-2:])
    grid = (*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])
    x = to_blocks(w.float(), block)
    a = None if importance is None else to_blocks(importance.float().expand(shape), block)
    lowest = torch.zeros(len(x), device=w.device)
    min_: Scale | None = None
    if scheme.min is not None:
        lowest = x.amin(1).clamp(max=0)
        min_, lowest = _encode_part(lowest.reshape(grid), scheme.min, w.dtype, name)
        x = x - lowest[:, None]
    search_type = torch.float32 if isinstance(scheme.scale, Scheme) else dtype_of(scheme.scale, w.dtype)
    found, zero = search(x, scheme, search_type, range_, a)
    scale, found = _encode_part(check_scale(x, found, scheme, search_type, name).reshape(grid), scheme.scale, w.dtype, name)
    inverse = torch.where(found == 0, 0, 1 / found)[:, None]
    codes = nearest(x * inverse, scheme.levels, zero[:, None])
    signed = isinstance(scheme.levels, IntLevels) and scheme.levels.lo < 0
    return QTensor(
        scheme=scheme,
        codes=from_blocks(codes, shape, block).to(torch.int8 if signed else torch.uint8).contiguous(),
        scale=scale,
        zero=zero.reshape(grid).to(torch.int8) if scheme.zero else None,
        min=min_,
    )


def _encode_part(
    values: torch.Tensor, kind: FloatType | Scheme, source: torch.dtype, name: str
) -> tuple[Scale, torch.Tensor]:
    """Store a scale or minimum -> (as stored, the float32 values [M] that readers will see)."""
    if isinstance(kind, Scheme):
        part = encode(values, kind, name=f"{name} ({kind.name})")
        return part, decode(part).reshape(-1)
    stored = values.to(dtype_of(kind, source))
    return stored, stored.float().reshape(-1)


def decode(q: QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[..., N, K] in `dtype`: float32 arithmetic, rounded once at the end. The checkpoint's order is restored."""
    block = q.scheme.block_shape(*q.shape[-2:])
    codes = to_blocks(q.codes, block)
    zero = 0.0 if q.zero is None else q.zero.reshape(-1, 1).float()
    x = _part_values(q.scale) * level_values(codes, q.scheme.levels, zero)
    if q.min is not None:
        x = x + _part_values(q.min)
    w = from_blocks(x, q.shape, block).to(dtype)
    return w.transpose(-1, -2) if q.transposed else w


def decode_rows(q: QTensor, rows: int) -> Iterator[torch.Tensor]:
    """`decode` in float32, `rows` of the flattened [rows, K] matrix at a time (whole blocks; output rows first)."""
    *_, n, k = q.shape
    block_rows, block_columns = q.scheme.block_shape(n, k)
    codes = q.codes.reshape(-1, k)
    parts = [None if part is None else _part_values(part).reshape(-1, k // block_columns) for part in (q.scale, q.zero, q.min)]
    for start in range(0, len(codes), rows):
        chunk = codes[start : start + rows]
        blocks = slice(start // block_rows, (start + len(chunk)) // block_rows)
        scale, zero, low = (None if part is None else part[blocks].reshape(-1, 1) for part in parts)
        assert scale is not None
        v = level_values(to_blocks(chunk, (block_rows, block_columns)), q.scheme.levels, 0.0 if zero is None else zero)
        x = scale * v if low is None else scale * v + low
        yield from_blocks(x, tuple(chunk.shape), (block_rows, block_columns))


def _part_values(part: Scale) -> torch.Tensor:
    values = decode(part) if isinstance(part, QTensor) else part.float()
    return values.reshape(-1, 1)


# ---- what is refused ------------------------------------------------------------------------------------------------


def check_finite(w: torch.Tensor, name: str) -> None:
    """Raise WeightError naming the first NaN or infinity of w."""
    bad = ~torch.isfinite(w)
    if bool(bad.any()):
        place = [int(i) for i in bad.nonzero()[0]]
        value = float(w[tuple(place)])
        raise WeightError(
            f"{name}: {int(bad.sum())} weights are not finite; the first is {value} at {place}",
            "the checkpoint is damaged or was saved from a diverged run: repair it, or skip this tensor",
        )


def check_scale(x: torch.Tensor, scale: torch.Tensor, scheme: Scheme, dtype: torch.dtype, name: str) -> torch.Tensor:
    """scale [M] as stored, with zeros rounded up where that is harmless. Raises WeightError for the others and infinities.

    Harmless: the block is FLUSH times smaller than the tensor's largest weight; then its error is below anything visible.
    """
    peak = x.abs().amax(1)
    if not bool(torch.isfinite(scale).all()):
        value = float(peak.max())
        raise WeightError(
            f"{name}: a block with weights up to {value:.3g} needs a scale above {torch.finfo(dtype).max:.3g}, the largest {dtype}",
            "convert the model to bfloat16 first, or skip this tensor",
        )
    lost = scale == 0
    if not bool(lost.any()):
        return scale
    where = int((lost & (peak > FLUSH * peak.max())).int().argmax())
    if peak[where] > FLUSH * peak.max():
        raise WeightError(
            f"{name}: block {where} has weights up to {float(peak[where]):.3g}; {scheme.name}'s scale underflows {dtype}",
            "convert the model to bfloat16 first, or skip this tensor",
        )
    return torch.where(lost, max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, SMALLEST), scale)


__all__ = ["TableLevels", "check_finite", "check_scale", "decode", "encode", "from_blocks", "lane_sum", "search", "to_blocks"]
