"""The calibrated loop: block by block, with what really flows through the model.

One block is at work at a time, next to an untouched copy of it; the hidden states of the calibration text lie on disk,
in chunks, twice: as the float model has them, and as they are behind the blocks that are quantized already.
First the block is transformed, where the method says so; then its layers are solved in the order in which they run,
those that share an input together:

    each group of layers:  a scale of x, where that is static;  H = mean x x^T over all tokens;
                           round to nearest, weighted by diag H;  refine;  put in place
    then the block runs once more, and what comes out is what the next block gets

A block is finished when its file is there, so that a run that is killed continues with the block that it was at.

Several ranks share the chunks of hidden states, and the layers of a group once its statistics are added up; each solved
layer is a file that the others read. What follows from all of the text alone (order, transforms) each finds for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from spicerack.algorithms import descent
from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solvers import blockap, gptq, hqq, signround
from spicerack.machine.devices import CPU
from spicerack.machine.memory import peak_rss_bytes
from spicerack.machine.ranks import ALONE, Ranks
from spicerack.models import blocks
from spicerack.numerics import rounding
from spicerack.numerics.qtensor import QTensor, moved
from spicerack.quantization.calibration.block import Work
from spicerack.quantization.calibration.chunks import Text, tokens
from spicerack.quantization.calibration.inputs import Moments, moments, rounds, stages
from spicerack.quantization.calibration.layers import Layer, inside
from spicerack.quantization.calibration.states import States, commit, is_done
from spicerack.quantization.calibration.static import observe
from spicerack.quantization.calibration.transforms import Changes, transform
from spicerack.quantization.job import Job
from spicerack.quantization.rotation import Rotated, original
from spicerack.quantization.watch import Finished
from spicerack.runtime.load import load_apart

_LEARNING = {"signround": signround.solve, "blockap": blockap.solve}
"""Solvers that need all layers of a block at once."""


@torch.no_grad()
def run(
    job: Job,
    text: Text,
    folder: Path,
    *,
    threads: int,
    device: torch.device = CPU,
    ranks: Ranks = ALONE,
    finished: Callable[[Finished], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Solve all layers that lie in blocks, into `folder`: one file for each block. Continues what is there.

    device: where the blocks compute; the model itself, which makes their arguments, stays on the CPU.
    finished: called with each block. stopping: asked behind each, whether to raise KeyboardInterrupt there. Raises
    UsageError for an architecture without blocks, ActivationError naming block, layer and token.
    """
    folder.mkdir(exist_ok=True)
    model, experts = load_apart(original(job.source))
    stack = blocks.find(model)
    contents = inside(stack, experts, job)
    states = States(folder, text.rows, device)
    first = next((i for i in range(len(stack.blocks)) if not is_done(folder, i)), len(stack.blocks))
    if first == 0:
        for number, some in text.chunks(ranks):
            hidden, _ = stack.calls(text.inputs(some))
            hidden = job.source.turn(hidden) if isinstance(job.source, Rotated) else hidden
            states.write(0, number, hidden.float(), hidden.float())
    ranks.wait()
    for i in range(first, len(stack.blocks)):
        finished(_finish(Work(stack, i, contents[i], text, states, job, ranks, threads, device), folder))
        if bool(ranks.largest(torch.tensor(stopping()))):
            raise KeyboardInterrupt


def _finish(work: Work, folder: Path) -> Finished:
    """One block, committed."""
    begin = time.time()
    changes = transform(work)
    _exact(work)
    starts, solved = _solve(work)
    plain, _ = _errors(work, starts, first_only=True)
    beginning, error = _errors(work, {tensor: one.q for tensor, one in solved.items()})
    rounded = error * (plain / beginning) if beginning else plain
    if work.ranks.first:
        losses = {x.key: rounding.relative_error(moved(work.weight(x), CPU), solved[x.key].q, threads=work.threads)
                  for x in work.layers}  # fmt: skip
        told = {tensor: Solved(one.q, (*changes.of(tensor), *one.events)) for tensor, one in solved.items()}
        commit(folder, work.index, told, losses, changes.tensors, error)
        work.states.drop(work.index)
    work.ranks.wait()
    weights = sum(s.q.codes.numel() for s in solved.values())
    return Finished(
        block=work.name,
        number=work.index,
        count=len(work.stack.blocks),
        layers=len(solved),
        bits=sum(s.q.stored_bits for s in solved.values()) / weights if weights else 0.0,
        rounded=rounded,
        error=error,
        seconds=time.time() - begin,
        peak_rss_bytes=peak_rss_bytes(),
        events=tuple(_events(work, solved, changes)),
    )


def _events(work: Work, solved: Mapping[str, Solved], changes: Changes) -> Iterator[str]:
    yield from changes.events
    for layer in work.layers:
        yield from (f"{layer.path}: {event}" for event in solved[layer.key].events)


def _solve(work: Work) -> tuple[dict[str, QTensor], dict[str, Solved]]:
    """Tensor -> how it is rounded to nearest, and its solution; all layers of the block hold what that decodes to."""
    by_path = {layer.path: layer for layer in work.layers}
    starts: dict[str, QTensor] = {}
    solved: dict[str, Solved] = {}
    for groups in (part for stage in stages(work) for part in rounds(work, stage)):
        for group in groups:
            observe(work, group)
        seen = moments(work, groups)
        given = {path: seen[group] for group in groups for path in group}
        costs = {path: float(work.weight(by_path[path]).numel()) for path in given}
        mine = [by_path[path] for path, rank in work.ranks.shares(costs).items() if rank == work.ranks.rank]
        pulls = {layer.path: given[layer.path].pull(work.weight(layer)) for layer in mine}
        for one in seen.values():
            one.shift = None  # as large as what solving needs, which comes now
        for layer in mine:
            work.hand_over(layer, *_layer(work, layer, given[layer.path], pulls.pop(layer.path)))
        work.ranks.wait()
        for layer in map(by_path.__getitem__, given):
            starts[layer.key], solved[layer.key] = work.take(layer)
            work.put(layer, solved[layer.key].q)
    for layer in work.layers:
        if layer.key not in solved:
            observe(work, (layer.path,))
            starts[layer.key] = work.start(layer, None)
            solved[layer.key] = Solved(starts[layer.key], ("not reached by the calibration text: rounded to nearest",))
            work.put(layer, starts[layer.key])
    if _solver(work) in _LEARNING:
        solved |= _tuned(work, {t: s for t, s in solved.items() if descent.fits(s.q.scheme)})
    return starts, solved


def _solver(work: Work) -> str:
    method = work.job.recipe.method
    assert method is not None, "decided before work starts"
    return method.solver


def _tuned(work: Work, solved: Mapping[str, Solved]) -> dict[str, Solved]:
    """Codes learned by the block's output, from `solved` on; all layers hold it."""

    def forward(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chunk, arguments = work.call(numbers)
        x = work.states.sequences(work.index, numbers)[0]
        wanted = work.states.sequences(work.index + 1, numbers)[1]
        return tokens(work.run(work.block, x, arguments), chunk), tokens(wanted, chunk)

    by_tensor = {layer.key: layer for layer in work.layers}
    modules = blocks.layers(work.block)
    layers = {
        tensor: descent.Layer(
            modules[by_tensor[tensor].path], work.weight(by_tensor[tensor]), moved(one.q, work.device)
        )
        for tensor, one in solved.items()
    }
    if work.ranks.first:  # every step needs the one before: nothing is shared but the result
        solve = _LEARNING[_solver(work)]
        for tensor, one in solve(layers, forward, len(work.text.calibration.ids)).items():
            events = (*solved[tensor].events, *one.events)
            work.hand_over(by_tensor[tensor], solved[tensor].q, Solved(one.q, events))
    work.ranks.wait()
    return {tensor: work.take(by_tensor[tensor])[1] for tensor in solved}


def _exact(work: Work) -> None:
    """What the float block makes of the float model's states, for all who compare with it, and for the next block."""
    for number, _, arguments in work.calls():
        exact = work.run(work.exact, work.states.read(work.index, number)[1], arguments)
        work.states.write(work.index + 1, number, exact, exact)  # the first until `_errors` knows better
    work.ranks.wait()


def _errors(work: Work, weights: Mapping[str, QTensor], *, first_only: bool = False) -> tuple[float, float]:
    """Of what the block makes with these weights, by tensor, relative: in each rank's first chunk, and in all.

    They stay, and what the block makes is for the next one. first_only: no other chunk is looked at.
    """
    for layer in work.layers:
        work.put(layer, weights[layer.key])
    sums = torch.zeros((2, 2), dtype=torch.float64, device=work.device)
    for place, (number, chunk, arguments) in enumerate(work.calls()):
        quantized = work.run(work.block, work.states.read(work.index, number)[0], arguments)
        exact = work.states.read(work.index + 1, number)[1]
        seen = tokens(exact, chunk)
        wrong = (tokens(quantized, chunk) - seen).square().sum(dtype=torch.float64)
        sums[min(place, 1)] += torch.stack((wrong, seen.square().sum(dtype=torch.float64)))
        if first_only:
            break
        work.states.write(work.index + 1, number, quantized, exact)
    sums = work.ranks.total(sums).cumsum(0)
    first, every = (float((wrong / total) ** 0.5) if total else 0.0 for wrong, total in sums.tolist())
    return first, every


def _layer(work: Work, layer: Layer, seen: Moments, pull: torch.Tensor | None) -> tuple[QTensor, Solved]:
    """Rounded to nearest, and solved."""
    start = work.start(layer, seen.importance)
    solver, w = _solver(work), work.weight(layer)
    if solver == "hqq":
        solved = hqq.solve(w, moved(start, work.device))
    elif solver == "rtn" or seen.gram is None:
        solved = Solved(start)
    elif gptq.fits(layer.planned.scheme):  # those that learn go on from there
        solved = gptq.solve(w, moved(start, work.device), seen.gram, pull)
    else:
        solved = Solved(start, (f"{solver} cannot do {layer.planned.scheme}: rounded to nearest",))
    return start, Solved(solved.q, (*seen.events, *solved.events))
