"""`Source`: what is exported, a tensor at a time. Targets see it and never a folder's format.

A tensor is a QTensor in the scheme that the target holds it in, or a float as it lies in the folder. Memory is that of
one tensor: whoever walks gives a tensor up when it asks for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from spicerack.errors import CheckpointError, listed
from spicerack.models import census
from spicerack.models.architecture import host_of, on_meta
from spicerack.models.census import ON_REQUEST
from spicerack.models.fit import fit
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.undecoded import Undecoded
from spicerack.quantization import decisions
from spicerack.runtime.folder import Folder
from spicerack.storage import ledger
from spicerack.storage.format import Contents, Format, Reading, StoredTensor
from spicerack.storage.ledger import Ledger
from spicerack.storage.reader import Checkpoint, TensorInfo


@dataclass(frozen=True, slots=True)
class Change:
    """What makes a tensor of the folder one in the scheme that the target holds it in.

    decoded     of its QTensor
    undecoded   the same of codes as they lie in the folder, which stay so; None from it, or none of it: they do not
    """

    decoded: Callable[[QTensor], QTensor]
    undecoded: Callable[[Undecoded], Undecoded | None] | None = None


@dataclass(frozen=True)
class Source:
    """A model folder on its way out.

    folder     as it was opened
    contents   module -> what the target is given: another scheme than the folder's where `changes` has the module
    changes    module -> what is done to its QTensor first
    """

    folder: Folder
    contents: Contents
    changes: Mapping[str, Change] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Folder) -> Source:
        """The folder as it is, with what its format may not tell: roles, by names, and which layers have a bias."""
        source = cls(folder, folder.contents)
        entries = census.take(source.described).entries
        contents = {}
        for module, stored in folder.contents.items():
            role = entries[f"{module}.weight"].role if stored.role == "linear" else stored.role
            role = role if role in ON_REQUEST else stored.role
            contents[module] = replace(stored, role=role, bias=f"{module}.bias" in source.floats)
        return cls(folder, contents)

    @property
    def config(self) -> Mapping[str, Any]:
        """The float model's config.json."""
        return self.folder.config

    @cached_property
    def described(self) -> Checkpoint:
        """The float model that the folder stands for, as headers: what transformers, names and shapes tell of it.

        No tensor of it that is packed can be read.
        """
        return self.folder.described(self.contents)

    @cached_property
    def ledger(self) -> Ledger | None:
        """What the folder says of its origin; None where it says nothing."""
        return ledger.read(self.folder.checkpoint.folder)

    @cached_property
    def floats(self) -> dict[str, TensorInfo]:
        """Name -> header of the tensors that are no part of a packed one, in the order of the disk."""
        return self.folder.float_headers()

    def refuse_gaps(self) -> None:
        """Raise CheckpointError where no tensor of the folder becomes a parameter of the model's class. Nothing is said
        where transformers does not know the class, or the folder holds a plain module.

        What is packed may be a tensor of all experts, whose name has no `.weight` at its end.
        """
        model = on_meta(self.config) if self.config else None
        if model is None:
            return
        shapes = {name: info.shape for name, info in self.described.tensors.items()}
        bare = {module: shapes[f"{module}.weight"] for module in self.contents}
        if missing := fit(model, shapes | bare).missing:
            raise CheckpointError(
                f"{self.folder.checkpoint.folder}: no tensor fills {listed(missing, 3, 'parameters')}",
                "the folder is incomplete, or its config.json names another architecture",
            )

    def reading(self, fmt: Format) -> Reading:
        """What readers of a folder in that format are told: above all the linear layers that stay float."""
        if fmt.name not in self._readings:  # a model of the family is built for it, and three parts of an export ask
            self._readings[fmt.name] = self._reading(fmt)
        return self._readings[fmt.name]

    @cached_property
    def _readings(self) -> dict[str, Reading]:
        """What `reading` has found, by the format's name."""
        return {}

    def _reading(self, fmt: Format) -> Reading:
        """The same, anew."""
        described = self.described
        if not described.config:
            return Reading()
        known = decisions.Source.of(described)
        contents, tied = self.contents, known.tied
        floats = [name for name in known.linears() if name not in contents and tied.get(name) not in contents]
        headers = {name: (info.dtype, info.shape) for name, info in described.tensors.items()}
        return fmt.reading(self.config, contents, host_of(self.config, headers, contents, floats))

    def order(self) -> list[StoredTensor | TensorInfo]:
        """All tensors, packed ones and floats, in the order of the disk: read so, files are read once, in sequence."""
        owner = {name: module for module, names in self.folder.layouts().items() for name in names}
        order: dict[str, StoredTensor | TensorInfo] = {}
        for name, info in self.folder.checkpoint.tensors.items():
            if name in owner:
                order.setdefault(f"{owner[name]}.", self.contents[owner[name]])
            else:
                order[name] = info
        return list(order.values())

    def packed(self, module: str) -> QTensor:
        """A module of `contents`, in the scheme that stands there. Raises CheckpointError, and WeightError where a
        scale does not fit the type that it has there."""
        q = self.folder.packed(self.folder.contents[module])
        change = self.changes.get(module)
        return q if change is None else change.decoded(q)

    def undecoded(self, module: str) -> Undecoded | None:
        """The same with codes as they lie in the folder; None where there is no such form, or a code may be no level.

        Raises as `packed` does.
        """
        stored, change = self.folder.contents[module], self.changes.get(module)
        if not _every_code_is_a_level(stored) or (change is not None and change.undecoded is None):
            return None
        if change is not None and stored.scheme.plain_obstacle is not None:
            return None  # minima and quantized scales are changed where codes are seen
        u = self.folder.undecoded(stored)
        return u if u is None or change is None or change.undecoded is None else change.undecoded(u)

    def either(self, module: str) -> Undecoded | QTensor:
        """The same undecoded where it can be, else as `packed` has it."""
        u = self.undecoded(module)
        return self.packed(module) if u is None else u

    def matrices(self, module: str) -> Iterator[Undecoded | QTensor]:
        """The matrices of a stack [E, N, K], one at a time, as `either` has them: each is read when it is asked for.

        Memory is that of one, where the folder has each tensor of the stack for all experts, and nothing is changed.
        """
        stored, folder = self.folder.contents[module], self.folder
        assert folder.format is not None, "contents come from a format"
        experts, *shape = stored.shape
        layout, one = folder.format.layout(stored), replace(stored, shape=tuple(shape))
        if module in self.changes or any(shape[:1] != (experts,) for _, shape in layout.values()):
            yield from self.packed(module).matrices()
            return
        for expert in range(experts):
            rows = {name: folder.checkpoint.read_rows(name, expert, expert + 1) for name in layout}
            tensors = {name: part[0] if part.ndim > 1 else part for name, part in rows.items()}
            u = folder.format.undecoded(one, tensors) if _every_code_is_a_level(stored) else None
            yield folder.format.decode(one, tensors) if u is None else u

    def float(self, name: str) -> torch.Tensor:
        """A tensor of `floats`, as it is stored. Raises CheckpointError."""
        return self.folder.checkpoint.read(name)

    def release(self, tensor: StoredTensor | TensorInfo) -> None:
        """What was read of a tensor is not needed any more, and nobody keeps a view of it."""
        if isinstance(tensor, StoredTensor):
            self.folder.release(self.folder.contents[tensor.module])
        else:
            self.folder.checkpoint.release(tensor.name)


def _every_code_is_a_level(stored: StoredTensor) -> bool:
    """Whether codes need not be looked at: each pattern of their bits stands for something."""
    levels = stored.scheme.levels
    return levels.hi - levels.lo + 1 >= 1 << levels.bits
