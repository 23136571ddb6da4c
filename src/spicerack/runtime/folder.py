"""`Folder`: what there is in a model folder that is being loaded, and its tensors, packed ones and floats.

A folder says three things: its config.json what model it is, its format in which tensors a packed weight lies, and its
headers what else there is. Nothing here knows modules: names are the checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spicerack.errors import CheckpointError
from spicerack.models.census import BY_DEFAULT, ON_REQUEST
from spicerack.models.opening import open_model
from spicerack.nn import kinds
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage import format as formats
from spicerack.storage.format import Format, StoredTensor
from spicerack.storage.reader import BITS, Checkpoint, TensorInfo


@dataclass(frozen=True, slots=True)
class Folder:
    """A model folder, opened: headers and config.json are read, weights are not.

    checkpoint  the folder's files, held (`Checkpoint.held`), and what is in them
    format      in which its packed tensors lie; None if all that is read from it is float
    contents    module in the checkpoint's names -> what is packed there; empty without a format
    """

    checkpoint: Checkpoint
    format: Format | None
    contents: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | Path) -> Folder:
        """The folder or GGUF file at a path or hub id; a release in FP8 or MXFP4 as the floats that it stands for.

        Raises CheckpointError, also where a packed tensor has an unknown role.
        """
        checkpoint = open_model(folder).held()
        fmt = formats.of_folder(checkpoint)
        contents = fmt.contents(checkpoint) if fmt is not None else {}
        known = {kind.name for kind in kinds.KINDS} | BY_DEFAULT | ON_REQUEST
        if strange := next((stored for stored in contents.values() if stored.role not in known), None):
            raise CheckpointError(
                f"{checkpoint.folder}: {strange.module} is packed as {strange.role!r}, of which nothing is known",
                "the folder is damaged, or was written by a newer spicerack",
            )
        return cls(checkpoint, fmt, contents)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of the float model; empty if the folder holds a plain module."""
        return self.checkpoint.config if self.format is None else self.format.float_config(self.checkpoint.config)

    def layouts(self) -> dict[str, tuple[str, ...]]:
        """Module of `contents` -> names of the tensors that it lies in."""
        if self.format is None:
            return {}
        return {module: tuple(self.format.layout(stored)) for module, stored in self.contents.items()}

    def float_headers(self) -> dict[str, TensorInfo]:
        """Name -> header of the tensors that are no part of a packed one, in the order of the disk."""
        packed = {name for names in self.layouts().values() for name in names}
        return {name: info for name, info in self.checkpoint.tensors.items() if name not in packed}

    def described(self, contents: Mapping[str, StoredTensor]) -> Checkpoint:
        """The float model that the folder stands for, as headers: what transformers, names and shapes tell of it.

        contents: as here, or with what else is known of each. No tensor that is packed can be read.
        """
        infos = self.float_headers()
        for stored in contents.values():
            name, shape = f"{stored.module}.weight", stored.float_shape
            dtype = safetensors_dtype(stored.source_dtype)
            infos[name] = TensorInfo(name, dtype, shape, math.prod(shape) * BITS[dtype] // 8, "")
        return replace(self.checkpoint, config=dict(self.config), tensors=infos, mapped=None)

    def packed(self, stored: StoredTensor) -> QTensor:
        """Codes and scales of one tensor of `contents`, read from the disk. Raises CheckpointError."""
        assert self.format is not None, "contents come from a format"
        return self.format.decode(stored, {name: self.checkpoint.read(name) for name in self.format.layout(stored)})

    def undecoded(self, stored: StoredTensor) -> Undecoded | None:
        """The same with codes as they lie on the disk, which is not read yet; None where there is no such form.

        Raises CheckpointError as `Format.undecoded` does.
        """
        assert self.format is not None, "contents come from a format"
        return self.format.undecoded(stored, {name: self.checkpoint.read(name) for name in self.format.layout(stored)})

    def release(self, stored: StoredTensor) -> None:
        """Nobody needs what was read of a tensor of `contents` any more: its pages need not stay in memory."""
        assert self.format is not None, "contents come from a format"
        for name in self.format.layout(stored):
            self.checkpoint.release(name)

    def floats(self) -> dict[str, torch.Tensor]:
        """Tensors that are no part of a packed one, by name.

        They are mapped from their files and not read: a page comes from the disk when it is looked at. Those of a
        release are decoded now, and so in memory.
        """
        layouts = [self.format.layout(stored) for stored in self.contents.values()] if self.format is not None else []
        packed = {name for layout in layouts for name in layout}
        return {name: self.checkpoint.read(name) for name in self.checkpoint.tensors if name not in packed}
