"""Scales by least squares, with the codes as they are: the last step of a solver that chose codes by a layer's output.

    minimise over s   (s D - w) H (s D - w)^T    for each row w;    row g of D: the row's levels in group g, else zeros

    (D H D^T) s = D H w^T

Codes were chosen for scales that rounding to nearest found before; with other codes other scales are best. Every row
(or the tensor, where there is one scale for all rows) has a system of its own, of as many unknowns as it has groups.
What comes out is rounded to the type that scales are stored in, and taken only where the error is then smaller.
"""

from __future__ import annotations

import dataclasses

import torch

from spicerack.algorithms.columns import decoded, level_of_each, scales
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import store

ROWS = 512
"""Rows whose losses are taken and whose systems are made and solved at once."""
SYSTEMS = 256 << 20
"""Bytes of what is in memory for so many rows: most are their systems P, 206 MB at K = 28672 in groups of 128."""
_COLUMNS = 1024
"""Columns of a product that are in memory at once, so that no temporary is as large as H."""
_RIDGE = 1e-9
"""Share of P's mean diagonal that is added to its diagonal: far below float32's rounding of P, and P is regular."""


def rescaled(start: QTensor, codes: torch.Tensor, target: torch.Tensor, h: torch.Tensor) -> QTensor:
    """Codes and scales with which a weight has less error than with those of `start`, row by row.

    start    the weight rounded to nearest; it has the scales that `codes` were chosen for
    codes    [N, K], of start's type
    target   what the codes should stand for, float32 [N, K]
    h        H, float32 [K, K], symmetric

    Rows that are nearer with start's codes keep these. Scales s + d have  d P d - 2 d r  more loss than s, P = D H D^T
    and r = D H (target - decoded).
    """
    n, k = codes.shape
    group = start.scheme.group_shape(n, k)[1]
    dtype = start.plain_scale.dtype
    one = len(start.plain_scale) != n
    nothing = torch.zeros((1, k // group), dtype=torch.float64, device=target.device)
    total = torch.diag_embed(nothing), nothing
    chosen, steps = [], []
    for first in range(0, n, ROWS):
        some = slice(first, first + ROWS)
        q, pulls = _better(_rows(start, some), codes[some], target[some], h)
        d = level_of_each(q)
        p = _products(d, h, group)
        r = pulls.mul_(d).view(len(d), -1, group).sum(-1, dtype=torch.float64)
        chosen.append(q.codes)
        if one:
            total = total[0] + p.sum(0, keepdim=True), total[1] + r.sum(0, keepdim=True)
        else:
            steps.append(_solved(scales(q), p, r, dtype))
    scale = _solved(scales(start), *total, dtype) if one else torch.cat(steps)
    return dataclasses.replace(start, codes=torch.cat(chosen), scale=scale)


def objective(e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """e H e^T of every row of the errors e [N, K], float64 [N], for a symmetric H [K, K] of their type.

    Only parts of H on its diagonal and right of it are multiplied with: the others count the same again.
    """
    total = torch.zeros(len(e), dtype=torch.float64, device=e.device)
    for first in range(0, e.shape[1], _COLUMNS):
        rest, width = e[:, first:], min(_COLUMNS, e.shape[1] - first)
        products = (rest[:, :width] @ h[first : first + width, first:]).mul_(rest)
        total += 2 * products.sum(1, dtype=torch.float64) - products[:, :width].sum(1, dtype=torch.float64)
    return total


def _better(start: QTensor, codes: torch.Tensor, target: torch.Tensor, h: torch.Tensor) -> tuple[QTensor, torch.Tensor]:
    """Row by row the better of start's codes and `codes` [N, K]; and (target - decoded) H, float32 [N, K]."""
    better = dataclasses.replace(start, codes=codes)
    e = target - decoded(better)
    pulls = e @ h
    losses = (pulls * e).sum(1, dtype=torch.float64)
    plain = target - decoded(start)
    worse = (losses >= objective(plain, h)).nonzero().squeeze(1)
    if len(worse):
        pulls[worse] = plain[worse] @ h
        better = dataclasses.replace(start, codes=codes.index_copy(0, worse, start.codes[worse]))
    return better, pulls


def _rows(q: QTensor, some: slice) -> QTensor:
    """Some rows of q; its scale and zero point may be the tensor's, and are then theirs too."""
    scale = q.plain_scale[some] if len(q.plain_scale) > 1 else q.plain_scale
    zero = q.zero[some] if q.zero is not None and len(q.zero) > 1 else q.zero
    return dataclasses.replace(q, codes=q.codes[some], scale=scale, zero=zero)


def _products(d: torch.Tensor, h: torch.Tensor, group: int) -> torch.Tensor:
    """P = D H D^T, float64 [N, groups, groups], for levels d [N, K]; a product of two groups is float32."""
    n, k = d.shape
    p = torch.empty((n, k // group, k // group), dtype=torch.float64, device=d.device)
    width = max(_COLUMNS // group, 1) * group
    for first in range(0, k, group):
        for left in range(first, k, width):  # H is symmetric, and so is P
            some = d[:, left : left + width]
            spread = (d[:, first : first + group] @ h[first : first + group, left : left + width]).mul_(some)
            sums = spread.view(n, -1, group).sum(-1).double()
            i, j = first // group, left // group
            p[:, i, j : j + sums.shape[1]] = sums
            p[:, j : j + sums.shape[1], i] = sums
    return p


def _solved(s: torch.Tensor, p: torch.Tensor, r: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [N, groups] in `dtype`: s plus the least-squares step P d = r, or s where that is as good once stored.

    A row whose system cannot be solved, or one of whose scales cannot be stored, keeps all of its scales.
    """
    s = s.double()
    diagonal = p.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros may have any scale
    ridge = _RIDGE * diagonal.mean(1, keepdim=True) + empty.double()
    step, failed = torch.linalg.solve_ex(p + torch.diag_embed(ridge), r)
    stored = torch.where(empty, s, store((s + step).float(), dtype).double())
    d = stored - s
    loss = torch.einsum("ng,ngh,nh->n", d, p, d) - 2 * (r * d).sum(1)
    usable = ((stored != 0) & torch.isfinite(stored)).all(1) & (failed == 0)
    return torch.where((usable & (loss < 0))[:, None], stored, s).to(dtype)
