"""The calibrated loop: block by block, with what really flows through the model.

One block is in float32 memory at a time, next to an untouched copy of it; the hidden states of the calibration text lie
on disk, in chunks, twice: as the float model has them, and as they are behind the blocks that are quantized already.
Layers of a block are solved in the order in which they run, those that share an input together:

    each group of layers:  H = mean x x^T over all tokens;  round to nearest, weighted by diag H;  refine;  put in place
    then the block runs once more, and what comes out is what the next block gets

A block is finished when its file is there, so that a run that is killed continues with the block that it was at.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from spicerack import blocks, codec, packed
from spicerack.algorithms import gptq, rtn, signround
from spicerack.architecture import destinations
from spicerack.blocks import Arguments, Stack
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


class Solutions:
    """The solved layers in `folder`, by tensor; those of no block are not there."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._notes: dict[str, list[str]] = {}
        for file in sorted(folder.glob("block-*.safetensors")):
            for tensor, events in _metadata(file)["layers"].items():
                self._files[tensor], self._notes[tensor] = file, events

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._files

    def __bool__(self) -> bool:
        return bool(self._files)

    def events(self, tensor: str) -> list[str]:
        """What happened while it was solved."""
        return self._notes[tensor]

    def read(self, tensor: str, planned: Planned) -> QTensor:
        """As it was solved, output rows first."""
        with safe_open(self._files[tensor], framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(tensor + "/")]  # noqa: SIM118  # not a mapping
            parts = {name.removeprefix(tensor + "/"): file.get_tensor(name) for name in names}
        return packed.unpack(planned.scheme, planned.shape, parts)


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
    states = _States(folder)
    first = next((i for i in range(len(stack.blocks)) if not _file(folder, i).exists()), len(stack.blocks))
    if first == 0:
        for number, some in enumerate(_chunks(calibration)):
            hidden, _ = stack.calls(_inputs(calibration, some))
            states.write(0, number, hidden.float(), hidden.float())
    for i in range(first, len(stack.blocks)):
        begin = time.time()
        work = _Block(stack, i, inside[i], calibration, states, job, threads)
        solved = work.solve()
        error = work.advance()
        _commit(_file(folder, i), solved, inside[i], error)
        states.drop(i)
        weights = sum(s.q.codes.numel() for s in solved.values())
        events = [f"{layer.path}: {event}" for layer in inside[i] for event in solved[layer.tensor].events]
        bits = sum(s.q.stored_bits for s in solved.values()) / weights if weights else 0.0
        finished(
            Finished(stack.name(i), i, len(stack.blocks), len(solved), bits, error, time.time() - begin, tuple(events))
        )


def fingerprint(calibration: Calibration) -> str:
    """sha256 of the tokens and their mask: what must be the same for a run to continue."""
    digest = hashlib.sha256(calibration.ids.numpy().tobytes())
    if calibration.mask is not None:
        digest.update(calibration.mask.numpy().tobytes())
    return digest.hexdigest()


def clear(folder: Path) -> None:
    """Remove what `run` left."""
    shutil.rmtree(folder, ignore_errors=True)


class _Block:
    """Block `index` in float32: `block`, whose layers are replaced by their decoded codes, and `exact`, which stays."""

    def __init__(
        self,
        stack: Stack,
        index: int,
        layers: list[_Layer],
        calibration: Calibration,
        states: _States,
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
            x = self.states.sequences(self.index, numbers, self.calibration)[0]
            wanted = self.states.sequences(self.index + 1, numbers, self.calibration)[1]
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

    def _groups(self) -> list[tuple[str, ...]]:
        """Paths of layers in the order of their calls, those with one input together."""
        seen: list[tuple[str, torch.Tensor]] = []
        paths = [layer.path for layer in self.layers]
        with _watch(self.exact, paths, lambda path, x: seen.append((path, x))):
            _, arguments = next(self._calls())
            self.stack.run(self.exact, self.states.read(self.index, 0)[1], arguments)
        return list(blocks.shared_inputs(seen))

    def _moments(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """mean x x^T and mean (x' - x) x^T, float64 [K, K]: x what the layer gets now, x' in the float model."""
        seen = Accumulator(["gram"], self.block.get_parameter(f"{path}.weight").shape[self._columns(path)])
        shift = torch.zeros((seen.columns, seen.columns), dtype=torch.float64)
        for number, (chunk, arguments) in enumerate(self._calls()):
            quantized, exact = self.states.read(self.index, number)
            x = _tokens(self._input(self.block, path, quantized, arguments), chunk)
            try:
                seen.add(x)
            except ActivationError as error:
                place = f"{self.stack.name(self.index)}.{path}, chunk {number}"
                raise ActivationError(f"{place}: {error.message}", error.hint) from error
            shift += (_tokens(self._input(self.exact, path, exact, arguments), chunk) - x).t() @ x
        found = seen.result()
        assert found.gram is not None
        return found.gram.double(), shift / found.tokens

    def _columns(self, path: str) -> int:
        """The axis of the layer's weight that its input has."""
        return 0 if isinstance(self.block.get_submodule(path), Conv1D) else 1

    def _input(self, block: nn.Module, path: str, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """What the layer is called with; nothing behind it is computed."""
        found: list[torch.Tensor] = []

        def stop(_: str, x: torch.Tensor) -> None:
            found.append(x)
            raise _Reached

        with _watch(block, [path], stop), contextlib.suppress(_Reached):
            self.stack.run(block, hidden, arguments)
        return found[0]

    def _layer(self, layer: _Layer, gram: torch.Tensor, shift: torch.Tensor) -> Solved:
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


class _Reached(Exception):  # noqa: N818
    """Not an error: a forward has come to the layer that is looked at."""


class _watch:  # noqa: N801  # a context manager
    """Calls `look` with path and input of each of these layers when it is called."""

    def __init__(self, block: nn.Module, paths: list[str], look: Callable[[str, torch.Tensor], None]) -> None:
        self.hooks = [
            block.get_submodule(path).register_forward_pre_hook(lambda _, inputs, path=path: look(path, inputs[0]))
            for path in paths
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


class _States:
    """Hidden states on disk, float32 [B, L, H], a file for each block and chunk: behind quantized blocks, and exact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, block: int, chunk: int) -> Path:
        return self.folder / f"states-{block:05d}-{chunk:05d}.safetensors"

    def write(self, block: int, chunk: int, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        tensors = {"quantized": quantized.contiguous(), "exact": exact.contiguous().clone()}
        save_file(tensors, self._path(block, chunk))

    def read(self, block: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = load_file(self._path(block, chunk))
        return tensors["quantized"], tensors["exact"]

    def sequences(
        self, block: int, numbers: Sequence[int], calibration: Calibration
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some sequences of `read`, whatever their chunks; no other is read."""
        rows = _rows(calibration)
        found: list[list[torch.Tensor]] = [[], []]
        for number in numbers:
            with safe_open(self._path(block, number // rows), framework="pt") as file:
                for parts, name in zip(found, ("quantized", "exact"), strict=True):
                    parts.append(file.get_slice(name)[number % rows : number % rows + 1])
        return torch.cat(found[0]), torch.cat(found[1])

    def drop(self, block: int) -> None:
        for path in self.folder.glob(f"states-{block:05d}-*.safetensors"):
            path.unlink()


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


def _rows(calibration: Calibration) -> int:
    """Sequences of a chunk."""
    return max(_TOKENS // calibration.ids.shape[1], 1)


def _chunks(calibration: Calibration) -> Iterator[slice]:
    """A few sequences at a time."""
    rows = _rows(calibration)
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


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:05d}.safetensors"


def _commit(path: Path, solved: Mapping[str, Solved], layers: list[_Layer], error: float) -> None:
    """Appears whole or not at all."""
    tensors = {f"{t}/{name}": part.contiguous() for t, s in solved.items() for name, part in packed.pack(s.q).items()}
    facts = {"layers": {layer.tensor: list(solved[layer.tensor].events) for layer in layers}, "error": error}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"spicerack": json.dumps(facts)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _metadata(path: Path) -> dict[str, dict[str, list[str]]]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, dict[str, list[str]]] = json.loads(file.metadata()["spicerack"])
    return found
