"""The calibrated loop: block by block, with what really flows through the model.

One block is in float32 memory at a time, next to an untouched copy of it; the hidden states of the calibration text lie
on disk, in chunks, twice: as the float model has them, and as they are behind the blocks that are quantized already.
Layers of a block are solved in the order in which they run, those that share an input together:

    each group of layers:  H = mean x x^T over all tokens;  round to nearest, weighted by diag H;  refine;  put in place
    then the block runs once more, and what comes out is what the next block gets

A block is finished when its file is there, so that a run that is killed continues with the block that it was at.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from spicerack import blocks, codec
from spicerack.algorithms import gptq, rtn, signround
from spicerack.architecture import destinations
from spicerack.blocks import Arguments, Stack
from spicerack.calibrating_files import States, commit, is_done
from spicerack.calibration import Calibration
from spicerack.errors import ActivationError
from spicerack.format import Planned
from spicerack.job import Action, Job
from spicerack.loading import load
from spicerack.qtensor import QTensor
from spicerack.solved import Solved
from spicerack.stats import Accumulator

_TOKENS = 8192
"""Of a chunk: what runs through a block at once."""


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


@dataclass(frozen=True, slots=True)
class _Layer:
    """A quantized layer of a block: its path in there, and the source tensor's name and plan."""

    path: str
    tensor: str
    planned: Planned


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
    inside = _inside(stack, job)
    states = States(folder, _sequences(calibration))
    first = next((i for i in range(len(stack.blocks)) if not is_done(folder, i)), len(stack.blocks))
    if first == 0:
        for number, some in enumerate(_chunks(calibration)):
            hidden, _ = stack.calls(_inputs(calibration, some))
            states.write(0, number, hidden.float(), hidden.float())
    for i in range(first, len(stack.blocks)):
        finished(_solve(_Block(stack, i, inside[i], calibration, states, job, threads), folder))


def _solve(work: _Block, folder: Path) -> Finished:
    """One block, committed."""
    begin = time.time()
    solved = work.solve()
    error = work.advance()
    commit(folder, work.index, solved, error)
    work.states.drop(work.index)
    weights = sum(s.q.codes.numel() for s in solved.values())
    return Finished(
        block=work.stack.name(work.index),
        number=work.index,
        count=len(work.stack.blocks),
        layers=len(solved),
        bits=sum(s.q.stored_bits for s in solved.values()) / weights if weights else 0.0,
        error=error,
        seconds=time.time() - begin,
        events=tuple(f"{x.path}: {event}" for x in work.layers for event in solved[x.tensor].events),
    )


class _Block:
    """Block `index` in float32: `block`, whose layers are replaced by their decoded codes, and `exact`, which stays."""

    def __init__(
        self,
        stack: Stack,
        index: int,
        layers: list[_Layer],
        calibration: Calibration,
        states: States,
        job: Job,
        threads: int,
    ) -> None:
        self.stack, self.index, self.layers, self.calibration, self.states = stack, index, layers, calibration, states
        self.job, self.threads = job, threads
        self.original = stack.blocks[index]
        self.exact = copy.deepcopy(self.original).float().requires_grad_(False)
        self.block = copy.deepcopy(self.exact)

    def solve(self) -> dict[str, Solved]:
        """Tensor -> its solution; all layers of `block` hold what was decoded from it."""
        by_path = {layer.path: layer for layer in self.layers}
        solved: dict[str, Solved] = {}
        for group in self._groups():
            gram, shift = self._moments(group[0])
            for path in group:
                solved[by_path[path].tensor] = self._layer(by_path[path], gram, shift)
        for layer in self.layers:
            if layer.tensor not in solved:
                start = self._start(layer, None)
                solved[layer.tensor] = Solved(start, ("not reached by the calibration text: rounded to nearest",))
                self._put(layer, start)
        if self.job.recipe.method == "signround":
            solved |= self._tuned({t: s for t, s in solved.items() if signround.fits(s.q.scheme)})
        return solved

    def _tuned(self, solved: Mapping[str, Solved]) -> dict[str, Solved]:
        """Rounding learned by the block's output, from `solved` on; all layers hold it."""
        for number, (_, arguments) in enumerate(self._calls()):
            exact = self.stack.run(self.exact, self.states.read(self.index, number)[1], arguments)
            self.states.write(self.index + 1, number, exact, exact)  # until `advance` knows better

        def forward(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            chunk, arguments = self._call(list(numbers))
            x = self.states.sequences(self.index, numbers)[0]
            wanted = self.states.sequences(self.index + 1, numbers)[1]
            return _tokens(self.stack.run(self.block, x, arguments), chunk), _tokens(wanted, chunk)

        by_tensor = {layer.tensor: layer for layer in self.layers}
        layers = {
            tensor: signround.Layer(
                blocks.layers(self.block)[by_tensor[tensor].path], self._weight(by_tensor[tensor]), one.q
            )
            for tensor, one in solved.items()
        }
        found = signround.solve(layers, forward, len(self.calibration.ids))
        for tensor, one in found.items():
            self._put(by_tensor[tensor], one.q)
        return {tensor: Solved(one.q, (*solved[tensor].events, *one.events)) for tensor, one in found.items()}

    def advance(self) -> float:
        """Hidden states for the next block -> their relative error."""
        wrong = total = 0.0
        for number, (chunk, arguments) in enumerate(self._calls()):
            quantized, exact = self.states.read(self.index, number)
            quantized = self.stack.run(self.block, quantized, arguments)
            exact = self.stack.run(self.exact, exact, arguments)
            seen = _tokens(exact, chunk)
            wrong += float((_tokens(quantized, chunk) - seen).square().sum(dtype=torch.float64))
            total += float(seen.square().sum(dtype=torch.float64))
            if self.index + 1 < len(self.stack.blocks):
                self.states.write(self.index + 1, number, quantized, exact)
        return (wrong / total) ** 0.5 if total else 0.0

    def _calls(self) -> Iterator[tuple[dict[str, torch.Tensor], Arguments]]:
        """Each chunk with the block's arguments, in float32."""
        return map(self._call, _chunks(self.calibration))

    def _call(self, some: slice | list[int]) -> tuple[dict[str, torch.Tensor], Arguments]:
        chunk = _inputs(self.calibration, some)
        arguments = self.stack.calls(chunk)[1][self.index]
        return chunk, Arguments(_to_float(arguments.positional), _to_float(arguments.named))

    def _groups(self) -> Iterator[tuple[str, ...]]:
        """Paths of layers in the order of their calls, those with one input together; each once."""
        missing = {layer.path for layer in self.layers}
        for number, (_, arguments) in enumerate(self._calls()):
            if not missing:
                return
            seen: list[tuple[str, torch.Tensor]] = []
            with blocks.watched(self.exact, sorted(missing), seen.append):
                self.stack.run(self.exact, self.states.read(self.index, number)[1], arguments)
            missing -= {path for path, _ in seen}
            yield from blocks.shared_inputs(seen)

    def _moments(self, path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """mean x x^T and mean (x' - x) x^T, float64 [K, K]: x what the layer gets now, x' in the float model.

        None for the second where the float model calls the layer with other rows, so that nothing can be compared.
        """
        seen = Accumulator(["gram"], self._columns(path))
        shift = torch.zeros((seen.columns, seen.columns), dtype=torch.float64)
        comparable = True
        for number, (chunk, arguments) in enumerate(self._calls()):
            quantized, exact = self.states.read(self.index, number)
            x = self._input(self.block, path, quantized, arguments, chunk)
            before = self._input(self.exact, path, exact, arguments, chunk)
            comparable &= x.shape == before.shape
            try:
                seen.add(x)
            except ActivationError as error:
                place = f"{self.stack.name(self.index)}.{path}, chunk {number}"
                raise ActivationError(f"{place}: {error.message}", error.hint) from error
            if comparable:
                shift += (before - x).t() @ x
        found = seen.result()
        assert found.gram is not None
        return found.gram.double(), shift / found.tokens if comparable and found.tokens else None

    def _input(
        self, block: nn.Module, path: str, hidden: torch.Tensor, arguments: Arguments, chunk: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """[tokens, K], none where the layer is not called."""
        x = blocks.input_of(path, self.stack, block, hidden, arguments)
        return hidden.new_empty((0, self._columns(path))) if x is None else _tokens(x, chunk)

    def _columns(self, path: str) -> int:
        """Of the layer's input."""
        shape = self.block.get_parameter(f"{path}.weight").shape
        return shape[0] if isinstance(self.block.get_submodule(path), Conv1D) else shape[1]

    def _layer(self, layer: _Layer, gram: torch.Tensor, shift: torch.Tensor | None) -> Solved:
        start = self._start(layer, gram.diagonal().float())
        solved = Solved(start)
        if self.job.recipe.method == "gptq" and gptq.fits(layer.planned.scheme):
            solved = gptq.solve(self._weight(layer), start, gram, shift)
        self._put(layer, solved.q)
        return solved

    def _start(self, layer: _Layer, importance: torch.Tensor | None) -> QTensor:
        importance = importance if importance is not None and bool(importance.any()) else None
        return rtn.solve(
            self._weight(layer), layer.planned.scheme, range_=self.job.recipe.range_, name=layer.tensor,
            importance=importance, threads=self.threads,
        )  # fmt: skip

    def _weight(self, layer: _Layer) -> torch.Tensor:
        """[N, K], in the type that it is stored in, which decides the type of scales."""
        weight = self.original.get_parameter(f"{layer.path}.weight").detach()
        return weight.t().contiguous() if layer.planned.transposed else weight

    def _put(self, layer: _Layer, q: QTensor) -> None:
        decoded = codec.decode(q)
        weight = self.block.get_parameter(f"{layer.path}.weight")
        weight.copy_(decoded.t() if layer.planned.transposed else decoded)


def _inside(stack: Stack, job: Job) -> list[list[_Layer]]:
    """For each block the planned layers in it."""
    actions: dict[str, Action] = {a.info.name: a for a in job.actions if a.planned is not None}
    places = {
        place.parameter: tensor
        for tensor, place in destinations(stack.model, actions).items()
        if not place.operations
    }  # fmt: skip
    found: list[list[_Layer]] = []
    for i, block in enumerate(stack.blocks):
        inside = []
        for path in blocks.layers(block):
            tensor = places.get(f"{stack.name(i)}.{path}.weight")
            planned = None if tensor is None else actions[tensor].planned
            if tensor is not None and planned is not None:
                inside.append(_Layer(path, tensor, planned))
        found.append(inside)
    return found


def _sequences(calibration: Calibration) -> int:
    """Of a chunk."""
    return max(_TOKENS // calibration.ids.shape[1], 1)


def _chunks(calibration: Calibration) -> Iterator[slice]:
    """A few sequences at a time."""
    rows = _sequences(calibration)
    return (slice(first, first + rows) for first in range(0, len(calibration.ids), rows))


def _inputs(calibration: Calibration, some: slice | list[int]) -> dict[str, torch.Tensor]:
    """What the model is called with."""
    chunk = {"input_ids": calibration.ids[some]}
    if calibration.mask is not None:
        chunk["attention_mask"] = calibration.mask[some].long()
    return chunk


def _tokens(x: torch.Tensor, chunk: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[tokens, K] without padding; layers that see other rows than tokens, such as experts, have none to drop."""
    rows = x.reshape(-1, x.shape[-1])
    mask = chunk.get("attention_mask")
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1).bool()]


def _to_float(arguments: Any) -> Any:
    return tree_map(lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, arguments)
