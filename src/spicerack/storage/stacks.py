"""Experts in one tensor, as MLX has them, and one by one, as checkpoints do.

    A.experts.3.down_proj.weight  [N, ..]    is row 3 of    A.switch_mlp.down_proj.weight  [E, N, ..]

Of Mixtral, whose experts have w1, w2 and w3, these are gate_proj, down_proj and up_proj in a stack. (Source: `sanitize`
of mlx_lm/models, mlx-lm 0.32.2, which stacks what it finds one by one; in Qwen's files it stacks floats alone.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spicerack.errors import CheckpointError
from spicerack.storage.reader import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

_STACK = "switch_mlp"
_MOST = 1 << 14
"""Experts of a layer: the largest models have some hundreds."""
_AGAIN = "the folder is damaged: fetch the files again"
_MIXTRAL = "block_sparse_moe"
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_NAMES = {part: name for name, part in _PARTS.items()}
_MEMBER = re.compile(r"(.+)\.experts\.(0|[1-9]\d{0,4})\.(\w+)")
_STACKED = re.compile(rf"(.+)\.{_STACK}\.(\w+)\.(\w+)")


def place(module: str) -> tuple[str, int] | None:
    """The stack that an expert's layer lies in, and its row there; None for modules that are none."""
    match = _MEMBER.fullmatch(module)
    if match is None:
        return None
    front, number, part = match.groups()
    return f"{front}.{_STACK}.{_PARTS.get(part, part)}", int(number)


def _member(front: str, part: str, number: int) -> str:
    """Inverse of `place`."""
    mixtral = front.rpartition(".")[2] == _MIXTRAL
    return f"{front}.experts.{number}.{_NAMES.get(part, part) if mixtral else part}"


@dataclass(frozen=True, kw_only=True)
class Unstacked(Checkpoint):
    """A checkpoint whose stacks are experts one by one.

    base    as it lies on the disk
    places  tensor -> the stack that it is a row of, and which
    """

    base: Checkpoint
    places: Mapping[str, tuple[str, int]]

    def held(self) -> Unstacked:
        """See `Checkpoint.held`."""
        return dataclasses.replace(self, base=self.base.held())

    def read(self, name: str) -> torch.Tensor:
        """One tensor; of a stack the row alone is read."""
        if (at := self.places.get(name)) is None:
            return self.base.read(name)
        stack, number = at
        if self.base.mapped is not None:
            return self.base.read(stack)[number]
        return self.base.read_rows(stack, number, number + 1)[0]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Checkpoint.read_rows`."""
        return self.read(name)[start:stop] if name in self.places else self.base.read_rows(name, start, stop)

    def release(self, name: str) -> None:
        """See `Checkpoint.release`; a stack goes with its last row."""
        stack, number = self.places.get(name, (name, 0))
        if name not in self.places or number == self.base.tensors[stack].shape[0] - 1:
            self.base.release(stack)

    def fingerprint(self) -> str:
        """That of the folder."""
        return self.base.fingerprint()


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with experts one by one, where they are stacks in MLX's folders; any other as it is.

    What config.json says of a stack is said of each of its rows. No weight is read. Raises CheckpointError for a stack
    whose tensors are not of as many experts.
    """
    if "quantization" not in checkpoint.config or not any(f".{_STACK}." in name for name in checkpoint.tensors):
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, tuple[str, int]] = {}
    told: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None or len(info.shape) < 2 or 0 in info.shape:
            tensors[name] = info
            continue
        front, part, last = match.groups()
        nbytes = info.nbytes // info.shape[0]
        if info.shape[0] > _MOST:
            raise CheckpointError(f"{checkpoint.folder}: {name} is of {info.shape[0]} experts", _AGAIN)
        modules = [_member(front, part, number) for number in range(info.shape[0])]
        if told.setdefault(name.removesuffix(f".{last}"), modules) != modules:
            beside = "what lies beside it is not"
            raise CheckpointError(f"{checkpoint.folder}: {name} is of {len(modules)} experts, {beside}", _AGAIN)
        if twice := next((module for module in modules if f"{module}.{last}" in checkpoint.tensors), None):
            raise CheckpointError(f"{checkpoint.folder}: {twice}.{last} is also in {name}", _AGAIN)
        for number, module in enumerate(modules):
            own, begin = f"{module}.{last}", info.begin + number * nbytes
            tensors[own] = TensorInfo(own, info.dtype, info.shape[1:], nbytes, info.file, begin)
            places[own] = name, number
    config = {key: _spread(value, told) if key.startswith("quantization") else value
              for key, value in checkpoint.config.items()}  # fmt: skip
    return Unstacked(
        checkpoint.folder, config, tensors, checkpoint.shards, checkpoint.side_files, checkpoint.notes,
        base=checkpoint, places=places,
    )  # fmt: skip


def _spread(section: Any, told: Mapping[str, list[str]]) -> Any:
    """A section of config.json in which what is said of a stack is said of its rows."""
    if not isinstance(section, dict):
        return section
    own: dict[str, Any] = {}
    for key, value in section.items():
        own |= dict.fromkeys(told.get(key, [key]), value)
    return own


def stacks_of(modules: Iterable[str]) -> dict[str, list[str]]:
    """Stack -> the experts' layers in it, in order, of all of these modules."""
    stacks: dict[str, dict[int, str]] = {}
    for module in modules:
        if (at := place(module)) is not None:
            stacks.setdefault(at[0], {})[at[1]] = module
    return {stack: [members[number] for number in sorted(members)] for stack, members in stacks.items()}
