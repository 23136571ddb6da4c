"""Codes for all targets of a block: layer by layer as the text reaches them, then, where the solver wants it, together.

What a solver needs says when it is called (`algorithms/solver.py`): one that needs the weight or its gram matrix is
called for each target, in the order of their calls, so that each is solved for what reaches it behind the ones that
have their codes already; one that needs the block is called once, when all have codes, and begins with those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from spicerack.algorithms import solver as solvers
from spicerack.algorithms.descent import Told, Tunable
from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import BlockSolver
from spicerack.machine.ranks import ALONE
from spicerack.models.blocks.look import multiplied
from spicerack.nn import kinds
from spicerack.numerics.qtensor import QTensor, moved
from spicerack.quantization.calibration.exchange import Exchange
from spicerack.quantization.calibration.flow import Flow
from spicerack.quantization.calibration.inputs import Moments, Readers, moments, rounds, stages
from spicerack.quantization.calibration.pair import Pair
from spicerack.quantization.calibration.static import observe
from spicerack.quantization.calibration.targets import Target
from spicerack.quantization.watch import Doing, within

_OPENING = 0.06
"""Of a learner's work what is done when it has the codes that it begins with: for bars only."""


def solve(
    pair: Pair, flow: Flow, exchange: Exchange, name: str, observer: str | None, doing: Doing
) -> tuple[dict[str, QTensor], dict[str, Solved]]:
    """Solve all targets of a block by the solver `name` -> by key how each is rounded to nearest, and its solution.

    pair       the block's two copies; the quantized one holds the solutions afterwards
    flow       the text in front of it
    exchange   hands solved layers to other ranks
    name       of the solver; what it needs decides when it is called
    observer   finds the scales of static activations; None where there are none
    doing      is told of statistics, layers and steps

    Targets that are not called are rounded to nearest, with an event that says so. Raises ActivationError
    naming block, layer and place.
    """
    starts: dict[str, QTensor] = {}
    solutions: dict[str, Solved] = {}
    solver = solvers.get(name)
    by_layer = within(doing, 0, _OPENING if solver.needs == "block" else 1)
    for part in (part for stage in stages(pair, flow) for part in rounds(pair, stage)):
        for readers in part:
            observe(pair, flow, readers, observer)
        _solve_mine(pair, flow, exchange, part, name, _counting(by_layer, len(solutions), len(pair.targets)))
        flow.ranks.wait()
        for target in (target for readers in part for target in _targets(pair, readers)):
            starts[target.key], solutions[target.key] = exchange.take(target)
            pair.put(target, solutions[target.key].q)
    for target in pair.targets:
        if target.key not in solutions:
            observe(pair, flow, (target.path,), observer)
            start = pair.nearest(target, None)
            event = _uncalled(pair, flow, target)
            starts[target.key], solutions[target.key] = start, Solved(start, (event,))
            pair.put(target, start)
    if solver.needs == "block":
        solutions |= _learn(pair, flow, exchange, solver, solutions, within(doing, _OPENING, 1))
    return starts, solutions


def _uncalled(pair: Pair, flow: Flow, target: Target) -> str:
    """What the ledger says of a target that is not called while the text runs through its block."""
    call = next(iter(flow.calls(ALONE)))
    hidden = flow.hidden(call)[1]
    if not target.stack and multiplied(target.path, flow.stack, pair.exact, hidden, call.arguments):
        return (
            "the model's code multiplies by its weight and does not call it, so that nothing is known of what it "
            "reads: rounded to nearest"
        )
    return "not called with the calibration text: rounded to nearest"


def _targets(pair: Pair, readers: Readers) -> list[Target]:
    """The targets at these paths, in their order."""
    by_path = {target.path: target for target in pair.targets}
    return [by_path[path] for path in readers]


def _counting(doing: Doing, done: int, count: int) -> Callable[[str, int], None]:
    """Who is told of layers by how many are solved behind the `done` ones of `count` that were before."""
    return lambda what, more: doing(f"{what}, {min(done + more + 1, count)} of {count}", (done + more) / count)


def _solve_mine(
    pair: Pair,
    flow: Flow,
    exchange: Exchange,
    part: Sequence[Readers],
    name: str,
    counting: Callable[[str, int], None],
) -> None:
    """Solve those targets of a part of a stage that are this rank's share, and hand them over.

    The costliest go first to the rank with the least to do: what solving costs grows with the weight's size.
    """
    counting(f"statistics for {part[0][0]}", 0)
    known = moments(pair, flow, part)
    by_path = {target.path: (target, readers) for readers in part for target in _targets(pair, readers)}
    costs = {path: float(pair.weight(target).numel()) for path, (target, _) in by_path.items()}
    mine = [by_path[path] for path, rank in flow.ranks.shares(costs).items() if rank == flow.ranks.rank]
    pulls: dict[str, torch.Tensor | None] = {}
    if solvers.opening(name).needs == "gram":
        pulls = {target.path: known[readers].pull(pair.weight(target)) for target, readers in mine}
    # Shifts are as large as what solving needs, which comes now: from here on nothing holds them.
    known = {readers: dataclasses.replace(one, shift=None) for readers, one in known.items()}
    for number, (target, readers) in enumerate(mine):
        counting(f"solving {target.path}", number)
        exchange.hand_over(target, *_solve_one(pair, target, known[readers], pulls.pop(target.path, None), name))


def _solve_one(
    pair: Pair, target: Target, known: Moments, pull: torch.Tensor | None, name: str
) -> tuple[QTensor, Solved]:
    """A target rounded to nearest, on the CPU, and solved, on the pair's device, with what is known of its inputs."""
    start = pair.nearest(target, known.importance)
    solved = solvers.solve_weight(name, pair.weight(target), moved(start, pair.device), known.gram, pull)
    return start, Solved(solved.q, (*known.events, *solved.events))


def _stepping(doing: Doing) -> Told:
    """Who is told of a learner's steps."""
    return lambda step, steps: doing(f"learning, step {step} of {steps}", step / steps)


def _learn(
    pair: Pair, flow: Flow, exchange: Exchange, solver: BlockSolver, solutions: Mapping[str, Solved], doing: Doing
) -> dict[str, Solved]:
    """By key the codes that a solver of whole blocks learns, of those targets whose schemes it can do.

    It begins with `solutions`, which the quantized block holds, and which stay the codes of all others.
    """
    targets = {t.key: t for t in pair.targets if solver.obstacle(solutions[t.key].q.scheme) is None}

    def forward(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        call = flow.call(numbers)
        x = flow.states.sequences(flow.index, numbers)[0]
        y = flow.states.sequences(flow.index + 1, numbers)[1]
        return call.tokens(flow.run(pair.quantized, x, call)), call.tokens(y)

    if flow.ranks.first:  # every step needs the one before: nothing is shared but the result
        modules = kinds.linear_layers(pair.quantized)
        layers = {
            key: Tunable(modules[target.path], pair.weight(target), moved(solutions[key].q, pair.device))
            for key, target in targets.items()
        }
        doing("learning", 0.0)
        sequences = len(flow.text.calibration.ids)
        for key, learned in solver.solve(layers, forward, sequences, _stepping(doing)).items():
            events = (*solutions[key].events, *learned.events)
            exchange.hand_over(targets[key], solutions[key].q, Solved(learned.q, events))
    flow.ranks.wait()
    return {key: exchange.take(target)[1] for key, target in targets.items()}
