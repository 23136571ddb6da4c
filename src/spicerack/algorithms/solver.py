"""`Solver`: all that a file in `solvers/` says of itself in its one constant, SOLVER, and the solvers by name.

Every solver begins with codes that there are already (`start`: the weight rounded to nearest, or what another solver
made of it), and returns nothing that is worse by its own measure. What it needs beside them decides who calls it when:

    nothing   the weight alone: any tensor, with or without calibration text
    gram      H = mean x x^T of the layer's inputs: layer by layer, as the text reaches them
    block     a way to run the whole block: once all of its layers hold codes

A solver is one of three types, one for each need, so that what its `solve` is called with is known to the type checker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from spicerack import plugins
from spicerack.algorithms.descent import Forward, Told, Tunable
from spicerack.algorithms.solved import Solved
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme

Obstacle = Callable[[Scheme], str | None]
"""A scheme -> why the solver cannot choose its codes, a clause such as "its levels are a table"; None if it can."""
Memory = Callable[[int, int], int]
"""N, K -> bytes that solving a weight [N, K] takes beside the statistics of its inputs, the weight itself included."""

_FOLDER = "algorithms.solvers"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSolver:
    """A solver of single weights that needs nothing else, and so no calibration text.

    solve: a weight [..., N, K] and `start` -> its codes; called with schemes without an obstacle only.
    """

    solve: Callable[[torch.Tensor, QTensor], Solved]
    obstacle: Obstacle
    memory: Memory
    needs: Literal["nothing"] = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class GramSolver:
    """A solver of single weights that needs the gram matrix of their inputs.

    solve: a weight W [N, K], `start`, H float32 [K, K], and the pull W C float32 [N, K] towards what the float model's
    layer makes of the inputs that it gets there (None where that is not known) -> its codes; called with schemes
    without an obstacle only. The pull may be overwritten.
    """

    solve: Callable[[torch.Tensor, QTensor, torch.Tensor, torch.Tensor | None], Solved]
    obstacle: Obstacle
    memory: Memory
    needs: Literal["gram"] = "gram"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSolver:
    """A solver of all layers of a block at once, by what comes out of the block.

    solve: layers by name, `Forward`, how many sequences of text there are, and who is told of steps -> codes by name;
    called with layers of schemes without an obstacle only. starts_from: the name of the solver whose codes it begins
    with, wherever that one can do the scheme. memory: as with other solvers; the layers of a block take it all at the
    same time.
    """

    solve: Callable[[Mapping[str, Tunable], Forward, int, Told], dict[str, Solved]]
    starts_from: str
    obstacle: Obstacle
    memory: Memory
    needs: Literal["block"] = "block"


Solver = WeightSolver | GramSolver | BlockSolver


def names() -> tuple[str, ...]:
    """Names of all solvers, sorted; none is imported."""
    return plugins.names(_FOLDER)


def get(name: str) -> Solver:
    """The solver of this name. Raises KeyError if there is no such file."""
    solver = plugins.get(_FOLDER, name, "SOLVER")
    assert isinstance(solver, WeightSolver | GramSolver | BlockSolver)
    return solver


def opening(name: str) -> WeightSolver | GramSolver:
    """What solves single weights where the method's solver is `name`: that one, or the one that it starts from."""
    solver = get(opening_name(name))
    assert solver.needs != "block"
    return solver


def opening_name(name: str) -> str:
    """The name of that one."""
    while (solver := get(name)).needs == "block":
        name = solver.starts_from
    return name


def solve_weight(
    name: str,
    w: torch.Tensor,
    start: QTensor,
    gram: torch.Tensor | None = None,
    pull: torch.Tensor | None = None,
) -> Solved:
    """Codes of one weight, chosen by the solver `name` or, if that needs the block, by the one that it starts from.

    w         [..., N, K], float, on the device of `start`
    start     the same, rounded to nearest
    gram      H of the layer's inputs, float32 [K, K]; without it, a solver that needs it leaves `start` as it is
    pull      see `GramSolver`

    A scheme that the solver cannot do keeps `start`, or what the one gives that it starts from; an event says why.
    """
    opener = opening(name)
    if opener.needs == "gram" and gram is None:
        return Solved(start)
    if opener.obstacle(start.scheme) is not None:
        reason = get(name).obstacle(start.scheme)  # None: a learner that can do what its opening solver cannot
        events = () if reason is None else (f"{name} cannot do {start.scheme} ({reason}): rounded to nearest",)
        return Solved(start, events)
    if opener.needs == "nothing":
        solved = opener.solve(w, start)
    else:
        assert gram is not None
        solved = opener.solve(w, start, gram, pull)
    reason = get(name).obstacle(start.scheme)
    if reason is None:
        return solved
    return Solved(solved.q, (f"{name} cannot do {start.scheme} ({reason}): {opening_name(name)} did", *solved.events))
