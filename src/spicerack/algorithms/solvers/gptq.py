"""GPTQ: codes column by column, each error made good by the columns behind it (Frantar et al. 2022, arXiv:2210.17323).

    minimise  tr((Q - W) H (Q - W)^T),    H = mean x x^T = U U^T with U upper triangular
    column j: q_j = nearest code to  w_j + sum_i<j (w_i - q_i) U_ij / U_jj

which gives what updates by H^-1 give, without inverting H (Chee et al. 2023, arXiv:2307.13304). Columns go by falling
H_ii within their group, and groups by their largest, so that groups stay contiguous. Scales and zero points are those
of `start`, but for those of super-blocks, which are searched again when the walk reaches them (`grid`), an error in
column j counting U_jj^2: what of it no later column makes good. Afterwards each row's scales are fitted once more, with
the codes as they are (`rescaling`).

With a pull W C, C = mean (x' - x) x^T for the inputs x' of the float model and x behind quantized layers, the target is
the least-squares solution of Q x = W x':  W + beta W C H^-1.

The error that is made good is that of this layer's output for these inputs. Nothing looks at how the block goes on, so
that a layer's rows are independent of each other: the walk takes all of them at once, a column in one vector operation.
The paper takes columns as they come; by falling H_ii, the ones that count most are chosen while most columns are left
to make their errors good. What is given up is looking back: a code that is chosen stays.
"""

from __future__ import annotations

import torch

from spicerack.algorithms.grid import Grid
from spicerack.algorithms.rescaling import ROWS, SYSTEMS, rescaled
from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import GramSolver
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme

DAMPING = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the mean of H's diagonal that are added to it, until H is positive definite; the first is the paper's."""
BETA = 0.5
"""Of the pull: all of it overfits small calibration sets."""
DOUBLE = 4096
"""Columns up to which H is factored in float64; above, in float32, memory is what counts."""
_COLUMNS = 128
"""Columns after which errors are made good in all that is left at once, the paper's B: faster, with the same result."""
_PIECE = 1 << 24
"""Values that are swapped at once while a matrix is turned round in place."""


def obstacle(scheme: Scheme) -> str | None:
    """Why rows cannot be walked by columns, or their scales fitted; None if they can. One scale may be the tensor's."""
    return scheme.rows_obstacle or scheme.codes_obstacle


def memory(n: int, k: int) -> int:
    """Bytes for W [N, K] beside H in float32 and the pull: factoring H, and 16 of a weight, as four float32 matrices.

    Up to DOUBLE columns H is made float64, factored in a second such matrix, and U is float32: 8 + 8 + 4 bytes for each
    of its values; above, only U is beside it. The four are W, what the walk leaves of it, and the codes, start's and
    new ones, before and after they are turned, with what decodes them. Measured on a block of Llama-70B's shapes: with
    all else 13.9 of 14.2 GB planned (docs/quantization/calibration.md).
    """
    factoring = (8 + 8 + 4 if k <= DOUBLE else 4) * k * k
    return factoring + 16 * n * k + SYSTEMS


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
    grid = Grid(start)
    order = _order(h.diagonal(), grid.span or grid.columns)
    damping, u = _factor(h, order)
    if u is None:
        return Solved(start, (*events, "inputs are not positive definite: kept round-to-nearest"))
    if damping > DAMPING[0]:
        events.append(f"damping raised to {damping:g}")
    target = w.float()
    if pull is not None:
        for rows, some in zip(pull.split(ROWS), target.split(ROWS), strict=True):
            rows.copy_(some + beta * _divided(rows, u, order))
        target = pull
    walked = _walk(target, grid, u, order)
    del u
    return Solved(rescaled(start, walked, target, h.float()), tuple(events))


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
        for rows, some in zip(damped.split(ROWS), backwards.split(ROWS), strict=True):
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


def _walk(target: torch.Tensor, grid: Grid, u: torch.Tensor, order: torch.Tensor) -> QTensor:
    """The target [N, K] rounded column by column in `order`, with the factor U [K, K].

    Some columns at a time: what is wrong before them is made good in all of them at once.
    """
    n, k = target.shape
    e = target.t()[order].contiguous()  # [K, N]: a column of W in one piece; behind the walk, what is wrong with it
    levels, step = grid.start.scheme.levels, grid.span or _COLUMNS
    groups = (order // grid.columns).tolist()
    q = torch.empty((k, n), dtype=grid.start.codes.dtype, device=target.device)
    for first in range(0, k, step):
        last = min(first + step, k)
        factors = (u[:last, first:last] / u.diagonal()[first:last]).t().contiguous()
        w = e[first:last].addmm(factors[:, :first], e[:first])
        if grid.span is not None:
            grid.search(w, order[first:last], u.diagonal()[first:last].square())
        for i in range(first, last):
            g = groups[i]
            offset = grid.zero[g % len(grid.zero)]
            corrected = w[i - first].addmv_(e[first:i].t(), factors[i - first, first:i])
            if grid.low is not None:
                corrected = corrected - grid.low[g]
                e[i].sub_(grid.low[g])
            code = levels.encode(corrected * grid.inverse[g], offset)
            q[i] = code
            e[i].sub_(grid.scale[g] * levels.decode(code, offset))
    codes = torch.empty_like(q)
    codes[order] = q
    return grid.result(codes.t().contiguous())


SOLVER = GramSolver(solve=solve, obstacle=obstacle, memory=memory)
