"""What the calibrated loop keeps on disk while it works: solved blocks, and hidden states on their way through them.

    block-00003.safetensors          a finished block: codes of its layers, changed float tensors, events and errors
    states-00003-00007.safetensors   a chunk of hidden states in front of a block; two blocks' are there at a time
    part-PATH.safetensors            a solved layer of the present block, where several ranks share the work

A block's file is the progress record: it appears whole or not at all. The others are made anew from what is in front.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from spicerack.algorithms.solved import Solved
from spicerack.errors import OutputError
from spicerack.machine.devices import CPU
from spicerack.numerics import packed
from spicerack.numerics.qtensor import QTensor, moved
from spicerack.numerics.scheme import Scheme
from spicerack.storage.format import StoredTensor
from spicerack.storage.writer import partial_folder

_CHANGED = "float"
"""What a changed float tensor is called behind its name, where a quantized one has the names of its parts."""


def blocks_folder(output: Path) -> Path:
    """The folder where blocks lie until `output` is whole."""
    return partial_folder(output) / "blocks"


class Solutions:
    """The solved layers in `folder`, by tensor, and the float tensors that were changed along with them.

    A tensor of all experts is here once each of its matrices is.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("block-*.safetensors")):
            facts = _metadata(file)
            self._layers |= facts["layers"]
            self._files |= dict.fromkeys([*facts["layers"], *facts["changed"]], file)

    def __contains__(self, tensor: str) -> bool:
        return bool(self._of(tensor))

    def __bool__(self) -> bool:
        return bool(self._layers)

    def _of(self, tensor: str) -> dict[str, str]:
        """Name of each solution of a tensor, one for each expert's matrix -> what an event of it begins with."""
        if tensor in self._layers:
            return {tensor: ""}
        numbers = itertools.takewhile(lambda n: solution_name(tensor, n) in self._layers, itertools.count())
        return {solution_name(tensor, number): f"expert {number}: " for number in numbers}

    def events(self, tensor: str) -> list[str]:
        """What happened while the tensor was solved."""
        return [prefix + event for name, prefix in self._of(tensor).items() for event in self._layers[name]["events"]]

    def error(self, tensor: str) -> float:
        """||decoded - w|| / ||w|| against the weight w that was rounded; of experts the root mean square."""
        errors = [self._layers[name]["error"] for name in self._of(tensor)]
        return errors[0] if len(errors) == 1 else float(f"{math.hypot(*errors) / math.sqrt(len(errors)):.4g}")

    def read(self, tensor: str, stored: StoredTensor) -> QTensor:
        """The tensor as it was solved, output rows first."""
        if tensor in self._layers:
            return self._read(tensor, stored.scheme, stored.shape)
        matrices = [self._read(name, stored.scheme, stored.shape[1:]) for name in self._of(tensor)]
        return QTensor.stack(matrices)

    def _read(self, name: str, scheme: Scheme, shape: tuple[int, ...]) -> QTensor:
        """One solution, by its name: a matrix, or the tensor of all experts where that was solved as one."""
        with safe_open(self._files[name], framework="pt") as file:
            names = [key for key in file.offset_keys() if key.startswith(name + "/")]
            parts = {key.removeprefix(name + "/"): file.get_tensor(key) for key in names}
        return packed.unpack(scheme, shape, parts)

    def changed(self, tensor: str) -> torch.Tensor | None:
        """What a tensor that stays in float is now; None if it is as it was."""
        if tensor not in self._files:
            return None
        with safe_open(self._files[tensor], framework="pt") as file:
            changed: torch.Tensor = file.get_tensor(f"{tensor}/{_CHANGED}")
        return changed


def solution_name(tensor: str, number: int | None) -> str:
    """What a solved matrix is called: like its tensor, with the expert's number where the tensor has those of all."""
    return tensor if number is None else f"{tensor}[{number}]"


class States:
    """Hidden states on disk, float32 [B, L, H], a file for each block and chunk: behind quantized blocks, and exact.

    `block` is always the one in front of which they are; the number of blocks is that of what comes out of the last.
    """

    def __init__(self, folder: Path, rows: int, device: torch.device = CPU) -> None:
        """folder: where they lie. rows: sequences of a chunk. device: where they go when they are read."""
        self.folder, self.rows, self.device = folder, rows, device

    def _path(self, block: int, chunk: int) -> Path:
        """The file of a chunk in front of a block."""
        return self.folder / f"states-{block:05d}-{chunk:05d}.safetensors"

    def write(self, block: int, chunk: int, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Keep one chunk's, from whatever device. Raises OutputError where the disk is full."""
        tensors = {"quantized": quantized.contiguous(), "exact": exact.contiguous().clone()}
        _save(moved(tensors, CPU), self._path(block, chunk))

    def read(self, block: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What was written of one chunk, on the device: (behind quantized blocks, exact)."""
        tensors = moved(load_file(self._path(block, chunk)), self.device)
        return tensors["quantized"], tensors["exact"]

    def sequences(self, block: int, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Some sequences of `read`, by their numbers in the text, whatever their chunks; no other is read."""
        rows: list[list[torch.Tensor]] = [[], []]
        for number in numbers:
            with safe_open(self._path(block, number // self.rows), framework="pt") as file:
                for parts, name in zip(rows, ("quantized", "exact"), strict=True):
                    parts.append(file.get_slice(name)[number % self.rows : number % self.rows + 1])
        return moved((torch.cat(rows[0]), torch.cat(rows[1])), self.device)

    def write_part(self, path: str, start: QTensor, solved: Solved) -> None:
        """Keep a solved layer of the present block for the other ranks: rounded to nearest, and its solution."""
        tensors = {
            f"{kind}/{name}": part.contiguous().clone()  # a scale may be both's
            for kind, q in (("start", start), ("solved", solved.q))
            for name, part in packed.pack(q).items()
        }
        _save(tensors, self.folder / f"part-{path}.safetensors", {"spicerack": json.dumps(solved.events)})

    def read_part(self, path: str, stored: StoredTensor) -> tuple[QTensor, Solved]:
        """What a rank has written of the layer at `path`, which is to be `stored`."""
        with safe_open(self.folder / f"part-{path}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            events = json.loads(file.metadata()["spicerack"])
        start, solved = (
            packed.unpack(stored.scheme, stored.shape, {
                name.removeprefix(kind): part for name, part in tensors.items() if name.startswith(kind)
            })
            for kind in ("start/", "solved/")
        )  # fmt: skip
        return start, Solved(solved, tuple(events))

    def drop(self, block: int) -> None:
        """Remove hidden states in front of a block that is finished, and its parts."""
        for pattern in (f"states-{block:05d}-*.safetensors", "part-*.safetensors"):
            for path in self.folder.glob(pattern):
                path.unlink()


def is_done(folder: Path, block: int) -> bool:
    """Whether the block was committed, in this run or one before."""
    return _file(folder, block).exists()


def commit(
    folder: Path,
    block: int,
    solved: Mapping[str, Solved],
    losses: Mapping[str, float],
    changed: Mapping[str, torch.Tensor],
    error: float,
) -> None:
    """Write a finished block: its file appears whole or not at all.

    folder   of blocks
    block    its number
    solved   its layers, by key
    losses   their errors, ||decoded - w|| / ||w||, by key
    changed  float tensors as they are now, by name
    error    of the block's output, relative

    Raises OutputError where the disk is full.
    """
    tensors = {f"{t}/{name}": part.contiguous() for t, s in solved.items() for name, part in packed.pack(s.q).items()}
    tensors |= {f"{tensor}/{_CHANGED}": value.contiguous() for tensor, value in changed.items()}
    layers = {tensor: {"events": list(s.events), "error": losses[tensor]} for tensor, s in solved.items()}
    facts = {"layers": layers, "changed": list(changed), "error": error}
    path = _file(folder, block)
    temporary = path.with_suffix(".tmp")
    _save(tensors, temporary, {"spicerack": json.dumps(facts)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors; of one that cannot be written nothing is left. Raises OutputError for a full disk."""
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error}",
            "free some space; finished blocks are kept, and the same command continues",
        ) from error


def clear(folder: Path) -> None:
    """Remove the folder of blocks, hidden states and all, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _file(folder: Path, block: int) -> Path:
    """The file of a finished block, by its number in the stack."""
    return folder / f"block-{block:05d}.safetensors"


def _metadata(path: Path) -> dict[str, Any]:
    """What `commit` wrote beside the tensors: layers with events and errors, changed tensors, and the block's error."""
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["spicerack"])
    return facts
