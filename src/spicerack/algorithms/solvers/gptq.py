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
from spicerack.algorithms.solver import GramSolver
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import store
from spicerack.numerics.scheme import Scheme

DAMPING = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the mean of H's diagonal that are added to it, until H is positive definite; the first is the paper's."""
BETA = 0.5
"""Of the pull: all of it overfits small calibration sets."""
DOUBLE = 4096
"""Columns up to which H is factored in float64; above, in float32, memory is what counts."""
_BLOCK = 128
"""Columns after which errors are made good in all that is left at once, the paper's B: only faster, not another
result."""
_ROWS, _COLUMNS, _PIECE = 512, 1024, 1 << 24
"""In memory at once: rows and columns while losses are taken and scales are fitted, values while a matrix is turned."""
_PIECES = 256 << 20
"""Bytes of those: the systems P of `_ROWS` rows are most of them, 206 MB at K = 28672 in groups of 128."""


def obstacle(scheme: Scheme) -> str | None:
    """Why rows cannot be walked by columns, or their scales fitted; None if they can. One scale may be the tensor's."""
    return scheme.scale_obstacle or scheme.rows_obstacle or scheme.codes_obstacle


def memory(n: int, k: int) -> int:
    """Bytes for W [N, K] beside H in float32 and the pull: factoring H, and 16 of a weight, as four float32 matrices.

    Up to DOUBLE columns H is made float64, factored in a second such matrix, and U is float32: 8 + 8 + 4 bytes for each
    of its values; above, only U is beside it. The four are W, what the walk leaves of it, and the codes, start's and
    new ones, before and after they are turned, with what decodes them. Measured on a block of Llama-70B's shapes: with
    all else 13.9 of 14.2 GB planned (docs/calibrate.md).
    """
    factoring = (8 + 8 + 4 if k <= DOUBLE else 4) * k * k
    return factoring + 16 * n * k + _PIECES


def solve(
    w: torch.Tensor, start: QTensor, h: torch.Tensor, pull: torch.Tensor | None = None, *, beta: float = BETA
) -> Solved:
    """W [N, K], rounded to `start` -> codes and scales with less error in the output; no row gets worse, but for rows
    that share one scale of the tensor, which together do not.

    w        W, float [N, K]
    start    of a scheme without an obstacle
    h        H, float [K, K], symmetric
    pull     W C, float32 [N, K], which is overwritten; None: the target is W
    beta     how much of the pull counts, 0 to 1

    `start` itself, with an event that says why, if H is not finite or cannot be factored.
    """
    h = h.double() if w.shape[1] <= DOUBLE else h.float()
    if not bool(torch.isfinite(torch.stack([h.amin(), h.amax()])).all()):
        return Solved(start, ("inputs are not finite: kept round-to-nearest",))
    dead = int((h.diagonal() == 0).sum())
    events = [f"{dead} input columns are always 0"] if dead else []
    order = _order(h.diagonal(), start.scheme.block_shape(*w.shape)[1])
    damping, u = _factor(h, order)
    if u is None:
        return Solved(start, (*events, "inputs are not positive definite: kept round-to-nearest"))
    if damping > DAMPING[0]:
        events.append(f"damping raised to {damping:g}")
    target = w.float()
    if pull is not None:
        for rows, some in zip(pull.split(_ROWS), target.split(_ROWS), strict=True):
            rows.copy_(some + beta * _divided(rows, u, order))
        target = pull
    codes = _walk(target, start, u, order)
    del u
    return Solved(_fitted(start, codes, target, h.float()), tuple(events))


def objective(e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """float64 [N]: e H e^T of every row of the errors e [N, K], for a symmetric H [K, K] of its type."""
    total = torch.zeros(len(e), dtype=torch.float64, device=e.device)
    for first in range(0, e.shape[1], _COLUMNS):
        rest, width = e[:, first:], min(_COLUMNS, e.shape[1] - first)
        products = (rest[:, :width] @ h[first : first + width, first:]).mul_(rest)
        total += 2 * products.sum(1, dtype=torch.float64) - products[:, :width].sum(1, dtype=torch.float64)
    return total


# ---- the walk over the columns ---------------------------------------------------------------------------------------


def _factor(h: torch.Tensor, order: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """The damping that it took, and U, float32, with U U^T = H + damping * mean(diag H), columns of H by `order`.

    Columns that are always 0 have 1 on H's diagonal. There is one matrix in memory beside H: it is filled backwards,
    its lower triangular factor is taken in place, and turned round that is the upper one of H.
    """
    mean = h.diagonal().mean()
    backwards = order.flip(0)
    diagonal = h.diagonal()[backwards]
    damped, failed = torch.empty_like(h), torch.empty((), dtype=torch.int32, device=h.device)
    for damping in DAMPING:
        for rows, some in zip(damped.split(_ROWS), backwards.split(_ROWS), strict=True):
            torch.index_select(h[some], 1, backwards, out=rows)
        damped.diagonal().add_(damping * mean + (diagonal == 0).to(damped.dtype))
        torch.linalg.cholesky_ex(damped, out=(damped, failed))  # in place
        if not int(failed):
            _reverse(damped.view(-1))
            u = damped.float()
            return damping, u if bool(torch.isfinite(torch.stack([u.amin(), u.amax()])).all()) else None
    return DAMPING[-1], None


def _reverse(x: torch.Tensor) -> None:
    """Turn x [n] round in place, last value first, a piece at a time."""
    half = len(x) // 2
    for first in range(0, half, _PIECE):
        size = min(_PIECE, half - first)
        head, tail = x[first : first + size], x[len(x) - first - size : len(x) - first]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)


def _divided(x: torch.Tensor, u: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x H^-1, float32 [N, K], for x [N, K] and the factor U [K, K] of H, whose columns go by `order`."""
    half = torch.linalg.solve_triangular(u.t(), x[:, order], upper=False, left=False)
    quotient = torch.empty_like(x)
    quotient[:, order] = torch.linalg.solve_triangular(u, half, upper=True, left=False)
    return quotient


def _order(diagonal: torch.Tensor, group: int) -> torch.Tensor:
    """Columns in the order of the walk, int64 [K], from H's diagonal [K]: in groups, see the top of this file.

    Ties keep their order, so that it depends on nothing else.
    """
    within = diagonal.view(-1, group).argsort(dim=1, descending=True, stable=True)
    groups = diagonal.view(-1, group).amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(0, len(diagonal), group, device=diagonal.device)[:, None])[groups].reshape(-1)


def _walk(target: torch.Tensor, start: QTensor, u: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] of start's type for the target [N, K], column by column in `order`, with the factor U [K, K].

    Blocks of columns: what is wrong before a block is made good in all of it at once.
    """
    n, k = target.shape
    e = target.t()[order].contiguous()  # [K, N]: a column of W in one piece; behind the walk, what is wrong with it
    scale, zero = (part.t().contiguous() for part in (_scale(start), _zero(start)))  # [groups or 1, N or 1]
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    wide, levels = k // len(scale), start.scheme.levels
    groups = (order // wide).tolist()
    q = torch.empty((k, n), dtype=start.codes.dtype, device=target.device)
    for first in range(0, k, _BLOCK):
        last = min(first + _BLOCK, k)
        factors = (u[:last, first:last] / u.diagonal()[first:last]).t().contiguous()
        w = e[first:last].addmm(factors[:, :first], e[:first])
        for i in range(first, last):
            g = groups[i]
            offset = zero[g % len(zero)]
            corrected = w[i - first].addmv_(e[first:i].t(), factors[i - first, first:i])
            code = levels.encode(corrected * inverse[g], offset)
            q[i] = code
            e[i].sub_(scale[g] * levels.decode(code, offset))
    codes = torch.empty_like(q)
    codes[order] = q
    return codes.t().contiguous()


# ---- scales behind it ------------------------------------------------------------------------------------------------


def _fitted(start: QTensor, codes: torch.Tensor, target: torch.Tensor, h: torch.Tensor) -> QTensor:
    """Row by row `codes` or start's, with which it has less error, and for those least-squares scales, as stored, for
    the rows (or the tensor) that they make better.

    Scales s + d have  d P d - 2 d r  more loss, P = D H D^T and r = D H (target - decoded).
    """
    n, k = codes.shape
    group = start.scheme.block_shape(n, k)[1]
    dtype = start.plain_scale.dtype
    one = len(start.plain_scale) != n
    nothing = torch.zeros((1, k // group), dtype=torch.float64, device=target.device)
    total = torch.diag_embed(nothing), nothing
    chosen, scales = [], []
    for first in range(0, n, _ROWS):
        some = slice(first, first + _ROWS)
        q, pulls = _better(_rows(start, some), codes[some], target[some], h)
        d = _levels(q)
        p = _products(d, h, group)
        r = pulls.mul_(d).view(len(d), -1, group).sum(-1, dtype=torch.float64)
        chosen.append(q.codes)
        if one:
            total = total[0] + p.sum(0, keepdim=True), total[1] + r.sum(0, keepdim=True)
        else:
            scales.append(_rescaled(_scale(q), p, r, dtype))
    scale = _rescaled(_scale(start), *total, dtype) if one else torch.cat(scales)
    return dataclasses.replace(start, codes=torch.cat(chosen), scale=scale)


def _better(start: QTensor, codes: torch.Tensor, target: torch.Tensor, h: torch.Tensor) -> tuple[QTensor, torch.Tensor]:
    """Row by row the better of start's codes and `codes` [N, K]; and (target - decoded) H, float32 [N, K]."""
    better = dataclasses.replace(start, codes=codes)
    e = target - _decoded(better)
    pulls = e @ h
    losses = (pulls * e).sum(1, dtype=torch.float64)
    plain = target - _decoded(start)
    worse = (losses >= objective(plain, h)).nonzero().squeeze(1)
    if len(worse):
        pulls[worse] = plain[worse] @ h
        better = dataclasses.replace(start, codes=codes.index_copy(0, worse, start.codes[worse]))
    return better, pulls


def _products(d: torch.Tensor, h: torch.Tensor, group: int) -> torch.Tensor:
    """P = D H D^T, float64 [N, groups, groups], for levels d [N, K]."""
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


def _rescaled(s: torch.Tensor, p: torch.Tensor, r: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [N, groups] in `dtype`: s plus the least-squares step P d = r, or s where that is as good once stored."""
    s = s.double()
    diagonal = p.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros may have any scale
    ridge = 1e-9 * diagonal.mean(1, keepdim=True) + empty.double()  # far below float32's rounding of P, but regular
    solved, failed = torch.linalg.solve_ex(p + torch.diag_embed(ridge), r)
    stored = torch.where(empty, s, store((s + solved).float(), dtype).double())
    d = stored - s
    loss = torch.einsum("ng,ngh,nh->n", d, p, d) - 2 * (r * d).sum(1)
    usable = ((stored != 0) & torch.isfinite(stored)).all(1) & (failed == 0)
    return torch.where((usable & (loss < 0))[:, None], stored, s).to(dtype)


# ---- parts of a QTensor ----------------------------------------------------------------------------------------------


def _rows(q: QTensor, some: slice) -> QTensor:
    """Some rows of q; its scale and zero point may be the tensor's, and are then theirs too."""
    scale = q.plain_scale[some] if len(q.plain_scale) > 1 else q.plain_scale
    zero = q.zero[some] if q.zero is not None and len(q.zero) > 1 else q.zero
    return dataclasses.replace(q, codes=q.codes[some], scale=scale, zero=zero)


def _levels(q: QTensor) -> torch.Tensor:
    """float32 [N, K]: level[code] - zero."""
    return q.scheme.levels.decode(q.codes, _by_column(_zero(q), *q.codes.shape))


def _decoded(q: QTensor) -> torch.Tensor:
    """float32 [N, K], the weight that the codes stand for."""
    return _levels(q) * _by_column(_scale(q), *q.codes.shape)


def _scale(q: QTensor) -> torch.Tensor:
    """float32 [N or 1, groups or 1]."""
    return q.plain_scale.float()


def _zero(q: QTensor) -> torch.Tensor:
    """float32 [N or 1, groups or 1]; 0 [1, 1] without zero points."""
    return torch.zeros((1, 1), device=q.codes.device) if q.zero is None else q.zero.float()


def _by_column(grid: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """A value for each block [N or 1, groups or 1] -> one for each weight [N, K]."""
    return grid.repeat_interleave(k // grid.shape[1], dim=1).expand(n, k)


SOLVER = GramSolver(solve=solve, obstacle=obstacle, memory=memory)
