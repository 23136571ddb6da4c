"""Tensors of a checkpoint that are rows of those in its files: queries, keys and values that lie in one matrix.

    encoder.layers.0.attn.Wqkv.weight [3 N, K]    is    layers.0.self_attn.q_proj.weight, k_proj, v_proj  [N, K] each

Which are cut, and into what, is for those who know models to say (`models.architecture.cuts`). No weight is read here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spicerack.errors import counted
from spicerack.storage.reader import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Cut(Checkpoint):
    """A checkpoint of whose tensors some are rows of those of `base`.

    base    as it lies on the disk
    parts   tensor -> the one whose rows it is, the first of them, and the one behind the last
    """

    base: Checkpoint
    parts: Mapping[str, tuple[str, int, int]]

    def held(self) -> Cut:
        """See `Checkpoint.held`."""
        return dataclasses.replace(self, base=self.base.held())

    def read(self, name: str) -> torch.Tensor:
        """One tensor; of a part its rows alone are read."""
        if (part := self.parts.get(name)) is None:
            return self.base.read(name)
        return self.base.read_rows(*part)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Checkpoint.read_rows`."""
        if (part := self.parts.get(name)) is None:
            return self.base.read_rows(name, start, stop)
        whole, first, last = part
        return self.base.read_rows(whole, first + start, min(first + stop, last))

    def release(self, name: str) -> None:
        """See `Checkpoint.release`; a whole goes with its last part."""
        if (part := self.parts.get(name)) is None:
            self.base.release(name)
        elif part[2] == self.base.tensors[part[0]].shape[0]:
            self.base.release(part[0])

    def told(self, name: str) -> tuple[str, ...]:
        """See `Checkpoint.told`."""
        if (part := self.parts.get(name)) is None:
            return self.base.told(name)
        whole, first, last = part
        return (*self.base.told(whole), f"rows {first} to {last - 1} of {whole}")

    @property
    def stored_bytes(self) -> int:
        """See `Checkpoint.stored_bytes`."""
        return self.base.stored_bytes

    def fingerprint(self) -> str:
        """That of the folder."""
        return self.base.fingerprint()


def cut(checkpoint: Checkpoint, wholes: Mapping[str, Sequence[str]]) -> Checkpoint:
    """The checkpoint with these tensors cut into as many equal parts, of other names; as it is where there are none."""
    if not wholes:
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, tuple[str, int, int]] = {}
    for name, info in checkpoint.tensors.items():
        names = wholes.get(name, ())
        rows, nbytes = info.shape[0] // len(names) if names else 0, info.nbytes // max(len(names), 1)
        for number, own in enumerate(names):
            begin = info.begin + number * nbytes
            tensors[own] = TensorInfo(own, info.dtype, (rows, *info.shape[1:]), nbytes, info.file, begin)
            parts[own] = name, number * rows, (number + 1) * rows
        if not names:
            tensors[name] = info
    first, names = next(iter(wholes.items()))
    note = (
        f"{counted(len(wholes), 'tensor')} cut into those that transformers makes of them, and rules name these: "
        f"{first} into {', '.join(names)}"
    )
    return Cut(
        checkpoint.folder, checkpoint.config, tensors, checkpoint.shards, checkpoint.side_files,
        (*checkpoint.notes, note), base=checkpoint, parts=parts,
    )  # fmt: skip
