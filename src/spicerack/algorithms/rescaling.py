"""Scales by least squares, with the codes as they are: the last step of a solver that chose codes by a layer's output.

    minimise over s   (s D - w) H (s D - w)^T    for each row w;    row g of D: the row's levels in group g, else zeros

    (D H D^T) s = D H w^T

Scales and minima that are quantized themselves are integers times floats of super-blocks: there s are those floats, and
D has what each is multiplied with, levels times integers of scales, and integers of minima.

Codes were chosen for scales that rounding to nearest found before; with other codes other scales are best. Every row
(or the tensor, where there is one scale for all rows) has a system of its own, of as many unknowns as it has groups.
What comes out is rounded to the type that scales are stored in, and taken only where the error is then smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from spicerack.algorithms.columns import by_column, decoded, level_of_each
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


def rescaled(start: QTensor, walked: QTensor, target: torch.Tensor, h: torch.Tensor) -> QTensor:
    """Codes and scales with which a weight has less error than with those of `start`, row by row.

    start    the weight rounded to nearest
    walked   the same with other codes, and maybe with other scales
    target   what the codes should stand for, float32 [N, K]
    h        H, float32 [K, K], symmetric

    Rows that are nearer as they are in `start` stay so. Scales s + d have  d P d - 2 d r  more loss than s, P = D H D^T
    and r = D H (target - decoded).
    """
    floats = _floats(start)
    one = len(floats) != len(start.codes)
    total: tuple[torch.Tensor, torch.Tensor] | None = None
    chosen, steps = [], []
    for first in range(0, len(start.codes), ROWS):
        some = slice(first, first + ROWS)
        q, pulls = _better(_rows(start, some), _rows(walked, some), target[some], h)
        units = _units(q)
        p = _products(units, h, q.shape[1] // (floats.shape[1] // len(units)))
        groups = p.shape[1] // len(units)
        r = torch.cat([(pulls * d).view(len(d), groups, -1).sum(-1, dtype=torch.float64) for d in units], 1)
        chosen.append(q)
        if one:
            p, r = p.sum(0, keepdim=True), r.sum(0, keepdim=True)
            total = (p, r) if total is None else (total[0] + p, total[1] + r)
        else:
            steps.append(_solved(_floats(q), p, r, floats.dtype))
    whole = _joined(chosen)
    if one:
        assert total is not None
        return _with_floats(whole, _solved(floats, *total, floats.dtype))
    return _with_floats(whole, torch.cat(steps))


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


def _better(start: QTensor, walked: QTensor, target: torch.Tensor, h: torch.Tensor) -> tuple[QTensor, torch.Tensor]:
    """Row by row the better of both; and (target - decoded) H, float32 [N, K]."""
    e = target - decoded(walked)
    pulls = e @ h
    losses = (pulls * e).sum(1, dtype=torch.float64)
    plain = target - decoded(start)
    worse = (losses >= objective(plain, h)).nonzero().squeeze(1)
    if len(worse):
        pulls[worse] = plain[worse] @ h
        walked = _with_rows(walked, worse, start)
    return walked, pulls


# ---- rows and floats of QTensors -------------------------------------------------------------------------------------


def _mapped(q: QTensor, change: Callable[[torch.Tensor, str], torch.Tensor], prefix: str = "") -> QTensor:
    """q with `change` done to each tensor in it, which is told its name, such as "scale.codes"."""
    parts: dict[str, Any] = {}
    for name in ("codes", "scale", "zero", "min"):
        part = getattr(q, name)
        if part is not None:
            nested = isinstance(part, QTensor)
            parts[name] = _mapped(part, change, f"{prefix}{name}.") if nested else change(part, f"{prefix}{name}")
    return dataclasses.replace(q, **parts)


def _named(q: QTensor) -> dict[str, torch.Tensor]:
    """All tensors in q, by the names of `_mapped`."""
    named: dict[str, torch.Tensor] = {}
    _mapped(q, lambda tensor, name: named.setdefault(name, tensor))
    return named


def _rows(q: QTensor, some: slice) -> QTensor:
    """Some rows of q; what the tensor has one of is theirs too."""
    return _mapped(q, lambda tensor, _name: tensor[some] if len(tensor) > 1 else tensor)


def _with_rows(q: QTensor, rows: torch.Tensor, other: QTensor) -> QTensor:
    """q with some rows, int64, of `other`; what the tensor has one of is both's."""
    theirs = _named(other)

    def replaced(tensor: torch.Tensor, name: str) -> torch.Tensor:
        if len(tensor) == 1:
            return tensor
        # torch has no index_copy of float8: scales that are powers of two are copied as bytes
        ours, new = (part.view(torch.uint8) if part.itemsize == 1 else part for part in (tensor, theirs[name]))
        return ours.index_copy(0, rows, new[rows]).view(tensor.dtype)

    return _mapped(q, replaced)


def _joined(pieces: list[QTensor]) -> QTensor:
    """Inverse of `_rows`, all pieces of ROWS rows together."""
    named = [_named(piece) for piece in pieces]
    n = sum(len(piece["codes"]) for piece in named)
    shared = {name for name, tensor in named[0].items() if len(tensor) == 1 < n}
    return _mapped(
        pieces[0], lambda tensor, name: tensor if name in shared else torch.cat([piece[name] for piece in named])
    )


def _floats(q: QTensor) -> torch.Tensor:
    """What is fitted, as stored: scales, or floats of super-blocks, and behind them minima, [N or 1, floats]."""
    parts = [part for part in (q.scale, q.min) if part is not None]
    return torch.cat([part.plain_scale if isinstance(part, QTensor) else part for part in parts], 1)


def _with_floats(q: QTensor, floats: torch.Tensor) -> QTensor:
    """q with other `_floats`."""
    parts = {name: part for name, part in (("scale", q.scale), ("min", q.min)) if part is not None}
    changed: dict[str, Any] = {}
    for (name, part), values in zip(parts.items(), floats.chunk(len(parts), 1), strict=True):
        changed[name] = dataclasses.replace(part, scale=values) if isinstance(part, QTensor) else values
    return dataclasses.replace(q, **changed)


def _units(q: QTensor) -> list[torch.Tensor]:
    """What `_floats` are multiplied with in each weight, float32 [N, K]: one for scales, and one for minima if any."""
    shape = q.codes.shape
    units = [level_of_each(q)]
    if isinstance(q.scale, QTensor):
        units[0] = units[0] * by_column(level_of_each(q.scale), *shape)
    if q.min is not None:
        coded = by_column(level_of_each(q.min), *shape) if isinstance(q.min, QTensor) else torch.ones_like(units[0])
        units.append(coded)
    return units


# ---- the systems -----------------------------------------------------------------------------------------------------


def _products(units: list[torch.Tensor], h: torch.Tensor, group: int) -> torch.Tensor:
    """P = D H D^T, float64 [N, floats, floats], for units [N, K] of groups of columns; a product of two groups is
    float32."""
    blocks = [[_product(a, b, h, group, symmetric=i == j) for j, b in enumerate(units)] for i, a in enumerate(units)]
    return torch.cat([torch.cat(row, 2) for row in blocks], 1)


def _product(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor, group: int, *, symmetric: bool) -> torch.Tensor:
    """A H B^T for units a and b [N, K]. symmetric: they are the same."""
    n, k = a.shape
    p = torch.empty((n, k // group, k // group), dtype=torch.float64, device=a.device)
    width = max(_COLUMNS // group, 1) * group
    for first in range(0, k, group):
        for left in range(first if symmetric else 0, k, width):  # H is symmetric, and so is P
            some = b[:, left : left + width]
            spread = (a[:, first : first + group] @ h[first : first + group, left : left + width]).mul_(some)
            sums = spread.view(n, -1, group).sum(-1).double()
            i, j = first // group, left // group
            p[:, i, j : j + sums.shape[1]] = sums
            if symmetric:
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
