"""GPTQ: codes column by column, each error made good by the columns behind it (Frantar et al. 2022, arXiv:2210.17323).

    minimise  tr((Q - W) H (Q - W)^T),    H = mean x x^T,    H^-1 = R^T R with R upper triangular
    column i: q_i = nearest code to w_i;  e = (w_i - q_i) / R_ii;  w_j -= e R_ij for all j > i

Columns go by falling H_ii within their group, and groups by their largest, so that groups stay contiguous. Scales and
zero points are those of `start`; afterwards each row's scales are fitted once more, with the codes as they are:

    (D H D^T) s = D H w^T,    row g of D: the row's levels in group g, else zeros

With `shift`, C = mean (x' - x) x^T for the inputs x' of the float model and x behind quantized layers, the target is
the least-squares solution of Q x = W x':  W + beta W C H^-1.
"""

from __future__ import annotations

import dataclasses

import torch

from spicerack.levels import level_values, nearest, store
from spicerack.qtensor import QTensor
from spicerack.scheme import Scheme
from spicerack.solved import Solved

DAMPING = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the mean of H's diagonal that are added to it, until H is positive definite."""
BETA = 0.5
"""Of the shift: all of it overfits small calibration sets."""
_BLOCK = 128
_DOUBLE = 4096
"""Columns up to which H is factored in float64."""
_CHUNK = 1 << 25
"""Values in memory at once while scales are fitted."""


def fits(scheme: Scheme) -> bool:
    """Whether rows are independent of each other but for a scale of the tensor, and scales are plain numbers."""
    return scheme.min is None and not isinstance(scheme.scale, Scheme) and scheme.block[0] in (1, None)


def solve(
    w: torch.Tensor, start: QTensor, gram: torch.Tensor, shift: torch.Tensor | None = None, *, beta: float = BETA
) -> Solved:
    """w [N, K], rounded to `start` -> codes and scales with less error in the output; no row gets worse, but for
    rows that share one scale of the tensor, which together do not.

    gram, shift: H and C, float [K, K]. `start` itself, with an event that says why, if H is not finite or cannot be
    factored. The scheme must be one that `fits`.
    """
    gram = gram.double() if w.shape[1] <= _DOUBLE else gram.float()
    if not bool(torch.isfinite(gram).all()):
        return Solved(start, ("inputs are not finite: kept round-to-nearest",))
    events = []
    dead = gram.diagonal() == 0
    if bool(dead.any()):
        events.append(f"{int(dead.sum())} input columns are always 0")
        gram = gram + torch.diag(dead.to(gram.dtype))
    damping, lower = _factor(gram)
    if lower is None:
        return Solved(start, (*events, "inputs are not positive definite: kept round-to-nearest"))
    if damping > DAMPING[0]:
        events.append(f"damping raised to {damping:g}")
    inverse = torch.cholesky_inverse(lower)
    target = w.float()
    if shift is not None:
        target = target + (beta * (w.to(gram.dtype) @ shift.to(gram.dtype)) @ inverse).float()
    order = _order(gram.diagonal(), start.scheme.block_shape(*w.shape)[1])
    factor = torch.linalg.cholesky(inverse[order][:, order], upper=True).float()
    del inverse, lower
    if not bool(torch.isfinite(factor).all()):
        return Solved(start, (*events, "inputs are not positive definite: kept round-to-nearest"))
    codes = _walk(target, start, factor, order)
    h = gram.float()
    best = _least(start, dataclasses.replace(start, codes=codes), target, h)
    return Solved(_fitted(best, target, h), tuple(events))


def objective(q: QTensor, target: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """float64 [N]: (q - target) H (q - target)^T of every row."""
    error = _decoded(q) - target
    return ((error @ gram.to(error.dtype)) * error).sum(1, dtype=torch.float64)


def _factor(gram: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """The damping that it took, and L with L L^T = H + damping * mean(diag H)."""
    mean = gram.diagonal().mean()
    for damping in DAMPING:
        lower, failed = torch.linalg.cholesky_ex(gram + torch.diag((damping * mean).expand(len(gram))))
        if not int(failed):
            return damping, lower
    return DAMPING[-1], None


def _order(diagonal: torch.Tensor, group: int) -> torch.Tensor:
    """Columns in the order of the walk. Ties keep their order, so that it depends on nothing else."""
    within = diagonal.view(-1, group).argsort(dim=1, descending=True, stable=True)
    groups = diagonal.view(-1, group).amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(0, len(diagonal), group, device=diagonal.device)[:, None])[groups].reshape(-1)


def _walk(target: torch.Tensor, start: QTensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes like start's. Blocks of columns: what follows a block is corrected once, behind it."""
    n, k = target.shape
    left = target.t()[order].contiguous()  # [K, N]: a column of W in one piece
    scale, zero = (_by_column(part, n, k)[:, order].t() for part in (_scale(start), _zero(start)))
    inverse = torch.where(scale == 0, 0.0, 1 / scale).contiguous()
    codes = torch.empty((k, n), dtype=start.codes.dtype, device=target.device)
    for first in range(0, k, _BLOCK):
        last = min(first + _BLOCK, k)
        errors = torch.empty((last - first, n), device=target.device)
        for i in range(first, last):
            code = nearest(left[i] * inverse[i], start.scheme.levels, zero[i])
            codes[i] = code
            error = (left[i] - scale[i] * level_values(code, start.scheme.levels, zero[i])) / factor[i, i]
            errors[i - first] = error
            left[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
        left[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous()


def _least(a: QTensor, b: QTensor, target: torch.Tensor, gram: torch.Tensor) -> QTensor:
    """Row by row the better of two with the same scales."""
    better = objective(b, target, gram) < objective(a, target, gram)
    return dataclasses.replace(a, codes=torch.where(better[:, None], b.codes, a.codes))


def _fitted(q: QTensor, target: torch.Tensor, gram: torch.Tensor) -> QTensor:
    """Least-squares scales, as stored, for the rows (or the tensor) that they make better."""
    n, k = target.shape
    _, group = q.scheme.block_shape(n, k)
    groups = k // group
    assert isinstance(q.scale, torch.Tensor)
    levels = level_values(q.codes, q.scheme.levels, _by_column(_zero(q), n, k))
    by_group = gram.view(groups, group, k)
    products = torch.empty((n, groups, groups), dtype=torch.float64, device=target.device)
    step = max(_CHUNK // (groups * k), 1)
    for first in range(0, n, step):
        some = levels[first : first + step]
        spread = torch.einsum("ngi,gij->ngj", some.view(-1, groups, group), by_group)
        products[first : first + step] = (spread * some[:, None]).view(-1, groups, groups, group).sum(-1)
    wanted = ((target @ gram) * levels).view(n, groups, group).sum(-1, dtype=torch.float64)
    old = _scale(q).expand(n, groups).double()
    if len(q.scale) != n:
        products, wanted, old = products.sum(0, keepdim=True), wanted.sum(0, keepdim=True), old[:1]
    diagonal = products.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros may have any scale
    ridge = 1e-9 * diagonal.mean(1, keepdim=True) + empty.double()
    solved, failed = torch.linalg.solve_ex(products + torch.diag_embed(ridge), wanted)
    stored = store(solved.float(), q.scale.dtype).double()
    stored = torch.where(empty, old, stored)

    def loss(s: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ng,ngh,nh->n", s, products, s) - 2 * (wanted * s).sum(1)

    usable = ((stored != 0) & torch.isfinite(stored)).all(1) & (failed == 0)
    better = usable & (loss(stored) < loss(old))
    scale = torch.where(better[:, None], stored, old).to(q.scale.dtype)
    return dataclasses.replace(q, scale=scale.contiguous())


def _decoded(q: QTensor) -> torch.Tensor:
    n, k = q.shape
    return _by_column(_scale(q), n, k) * level_values(q.codes, q.scheme.levels, _by_column(_zero(q), n, k))


def _scale(q: QTensor) -> torch.Tensor:
    assert isinstance(q.scale, torch.Tensor)
    return q.scale.float()


def _zero(q: QTensor) -> torch.Tensor:
    return torch.zeros((1, 1), device=q.codes.device) if q.zero is None else q.zero.float()


def _by_column(grid: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """[N or 1, groups or 1] -> [N, K]."""
    return grid.repeat_interleave(k // grid.shape[1], dim=1).expand(n, k)
