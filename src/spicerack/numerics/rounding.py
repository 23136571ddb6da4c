"""Rounding to nearest: `to_nearest` gives what `codec.encode` gives, bit for bit, and natively where that is written.

    s, z = argmin sum_j a_j (s * (q_j - z) - w_j)^2 per block,      q = clamp(round(w / s) + z)

This is the end of every way to quantize that chooses no codes itself, and the start of every solver that does. With
`range_="absmax"` a block's largest weight gives the scale, with "opt" the sum above is searched: see `search`.
"""

from __future__ import annotations

import math

import torch

from spicerack.numerics import codec, native
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.search import PIECE, Range, search


def to_nearest(
    w: torch.Tensor,
    scheme: Scheme,
    *,
    range_: Range = "opt",
    name: str = "weight",
    importance: torch.Tensor | None = None,
    source: torch.dtype | None = None,
    threads: int = 1,
) -> QTensor:
    """Quantize w [..., N, K]. Raises ShapeError, and WeightError naming tensor, place and value.

    importance: [K] or of w's shape, not negative: how much an error in each weight matters. source: the type that
    decides that of scales; w's own if None.
    """
    shape = tuple(w.shape)
    scheme.check_shape(name, shape)
    if not _native_fits(w, scheme, importance):
        return codec.encode(w, scheme, range_=range_, importance=importance, name=name, source=source)
    grid = scheme.scale_shape(shape)
    size = math.prod(scheme.block_shape(*shape[-2:]))
    blocks = w.detach().contiguous().reshape(-1, size)
    dtype = dtype_of(scheme.scale, source or w.dtype)
    codes: torch.Tensor | None = None
    if size > PIECE:
        codec.check_finite(w, name)
        with native.team(threads) as workers:
            scale, zeros = search(native.LongBlocks(blocks, scheme, workers), scheme, dtype, range_)
        zero, fits = zeros.to(torch.int8), codec.scale_fits(scale)
    else:
        found = native.quantize(blocks, scheme, dtype, range_, _repeating(importance, shape, size), threads=threads)
        if found is None:
            codec.check_finite(w, name)
        assert found is not None, "the search met a value that is not finite, the check did not"
        codes, scale, zero, fits = found.codes, found.scale, found.zero, found.fits
    if not fits:
        peak = torch.maximum(blocks.amax(1), -blocks.amin(1)).float()
        scale = codec.check_scale(peak.reshape(grid), scale.reshape(grid), dtype, name).reshape(-1)
        codes = None
    if codes is None:
        codes = native.encode(blocks, scheme, scale, zero, threads=threads)
    return QTensor(
        scheme=scheme,
        codes=codes.reshape(shape),
        scale=scale.to(dtype).reshape(grid),
        zero=zero.reshape(grid) if scheme.zero else None,
    )


def relative_error(w: torch.Tensor, q: QTensor, *, threads: int = 1) -> float:
    """||decoded - w|| / ||w|| to four digits, in bounded memory; 0 for a tensor of zeros."""
    if _native_fits(w, q.scheme, None):
        blocks = w.detach().contiguous().reshape(q.plain_scale.numel(), -1)
        zero = None if q.zero is None else q.zero.reshape(-1)
        scale = q.plain_scale.float().reshape(-1)
        wrong, total = native.compare(blocks, q.scheme, scale, zero, q.codes.reshape(blocks.shape), threads=threads)
    else:
        columns = w.shape[-1]
        block_rows, _ = q.scheme.block_shape(*q.shape[-2:])
        step = max(PIECE // columns // block_rows, 1) * block_rows
        wrong = total = 0.0
        for chunk, decoded in zip(w.reshape(-1, columns).split(step), codec.decode_rows(q, step), strict=True):
            exact = chunk.float()
            wrong += float((decoded - exact).square().sum(dtype=torch.float64))
            total += float(exact.square().sum(dtype=torch.float64))
    return float(f"{math.sqrt(wrong / total):.4g}") if total else 0.0


def _native_fits(w: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None) -> bool:
    """Whether the search is written in C++ for these: plain schemes around 0, whose blocks are contiguous, on the CPU.

    Long blocks only without importance, and ternary ones only where they are long.
    """
    short = math.prod(scheme.block_shape(*w.shape[-2:])) <= PIECE
    searched = not scheme.is_ternary if short else importance is None
    plain = scheme.plain_obstacle is None and scheme.integers.lo < 0
    return plain and searched and w.dtype in native.TYPES and w.device.type == "cpu"


def _repeating(importance: torch.Tensor | None, shape: tuple[int, ...], size: int) -> torch.Tensor | None:
    """Importance in memory order: the row [K] if blocks lie inside rows, else one value per weight."""
    if importance is None:
        return None
    row = importance.numel() == shape[-1] and shape[-1] % size == 0
    return importance.float().expand(shape[-1:] if row else shape).reshape(-1).contiguous()
