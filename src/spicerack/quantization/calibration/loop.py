"""The calibrated loop: block by block, with what really flows through the model.

One block is at work at a time, next to an untouched copy of it (`Pair`); the hidden states of the calibration text lie
on disk, in chunks, twice: as the float model has them, and as they are behind the blocks that are quantized already
(`Flow`). A block goes through four steps:

    transform   where the method says so: factors that make its layers easier to round move in, judged by its output
    exact       what the float copy makes of the float model's states, which all that follows is compared with
    solve       its layers get their codes in the order in which they run, those that share an input together:
                    a scale of x, where that is static;  H = mean x x^T over all tokens;
                    round to nearest, weighted by diag H;  solve;  put in place
                and, where the solver learns, all of them once more by the block's output
    errors      the block runs with its codes, and what comes out is what the next block gets

Each layer is so solved for what it will be given, errors of all layers before it included, and GPTQ's targets undo a
part of these. The price is that nothing can be solved ahead: layers wait for those in front of them, and blocks for
blocks.

What is given up for memory that does not grow with the model or the text is time: the text goes through every block
several times, twice for the layers that share an input (once exact, once quantized), and hidden states are
read from disk each time. Of a block nothing is kept but its codes.

A block is finished when its file is there, so that a run that is killed continues with the block that it was at.

Several ranks share the chunks of hidden states, and layers that share an input once its statistics are added up; each
solved layer is a file that the others read (`Exchange`). What follows from all of the text alone (order, transforms)
each finds for itself. Learning is the first rank's alone, because every step needs the one before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from spicerack.algorithms.solved import Solved
from spicerack.algorithms.transform import scalings
from spicerack.machine.memory import peak_rss_bytes, steady
from spicerack.machine.ranks import Ranks
from spicerack.models.blocks.find import find
from spicerack.numerics.qtensor import QTensor
from spicerack.quantization.calibration import solving, transforms
from spicerack.quantization.calibration.chunks import Text
from spicerack.quantization.calibration.exchange import Exchange
from spicerack.quantization.calibration.flow import Flow
from spicerack.quantization.calibration.pair import Pair
from spicerack.quantization.calibration.states import States, commit, is_done
from spicerack.quantization.calibration.targets import tensors_of
from spicerack.quantization.calibration.transforms import Changes
from spicerack.quantization.job import Job
from spicerack.quantization.recipe import Recipe
from spicerack.quantization.rotation import Rotated, original
from spicerack.quantization.watch import Doing, Finished, Watch, Working, within
from spicerack.runtime.load import load_apart

_TRANSFORMED, _SOLVED = 0.3, 0.95
"""Shares of a block's work that are done behind transforms, if there are any, and behind solving: for bars only."""


@torch.no_grad()
def run(
    job: Job,
    text: Text,
    folder: Path,
    *,
    threads: int,
    device: torch.device,
    ranks: Ranks,
    watch: Watch,
) -> Finished | None:
    """Solve all layers that lie in blocks, into `folder`, one file for each block -> the last block; None where that
    was solved before. Continues what is there.

    job        what was decided of the model; its recipe has a method
    text       the calibration text, in chunks
    folder     where solved blocks and hidden states lie; made if it is not there
    threads    of the CPU, for rounding to nearest
    device     where the blocks compute; the model itself, which makes their arguments, stays on the CPU
    ranks      processes that do this together
    watch      told of each block; behind each it is asked, on every rank, whether to raise KeyboardInterrupt there

    Raises UsageError for an architecture without blocks, ActivationError naming block, layer and token, and OutputError
    where the disk is full.
    """
    folder.mkdir(exist_ok=True)
    model, experts = load_apart(original(job.source))
    stack = find(model)
    tensors = tensors_of(stack, experts, job)
    states = States(folder, text.rows, device)
    done = next((i for i in range(len(stack.blocks)) if not is_done(folder, i)), len(stack.blocks))
    if done == 0:
        _begin(Flow(stack, 0, text, states, ranks), job)
    ranks.wait()
    last = None
    for i in steady(range(done, len(stack.blocks))):
        pair = Pair(stack.blocks[i], tensors[i], job.source, device, job.recipe.range_, threads)
        flow = Flow(stack, i, text, states, ranks)
        last = _finish(pair, flow, job.recipe, folder, _telling(watch, i, len(stack.blocks)))
        watch.finished(last)
        if bool(ranks.largest(torch.tensor(watch.stopping(), dtype=torch.bool, device="cpu"))):
            raise KeyboardInterrupt
    return last


def _begin(flow: Flow, job: Job) -> None:
    """Write the hidden states in front of the first block; those of a rotated model are the original's, rotated."""
    for number, sequences in flow.text.chunks(flow.ranks):
        hidden, _ = flow.stack.calls(flow.text.inputs(sequences))
        hidden = job.source.turn(hidden) if isinstance(job.source, Rotated) else hidden
        flow.states.write(0, number, hidden.float(), hidden.float())


def _telling(watch: Watch, number: int, count: int) -> Doing:
    """Who is told of what is done inside the block of this number."""
    return lambda doing, share: watch.working(Working(number, count, doing, share))


def _finish(pair: Pair, flow: Flow, recipe: Recipe, folder: Path, doing: Doing) -> Finished:
    """Take one block through its four steps, and commit it -> what is reported of it.

    doing: is told of each step; where factors are tried that is about a third of the work.
    """
    begin = time.time()
    assert recipe.method is not None, "decided before work starts"
    transformed = _TRANSFORMED if scalings(recipe.method.transforms) else 0.0
    first = within(doing, 0, transformed)
    changes = transforms.apply(pair, flow, recipe.method.transforms, recipe.observer, first)
    doing("what the float model makes", transformed)
    _keep_exact(pair, flow)
    starts, solutions = solving.solve(
        pair, flow, Exchange(flow.ranks, flow.states), recipe.method.solver, recipe.observer,
        within(doing, transformed, _SOLVED),
    )  # fmt: skip
    doing("measuring what was lost", _SOLVED)
    rounded, error = _errors(pair, flow, starts, {key: solved.q for key, solved in solutions.items()})
    if flow.ranks.first:
        losses = {target.key: pair.error(target, solutions[target.key].q) for target in pair.targets}
        noted = {key: Solved(solved.q, (*changes.of(key), *solved.events)) for key, solved in solutions.items()}
        commit(folder, flow.index, noted, losses, changes.tensors, error)
        flow.states.drop(flow.index)
    flow.ranks.wait()
    weights = sum(solved.q.codes.numel() for solved in solutions.values())
    return Finished(
        block=flow.name,
        number=flow.index,
        count=len(flow.stack.blocks),
        layers=len(solutions),
        bits=sum(solved.q.stored_bits for solved in solutions.values()) / weights if weights else 0.0,
        rounded=rounded,
        error=error,
        seconds=time.time() - begin,
        peak_rss_bytes=peak_rss_bytes(),
        events=tuple(_events(pair, solutions, changes)),
    )


def _events(pair: Pair, solutions: Mapping[str, Solved], changes: Changes) -> Iterator[str]:
    """What happened in a block: to all of it by transforms, then to each layer, by path, while it was solved."""
    yield from changes.events
    for target in pair.targets:
        yield from (f"{target.path}: {event}" for event in solutions[target.key].events)


def _keep_exact(pair: Pair, flow: Flow) -> None:
    """Keep what the float block makes of the float model's states, for all who compare with it, and the next block."""
    for call in flow.calls():
        exact = flow.run(pair.exact, flow.hidden(call)[1], call)
        flow.keep(call, exact, exact)  # the first until `_errors` knows better
    flow.ranks.wait()


def _errors(
    pair: Pair, flow: Flow, starts: Mapping[str, QTensor], solutions: Mapping[str, QTensor]
) -> tuple[float, float]:
    """How far the block's output is off, were its targets rounded to nearest (`starts`), and with their solutions.

    Both are relative, ||out - exact|| / ||exact||. The first is estimated: from the first chunk of each rank, by how
    much farther off it is there than with the solutions. These stay, and the hidden states that they make are kept.
    """
    nearest, _ = _run_with(pair, flow, starts, first_only=True)
    beginning, error = _run_with(pair, flow, solutions)
    return error * (nearest / beginning) if beginning else nearest, error


def _run_with(
    pair: Pair, flow: Flow, weights: Mapping[str, QTensor], *, first_only: bool = False
) -> tuple[float, float]:
    """Relative error of what the block makes with these weights, by key: in each rank's first chunk, and in all.

    The weights stay, and what the block makes is for the next one. first_only: no other chunk is looked at, and what
    the block makes is not kept.
    """
    for target in pair.targets:
        pair.put(target, weights[target.key])
    sums = torch.zeros((2, 2), dtype=torch.float64, device=flow.device)
    for place, call in enumerate(flow.calls()):
        quantized = flow.run(pair.quantized, flow.hidden(call)[0], call)
        exact = flow.results(call)[1]
        kept = call.tokens(exact)
        wrong = (call.tokens(quantized) - kept).square().sum(dtype=torch.float64)
        sums[min(place, 1)] += torch.stack((wrong, kept.square().sum(dtype=torch.float64)))
        if first_only:
            break
        flow.keep(call, quantized, exact)
    sums = flow.ranks.total(sums).cumsum(0)
    first, every = (float((wrong / total) ** 0.5) if total else 0.0 for wrong, total in sums.tolist())
    return first, every
