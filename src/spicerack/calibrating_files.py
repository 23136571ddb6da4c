"""What the calibrated loop keeps on disk while it works: solved blocks, and hidden states on their way through them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spicerack import packed
from spicerack.format import Planned
from spicerack.qtensor import QTensor
from spicerack.solved import Solved


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
            names = [name for name in file.offset_keys() if name.startswith(tensor + "/")]
            parts = {name.removeprefix(tensor + "/"): file.get_tensor(name) for name in names}
        return packed.unpack(planned.scheme, planned.shape, parts)


class States:
    """Hidden states on disk, float32 [B, L, H], a file for each block and chunk: behind quantized blocks, and exact."""

    def __init__(self, folder: Path, rows: int) -> None:
        """rows: sequences of a chunk."""
        self.folder, self.rows = folder, rows

    def _path(self, block: int, chunk: int) -> Path:
        return self.folder / f"states-{block:05d}-{chunk:05d}.safetensors"

    def write(self, block: int, chunk: int, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Of one chunk."""
        tensors = {"quantized": quantized.contiguous(), "exact": exact.contiguous().clone()}
        save_file(tensors, self._path(block, chunk))

    def read(self, block: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same again."""
        tensors = load_file(self._path(block, chunk))
        return tensors["quantized"], tensors["exact"]

    def sequences(self, block: int, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Some sequences of `read`, whatever their chunks; no other is read."""
        found: list[list[torch.Tensor]] = [[], []]
        for number in numbers:
            with safe_open(self._path(block, number // self.rows), framework="pt") as file:
                for parts, name in zip(found, ("quantized", "exact"), strict=True):
                    parts.append(file.get_slice(name)[number % self.rows : number % self.rows + 1])
        return torch.cat(found[0]), torch.cat(found[1])

    def drop(self, block: int) -> None:
        """Those of a block that is finished."""
        for path in self.folder.glob(f"states-{block:05d}-*.safetensors"):
            path.unlink()


def is_done(folder: Path, block: int) -> bool:
    """Whether `commit` was."""
    return _file(folder, block).exists()


def commit(folder: Path, block: int, solved: Mapping[str, Solved], error: float) -> None:
    """The block's file appears whole or not at all. solved: by tensor. error: of the block's output."""
    tensors = {f"{t}/{name}": part.contiguous() for t, s in solved.items() for name, part in packed.pack(s.q).items()}
    facts = {"layers": {tensor: list(s.events) for tensor, s in solved.items()}, "error": error}
    path = _file(folder, block)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"spicerack": json.dumps(facts)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def clear(folder: Path) -> None:
    """Remove all of it."""
    shutil.rmtree(folder, ignore_errors=True)


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:05d}.safetensors"


def _metadata(path: Path) -> dict[str, dict[str, list[str]]]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, dict[str, list[str]]] = json.loads(file.metadata()["spicerack"])
    return found
