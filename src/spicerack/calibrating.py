"""The calibrated loop: block by block, with what really flows through the model.

One block is in float32 memory at a time, next to an untouched copy of it; the hidden states of the calibration text lie
on disk, in chunks, twice: as the float model has them, and as they are behind the blocks that are quantized already.
First the block is transformed, where the method says so; then its layers are solved in the order in which they run,
those that share an input together:

    each group of layers:  H = mean x x^T over all tokens;  round to nearest, weighted by diag H;  refine;  put in place
    then the block runs once more, and what comes out is what the next block gets

A block is finished when its file is there, so that a run that is killed continues with the block that it was at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spicerack import blocks
from spicerack.algorithms import gptq, hqq, rtn, signround
from spicerack.calibrating_block import Layer, Work, chunks, inputs, inside, sequences, tokens
from spicerack.calibrating_files import States, commit, is_done
from spicerack.calibrating_transforms import Changes, transform
from spicerack.calibration import Calibration
from spicerack.job import Job
from spicerack.loading import load
from spicerack.solved import Solved
from spicerack.stats import Accumulator


@dataclass(frozen=True, slots=True)
class Finished:
    """One block: its path, number and how many there are; bits a weight with scales; seconds.

    error: ||out - out_float|| / ||out_float|| of its hidden states, against the float model's, earlier blocks included.
    events: what happened to which layer.
    """

    block: str
    number: int
    count: int
    layers: int
    bits: float
    error: float
    seconds: float
    events: tuple[str, ...]


@torch.no_grad()
def run(
    job: Job,
    calibration: Calibration,
    folder: Path,
    *,
    threads: int,
    finished: Callable[[Finished], None] = lambda _: None,
) -> None:
    """Solve all layers that lie in blocks, into `folder`: one file for each block. Continues what is there.

    Raises UsageError for an architecture without blocks, ActivationError naming block, layer and token.
    """
    folder.mkdir(exist_ok=True)
    model = load(job.source.folder)
    stack = blocks.find(model)
    contents = inside(stack, job)
    states = States(folder, sequences(calibration))
    first = next((i for i in range(len(stack.blocks)) if not is_done(folder, i)), len(stack.blocks))
    if first == 0:
        for number, some in enumerate(chunks(calibration)):
            hidden, _ = stack.calls(inputs(calibration, some))
            states.write(0, number, hidden.float(), hidden.float())
    for i in range(first, len(stack.blocks)):
        finished(_finish(Work(stack, i, contents[i], calibration, states, job, threads), folder))


def _finish(work: Work, folder: Path) -> Finished:
    """One block, committed."""
    begin = time.time()
    changes = transform(work)
    solved = _solve(work)
    error = _advance(work)
    losses = {x.tensor: rtn.relative_error(work.weight(x), solved[x.tensor].q, threads=work.threads)
              for x in work.layers}  # fmt: skip
    commit(folder, work.index, solved, losses, changes.tensors, error)
    work.states.drop(work.index)
    weights = sum(s.q.codes.numel() for s in solved.values())
    return Finished(
        block=work.name,
        number=work.index,
        count=len(work.stack.blocks),
        layers=len(solved),
        bits=sum(s.q.stored_bits for s in solved.values()) / weights if weights else 0.0,
        error=error,
        seconds=time.time() - begin,
        events=tuple(_events(work, solved, changes)),
    )


def _events(work: Work, solved: Mapping[str, Solved], changes: Changes) -> Iterator[str]:
    yield from changes.events
    for layer in work.layers:
        yield from (f"{layer.path}: {event}" for event in solved[layer.tensor].events)


def _solve(work: Work) -> dict[str, Solved]:
    """Tensor -> its solution; all layers of the block hold what was decoded from it."""
    by_path = {layer.path: layer for layer in work.layers}
    solved: dict[str, Solved] = {}
    for group in _groups(work):
        gram, shift = _moments(work, group[0])
        for path in group:
            solved[by_path[path].tensor] = _layer(work, by_path[path], gram, shift)
    for layer in work.layers:
        if layer.tensor not in solved:
            start = work.start(layer, None)
            solved[layer.tensor] = Solved(start, ("not reached by the calibration text: rounded to nearest",))
            work.put(layer, start)
    if _solver(work) == "signround":
        solved |= _tuned(work, {t: s for t, s in solved.items() if signround.fits(s.q.scheme)})
    return solved


def _solver(work: Work) -> str:
    method = work.job.recipe.method
    assert method is not None, "decided before work starts"
    return method.solver


def _tuned(work: Work, solved: Mapping[str, Solved]) -> dict[str, Solved]:
    """Rounding learned by the block's output, from `solved` on; all layers hold it."""
    for number, (_, arguments) in enumerate(work.calls()):
        exact = work.run(work.exact, work.states.read(work.index, number)[1], arguments)
        work.states.write(work.index + 1, number, exact, exact)  # until `_advance` knows better

    def forward(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chunk, arguments = work.call(numbers)
        x = work.states.sequences(work.index, numbers)[0]
        wanted = work.states.sequences(work.index + 1, numbers)[1]
        return tokens(work.run(work.block, x, arguments), chunk), tokens(wanted, chunk)

    by_tensor = {layer.tensor: layer for layer in work.layers}
    modules = blocks.layers(work.block)
    layers = {
        tensor: signround.Layer(modules[by_tensor[tensor].path], work.weight(by_tensor[tensor]), one.q)
        for tensor, one in solved.items()
    }
    found = signround.solve(layers, forward, len(work.calibration.ids))
    for tensor, one in found.items():
        work.put(by_tensor[tensor], one.q)
    return {tensor: Solved(one.q, (*solved[tensor].events, *one.events)) for tensor, one in found.items()}


def _advance(work: Work) -> float:
    """Hidden states for the next block -> their relative error."""
    wrong = total = 0.0
    for number, (chunk, arguments) in enumerate(work.calls()):
        quantized, exact = work.states.read(work.index, number)
        quantized = work.run(work.block, quantized, arguments)
        exact = work.run(work.exact, exact, arguments)
        seen = tokens(exact, chunk)
        wrong += float((tokens(quantized, chunk) - seen).square().sum(dtype=torch.float64))
        total += float(seen.square().sum(dtype=torch.float64))
        if work.index + 1 < len(work.stack.blocks):
            work.states.write(work.index + 1, number, quantized, exact)
    return (wrong / total) ** 0.5 if total else 0.0


def _groups(work: Work) -> Iterator[tuple[str, ...]]:
    """Paths of layers in the order of their calls, those with one input together; each once."""
    missing = {layer.path for layer in work.layers}
    for number, (_, arguments) in enumerate(work.calls()):
        if not missing:
            return
        seen: list[tuple[str, torch.Tensor]] = []
        with blocks.watched(work.exact, sorted(missing), seen.append):
            work.run(work.exact, work.states.read(work.index, number)[1], arguments)
        missing -= {path for path, _ in seen}
        yield from blocks.shared_inputs(seen)


def _moments(work: Work, path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """mean x x^T and mean (x' - x) x^T, float64 [K, K]: x what the layer gets now, x' in the float model.

    None for the second where the float model calls the layer with other rows, so that nothing can be compared.
    """
    seen = Accumulator(["gram"], work.columns(path))
    shift = torch.zeros((seen.columns, seen.columns), dtype=torch.float64)
    comparable = True
    for number, (chunk, arguments) in enumerate(work.calls()):
        quantized, exact = work.states.read(work.index, number)
        x = work.input(work.block, path, quantized, arguments, chunk)
        before = work.input(work.exact, path, exact, arguments, chunk)
        comparable &= x.shape == before.shape
        work.add(seen, path, number, x)
        if comparable:
            shift += (before - x).t() @ x
    found = seen.result()
    assert found.gram is not None
    return found.gram.double(), shift / found.tokens if comparable and found.tokens else None


def _layer(work: Work, layer: Layer, gram: torch.Tensor, shift: torch.Tensor | None) -> Solved:
    start = work.start(layer, gram.diagonal().float())
    solver, w = _solver(work), work.weight(layer)
    if solver == "hqq":
        solved = hqq.solve(w, start)
    elif solver == "gptq" and gptq.fits(layer.planned.scheme):
        solved = gptq.solve(w, start, gram, shift)
    elif solver == "gptq" or (solver == "signround" and not signround.fits(layer.planned.scheme)):
        solved = Solved(start, (f"{solver} cannot do {layer.planned.scheme}: rounded to nearest",))
    else:
        solved = Solved(start)
    work.put(layer, solved.q)
    return solved
