"""Rounding to nearest: `to_nearest` gives what `codec.encode` gives, bit for bit, and natively where that is written.

    s, z = argmin sum_j a_j (s * (q_j - z) - w_j)^2 per group,      q = clamp(round(w / s) + z)

This is the end of every way to quantize that chooses no codes itself, and the start of every solver that does. With
`range_="absmax"` a group's largest weight gives the scale, with "opt" the sum above is searched: see `search`.
"""

from __future__ import annotations

import math

import torch

from spicerack.numerics import codec, native
from spicerack.numerics.levels import in_order
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.search import PIECE, Range, search
from spicerack.numerics.superblocks.native import fit as fit_natively
from spicerack.numerics.superblocks.search import Blocks, Fitted, Form, fit, form_of

_TABLE = 16
"""Levels of a table that native code has room for."""
_SMALLEST_SQUARE, _LARGEST_SQUARE = 1e-30, 1e30
"""Mean square of weights between which float32 holds the square of every error that counts: its own range ends at 1e-38
and 3e38, and the error of 8 bits is a hundredth of the weights."""


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
    """Quantize w [..., N, K] (any float type): `codec.encode`, but fast. Raises ShapeError, and WeightError by name.

    w           [..., N, K], any float type, on any device: what is not on the CPU is left to the codec
    scheme      what its numbers are to be
    range_      how scales are chosen: "absmax" or "opt"
    name        of the tensor, for errors: those name place and value too
    importance  [K] or of w's shape, not negative: how much an error in each weight matters; None is equally
    source      the type that decides that of scales; w's own if None
    threads     how many share the work; they change nothing else
    """
    shape = tuple(w.shape)
    scheme.check_shape(name, shape)
    form = form_of(scheme, shape[-1], source or w.dtype)
    if form is not None and _readable(w):
        q = _superblocks(w, scheme, form, range_, importance, threads)
        if q is not None:
            return q
    if not (_native_fits(w, scheme, importance) or _table_fits(w, scheme)):
        return codec.encode(w, scheme, range_=range_, importance=importance, name=name, source=source)
    size = math.prod(scheme.group_shape(*shape[-2:]))
    groups, dtype = w.detach().contiguous().reshape(-1, size), dtype_of(scheme.scale, source or w.dtype)
    if size > PIECE:
        codec.check_finite(w, name)
        best = _search_long(groups, scheme, dtype, range_, threads)
    else:
        repeating = _repeating(importance, shape, size)
        searched = native.quantize(groups, scheme, dtype, range_, repeating, threads=threads)
        if searched is None:
            codec.check_finite(w, name)
        assert searched is not None, "the search met a value that is not finite, the check did not"
        best = searched
    codes, scale, grid = best.codes, best.scale, scheme.scale_shape(shape)
    if not best.fits:
        peak = torch.maximum(groups.amax(1), -groups.amin(1)).float()
        scale = codec.check_scale(peak.reshape(grid), scale.reshape(grid), dtype, name).reshape(-1)
        codes = native.encode(groups, scheme, scale, best.zero, threads=threads)
    return QTensor(
        scheme=scheme,
        codes=codes.view(codes_dtype(scheme)).reshape(shape),
        scale=scale.to(dtype).reshape(grid),
        zero=best.zero.reshape(grid) if scheme.zero else None,
    )


def relative_error(w: torch.Tensor, q: QTensor, *, threads: int = 1) -> float:
    """||decoded - w|| / ||w|| of w [..., N, K] to four digits, in bounded memory; 0 for a tensor of zeros.

    w: what was quantized, in any float type. q: what it became, in the same order of axes. Four digits are what threads
    and processors cannot change.
    """
    if _native_fits(w, q.scheme, None):
        groups = w.detach().contiguous().reshape(q.plain_scale.numel(), -1)
        zero = None if q.zero is None else q.zero.reshape(-1)
        scale = q.plain_scale.float().reshape(-1)
        wrong, total = native.compare(groups, q.scheme, scale, zero, q.codes.reshape(groups.shape), threads=threads)
    else:
        wrong, total = _compare(w, q, torch.float32)
    if w.numel() and not _SMALLEST_SQUARE < total / w.numel() < _LARGEST_SQUARE:
        wrong, total = _compare(w, q, torch.float64)
    return float(f"{math.sqrt(wrong / total):.4g}") if total else 0.0


def _compare(w: torch.Tensor, q: QTensor, squared: torch.dtype) -> tuple[float, float]:
    """Sums of (decoded - w)^2 and w^2, each square in the type `squared`."""
    columns = w.shape[-1]
    group_rows, _ = q.scheme.group_shape(*q.shape[-2:])
    step = max(PIECE // columns // group_rows, 1) * group_rows
    wrong = total = 0.0
    for chunk, decoded in zip(w.reshape(-1, columns).split(step), codec.decode_rows(q, step), strict=True):
        exact = chunk.float()
        wrong += float((decoded - exact).to(squared).square().sum(dtype=torch.float64))
        total += float(exact.to(squared).square().sum(dtype=torch.float64))
    return wrong, total


def fit_superblocks(x: torch.Tensor, form: Form, importance: torch.Tensor, *, threads: int = 1) -> Fitted | None:
    """`superblocks.fit` of one super-block in each row of x, float32 [N, groups * columns]; None if one is not finite.

    importance: of each column, float32. threads: how many share the rows.
    """
    if _readable(x):
        searched = fit_natively(x, form, "opt", importance, threads=threads)
        return None if searched is None else searched[0]
    if not bool(torch.isfinite(x).all()):
        return None
    grid = (-1, form.groups, form.columns)
    return fit(Blocks(x.reshape(grid), importance.expand(x.shape).reshape(grid), form))


def _superblocks(
    w: torch.Tensor, scheme: Scheme, form: Form, range_: Range, importance: torch.Tensor | None, threads: int
) -> QTensor | None:
    """`to_nearest` of super-blocks; None where something is to be refused or put right, which the codec does."""
    shape, size = tuple(w.shape), form.groups * form.columns
    blocks = w.detach().contiguous().reshape(-1, size)
    repeating = _repeating(importance, shape, size)
    searched = fit_natively(blocks, form, range_, repeating, threads=threads)
    if searched is None or not searched[2]:
        return None
    fitted, codes, _ = searched
    return codec.of_blocks(scheme, form, shape, fitted, codes.view(codes_dtype(scheme)))


def _search_long(
    groups: torch.Tensor, scheme: Scheme, dtype: torch.dtype, range_: Range, threads: int
) -> native.Quantized:
    """Groups [M, B] longer than a piece, all weights alike: the search in Python, whose candidates C++ judges.

    groups: float32, float16 or bfloat16, contiguous, on the CPU. dtype: that scales are stored in. Codes are made only
    where every scale can be stored.
    """
    with native.team(threads) as workers:
        scale, zeros = search(native.LongGroups(groups, scheme, workers), scheme, dtype, range_)
    zero, fits = zeros.to(torch.int8), codec.scale_fits(scale)
    if not fits:
        return native.Quantized(torch.empty(0, dtype=torch.int8, device="cpu"), scale, zero, fits)
    return native.Quantized(native.encode(groups, scheme, scale, zero, threads=threads), scale, zero, fits)


def _native_fits(w: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None) -> bool:
    """Whether the search is written in C++ for these: plain schemes whose codes are around 0, on the CPU.

    The groups of plain schemes are contiguous in memory. Long groups come here only without importance,
    ternary ones only where they are long; the rest is the codec's.
    """
    short = math.prod(scheme.group_shape(*w.shape[-2:])) <= PIECE
    searched = not scheme.is_ternary if short else importance is None
    plain = scheme.plain_obstacle is None and scheme.integers.lo < 0
    return plain and searched and _readable(w)


def _table_fits(w: torch.Tensor, scheme: Scheme) -> bool:
    """Whether the search is written in C++ for these: few levels in a table, times a float of a short group."""
    few = in_order(scheme.levels) and scheme.levels.hi < _TABLE
    floats = few and scheme.scale_obstacle is None and scheme.scale != "float8_e8m0fnu"
    return floats and scheme.group[0] == 1 and scheme.group_shape(*w.shape[-2:])[1] <= PIECE and _readable(w)


def _readable(w: torch.Tensor) -> bool:
    """Whether native code reads these weights."""
    return w.dtype in native.TYPES and w.device.type == "cpu"


def _repeating(importance: torch.Tensor | None, shape: tuple[int, ...], size: int) -> torch.Tensor | None:
    """Importance, float32, in memory order: the row [K] if groups lie inside rows, else one value per weight.

    The search takes a short one again and again, which spares a copy of it for every row.
    """
    if importance is None:
        return None
    row = importance.numel() == shape[-1] and shape[-1] % size == 0
    every = importance.float()
    return (every.reshape(-1) if row else every.expand(shape).reshape(-1)).contiguous()
