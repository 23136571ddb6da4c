"""GPTQ: codes column by column, each error made good by the columns behind it (Frantar et al. 2022, arXiv:2210.17323).

    minimise  tr((Q - W) H (Q - W)^T),    H = mean x x^T = U U^T with U upper triangular
    column j: q_j = nearest code to  w_j + sum_i<j (w_i - q_i) U_ij / U_jj

which gives what updates by H^-1 give, without inverting H (Chee et al. 2023, arXiv:2307.13304). Columns go by falling
H_ii within their group, and groups by their largest, so that groups stay contiguous. Scales and zero points are those
of `start`; afterwards each row's scales are fitted once more, with the codes as they are:

    (D H D^T) s = D H w^T,    row g of D: the row's levels in group g, else zeros

With a pull W C, C = mean (x' - x) x^T for the inputs x' of the float model and x behind quantized layers, the target is
the least-squares solution of Q x = W x':  W + beta W C H^-1.
"""

from __future__ import annotations

import dataclasses

import torch

from spicerack.algorithms.solved import Solved
from spicerack.numerics.levels import level_values, nearest
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import store
from spicerack.numerics.scheme import Scheme

DAMPING = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the mean of H's diagonal that are added to it, until H is positive definite."""
BETA = 0.5
"""Of the pull: all of it overfits small calibration sets."""
_BLOCK = 128
DOUBLE = 4096
"""Columns up to which H is factored in float64."""
_ROWS, _COLUMNS, _PIECE = 512, 1024, 1 << 24
"""In memory at once: rows and columns while losses are taken and scales are fitted, values while a matrix is turned."""


def fits(scheme: Scheme) -> bool:
    """Whether rows are independent of each other but for a scale of the tensor, and scales are plain numbers."""
    return scheme.min is None and not isinstance(scheme.scale, Scheme) and scheme.block[0] in (1, None)


def solve(
    w: torch.Tensor, start: QTensor, gram: torch.Tensor, pull: torch.Tensor | None = None, *, beta: float = BETA
) -> Solved:
    """w [N, K], rounded to `start` -> codes and scales with less error in the output; no row gets worse, but for
    rows that share one scale of the tensor, which together do not.

    gram: H, float [K, K]; pull: W C, float32 [N, K], which is overwritten. `start` itself, with an event that says why,
    if H is not finite or cannot be factored. The scheme must be one that `fits`.
    """
    gram = gram.double() if w.shape[1] <= DOUBLE else gram.float()
    if not bool(torch.isfinite(torch.stack([gram.amin(), gram.amax()])).all()):
        return Solved(start, ("inputs are not finite: kept round-to-nearest",))
    events = []
    dead = int((gram.diagonal() == 0).sum())
    if dead:
        events.append(f"{dead} input columns are always 0")
    order = _order(gram.diagonal(), start.scheme.block_shape(*w.shape)[1])
    damping, upper = _factor(gram, order)
    if upper is None:
        return Solved(start, (*events, "inputs are not positive definite: kept round-to-nearest"))
    if damping > DAMPING[0]:
        events.append(f"damping raised to {damping:g}")
    target = w.float()
    if pull is not None:
        for rows, some in zip(pull.split(_ROWS), target.split(_ROWS), strict=True):
            rows.copy_(some + beta * _divided(rows, upper, order))
        target = pull
    codes = _walk(target, start, upper, order)
    del upper
    return Solved(_fitted(start, codes, target, gram.float()), tuple(events))


def objective(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """float64 [N]: e H e^T of every row of `error` [N, K], for a symmetric H [K, K] of its type."""
    total = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    for first in range(0, error.shape[1], _COLUMNS):
        rest, width = error[:, first:], min(_COLUMNS, error.shape[1] - first)
        products = (rest[:, :width] @ gram[first : first + width, first:]).mul_(rest)
        total += 2 * products.sum(1, dtype=torch.float64) - products[:, :width].sum(1, dtype=torch.float64)
    return total


def _factor(gram: torch.Tensor, order: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """The damping that it took, and U, float32, with U U^T = H + damping * mean(diag H), columns of H by `order`.

    Columns that are always 0 have 1 on H's diagonal. There is one matrix in memory beside H.
    """
    mean = gram.diagonal().mean()
    backwards = order.flip(0)
    diagonal = gram.diagonal()[backwards]
    h, failed = torch.empty_like(gram), torch.empty((), dtype=torch.int32, device=gram.device)
    for damping in DAMPING:
        for rows, some in zip(h.split(_ROWS), backwards.split(_ROWS), strict=True):
            torch.index_select(gram[some], 1, backwards, out=rows)
        h.diagonal().add_(damping * mean + (diagonal == 0).to(h.dtype))
        torch.linalg.cholesky_ex(h, out=(h, failed))  # in place
        if not int(failed):
            _reverse(h.view(-1))
            upper = h.float()
            return damping, upper if bool(torch.isfinite(torch.stack([upper.amin(), upper.amax()])).all()) else None
    return DAMPING[-1], None


def _reverse(x: torch.Tensor) -> None:
    """x [n], last value first, in place."""
    half = len(x) // 2
    for first in range(0, half, _PIECE):
        size = min(_PIECE, half - first)
        head, tail = x[first : first + size], x[len(x) - first - size : len(x) - first]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)


def _divided(x: torch.Tensor, upper: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [N, K] times H^-1."""
    half = torch.linalg.solve_triangular(upper.t(), x[:, order], upper=False, left=False)
    found = torch.empty_like(x)
    found[:, order] = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return found


def _order(diagonal: torch.Tensor, group: int) -> torch.Tensor:
    """Columns in the order of the walk. Ties keep their order, so that it depends on nothing else."""
    within = diagonal.view(-1, group).argsort(dim=1, descending=True, stable=True)
    groups = diagonal.view(-1, group).amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(0, len(diagonal), group, device=diagonal.device)[:, None])[groups].reshape(-1)


def _walk(target: torch.Tensor, start: QTensor, upper: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes like start's. Blocks of columns: what is before a block is made good in all of it at once."""
    n, k = target.shape
    left = target.t()[order].contiguous()  # [K, N]: a column of W in one piece; behind the walk, what is wrong with it
    scale, zero = (part.t().contiguous() for part in (_scale(start), _zero(start)))  # [groups or 1, N or 1]
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    wide, levels = k // len(scale), start.scheme.levels
    groups = (order // wide).tolist()
    codes = torch.empty((k, n), dtype=start.codes.dtype, device=target.device)
    for first in range(0, k, _BLOCK):
        last = min(first + _BLOCK, k)
        factors = (upper[:last, first:last] / upper.diagonal()[first:last]).t().contiguous()
        wanted = left[first:last].addmm(factors[:, :first], left[:first])
        for i in range(first, last):
            g = groups[i]
            offset = zero[g % len(zero)]
            now = wanted[i - first].addmv_(left[first:i].t(), factors[i - first, first:i])
            code = nearest(now * inverse[g], levels, offset)
            codes[i] = code
            left[i].sub_(scale[g] * level_values(code, levels, offset))
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous()


def _fitted(start: QTensor, codes: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> QTensor:
    """Row by row `codes` or start's, with which it has less error, and for those least-squares scales, as stored, for
    the rows (or the tensor) that they make better.

    Scales s + d have  d P d - 2 d r  more loss, P = D H D^T and r = D H (target - decoded).
    """
    n, k = codes.shape
    _, group = start.scheme.block_shape(n, k)
    assert isinstance(start.scale, torch.Tensor)
    one = len(start.scale) != n
    nothing = torch.zeros((1, k // group), dtype=torch.float64, device=target.device)
    total = torch.diag_embed(nothing), nothing
    chosen, scales = [], []
    for first in range(0, n, _ROWS):
        some = slice(first, first + _ROWS)
        q, pulls = _better(_rows(start, some), codes[some], target[some], gram)
        levels = _levels(q)
        products = _products(levels, gram, group)
        wanted = pulls.mul_(levels).view(len(levels), -1, group).sum(-1, dtype=torch.float64)
        chosen.append(q.codes)
        if one:
            total = total[0] + products.sum(0, keepdim=True), total[1] + wanted.sum(0, keepdim=True)
        else:
            scales.append(_rescaled(_scale(q), products, wanted, start.scale.dtype))
    scale = _rescaled(_scale(start), *total, start.scale.dtype) if one else torch.cat(scales)
    return dataclasses.replace(start, codes=torch.cat(chosen), scale=scale)


def _better(
    start: QTensor, codes: torch.Tensor, target: torch.Tensor, gram: torch.Tensor
) -> tuple[QTensor, torch.Tensor]:
    """Row by row the better of start's codes and `codes`; and (target - decoded) H, float32 [N, K]."""
    found = dataclasses.replace(start, codes=codes)
    error = target - _decoded(found)
    pulls = error @ gram
    losses = (pulls * error).sum(1, dtype=torch.float64)
    plain = target - _decoded(start)
    worse = (losses >= objective(plain, gram)).nonzero().squeeze(1)
    if len(worse):
        pulls[worse] = plain[worse] @ gram
        found = dataclasses.replace(start, codes=codes.index_copy(0, worse, start.codes[worse]))
    return found, pulls


def _products(levels: torch.Tensor, gram: torch.Tensor, group: int) -> torch.Tensor:
    """P = D H D^T, float64 [N, groups, groups], for levels [N, K]."""
    n, k = levels.shape
    found = torch.empty((n, k // group, k // group), dtype=torch.float64, device=levels.device)
    width = max(_COLUMNS // group, 1) * group
    for first in range(0, k, group):
        for left in range(first, k, width):  # H is symmetric, and so is P
            some = levels[:, left : left + width]
            spread = (levels[:, first : first + group] @ gram[first : first + group, left : left + width]).mul_(some)
            sums = spread.view(n, -1, group).sum(-1).double()
            g, h = first // group, left // group
            found[:, g, h : h + sums.shape[1]] = sums
            found[:, h : h + sums.shape[1], g] = sums
    return found


def _rescaled(old: torch.Tensor, products: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [N, groups] in `dtype`: the least-squares ones, or the old ones where those are as good."""
    old = old.double()
    diagonal = products.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros may have any scale
    ridge = 1e-9 * diagonal.mean(1, keepdim=True) + empty.double()
    solved, failed = torch.linalg.solve_ex(products + torch.diag_embed(ridge), wanted)
    stored = torch.where(empty, old, store((old + solved).float(), dtype).double())
    step = stored - old
    loss = torch.einsum("ng,ngh,nh->n", step, products, step) - 2 * (wanted * step).sum(1)
    usable = ((stored != 0) & torch.isfinite(stored)).all(1) & (failed == 0)
    return torch.where((usable & (loss < 0))[:, None], stored, old).to(dtype)


def _rows(q: QTensor, some: slice) -> QTensor:
    """Of q, whose scale may be the tensor's."""
    assert isinstance(q.scale, torch.Tensor)
    scale = q.scale[some] if len(q.scale) > 1 else q.scale
    zero = q.zero[some] if q.zero is not None and len(q.zero) > 1 else q.zero
    return dataclasses.replace(q, codes=q.codes[some], scale=scale, zero=zero)


def _levels(q: QTensor) -> torch.Tensor:
    """float32 [N, K]: level[code] - zero."""
    return level_values(q.codes, q.scheme.levels, _by_column(_zero(q), *q.codes.shape))


def _decoded(q: QTensor) -> torch.Tensor:
    return _levels(q) * _by_column(_scale(q), *q.codes.shape)


def _scale(q: QTensor) -> torch.Tensor:
    assert isinstance(q.scale, torch.Tensor)
    return q.scale.float()


def _zero(q: QTensor) -> torch.Tensor:
    return torch.zeros((1, 1), device=q.codes.device) if q.zero is None else q.zero.float()


def _by_column(grid: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """[N or 1, groups or 1] -> [N, K]."""
    return grid.repeat_interleave(k // grid.shape[1], dim=1).expand(n, k)
