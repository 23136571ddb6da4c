"""`GgufFile`: a GGUF file, or all files of a split one, opened: metadata, tensors, and their rows of bytes.

A split model is NAME-00001-of-00003.gguf and so on: the first has the metadata, each says which it is (split.no,
split.count), and all together have split.tensors.count tensors. It is opened by its first file; the others must lie
beside it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spicerack.errors import CheckpointError
from spicerack.storage.gguf.header import GgufTensor, Header, read_header
from spicerack.storage.gguf.metadata import Metadata
from spicerack.storage.mapped import MappedShards

if TYPE_CHECKING:
    import torch

SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""What the files of a split model are called; numbers begin with 1."""
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_SPLITS = 10_000
_REMEDY = "fetch all files of the model again, into one folder"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A model in GGUF: `open` checks the headers, `read` gives one tensor's bytes.

    path       the file that was opened
    files      names of all files, in `path`'s folder: one, or those of a split model
    metadata   keys and values, without those that tell of splitting
    tensors    by name, in the order of the tables
    mapped     the files, where they are held; None where each tensor is mapped on its own
    """

    path: Path
    files: tuple[str, ...]
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]
    mapped: MappedShards | None = None

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Open a .gguf file, or the first of a split model; no tensor is read.

        Raises CheckpointError as `header.read_header` does, for a split model whose files are not all there or do not
        belong together, and for one that is not opened by its first file.
        """
        path = Path(path)
        first = read_header(path)
        metadata = Metadata(first.entries, str(path))
        count = metadata.integer(SPLIT_COUNT, 1)
        headers = [first] if count == 1 else [first, *_others(path, metadata, count)]
        tensors: dict[str, GgufTensor] = {}
        for header in headers:
            for tensor in header.tensors:
                if tensor.name in tensors:
                    raise CheckpointError(
                        f"tensor {tensor.name} is in both {tensors[tensor.name].file} and {tensor.file}", _REMEDY
                    )
                tensors[tensor.name] = tensor
        promised = metadata.integer(SPLIT_TENSORS, len(tensors))
        if promised != len(tensors):
            raise CheckpointError(f"{path}: {promised} tensors are promised, its files have {len(tensors)}", _REMEDY)
        entries = {key: entry for key, entry in metadata.items() if not key.startswith("split.")}
        files = (path.name,) if count == 1 else tuple(split_names(path, count))
        return cls(path, files, Metadata(entries, str(path)), tensors)

    def held(self) -> GgufFile:
        """The same, for a pass over many tensors: each file is mapped once; see `reader.Checkpoint.held`."""
        return dataclasses.replace(self, mapped=MappedShards(self.path.parent))

    def read(self, name: str) -> torch.Tensor:
        """The bytes of a tensor as they lie in the file: uint8 [.., N, row_bytes], on the CPU, nothing copied.

        Raises CheckpointError for a file that cannot be mapped any more, or has become shorter; KeyError for no such
        name.
        """
        tensor = self.tensors[name]
        return self._view(tensor, tensor.begin, tensor.nbytes).reshape(tensor.raw_shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1 of a tensor's first axis, uint8; no other page of the file is touched.

        stop may be beyond the last, as in a slice. Of a tensor of one axis these are the bytes of its elements. Raises
        ShapeError for elements that are no whole blocks.
        """
        tensor = self.tensors[name]
        chosen = range(tensor.shape[0])[start:stop]
        if len(tensor.shape) == 1:
            first, last = (tensor.type.row_bytes(place) for place in (chosen.start, chosen.stop))
            return self._view(tensor, tensor.begin + first, last - first)
        size = tensor.nbytes // tensor.shape[0]
        raw = self._view(tensor, tensor.begin + chosen.start * size, len(chosen) * size)
        return raw.reshape(len(chosen), *tensor.raw_shape[1:])

    def release(self, name: str) -> None:
        """A tensor that was read is not needed any more: where files are held, its pages go. Nobody may keep it."""
        if self.mapped is not None:
            tensor = self.tensors[name]
            self.mapped.release(tensor.file, tensor.begin, tensor.nbytes)

    def _view(self, tensor: GgufTensor, begin: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of the file of a tensor."""
        mapped = MappedShards(self.path.parent) if self.mapped is None else self.mapped
        return mapped.view(tensor.file, begin, nbytes)


def split_names(path: Path, count: int) -> list[str]:
    """Names of the `count` files of a split model, of which `path` is one or would be the only one."""
    match = SPLIT_NAME.fullmatch(path.name)
    stem = match["stem"] if match else path.name.removesuffix(".gguf")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _others(path: Path, metadata: Metadata, count: int) -> list[Header]:
    """Headers of the files of a split model behind the first, which is at `path`."""
    if not 1 < count <= MAX_SPLITS:
        raise CheckpointError(f"{path}: {SPLIT_COUNT} is {count}", _REMEDY)
    names = split_names(path, count)
    if metadata.integer(SPLIT_NO) != 0 or path.name != names[0]:
        raise CheckpointError(f"{path} is one of {count} files of a model, and not the first", f"open {names[0]}")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path.parent} has no {missing[0]}, one of {count} files of the model", _REMEDY)
    headers = []
    for number, name in enumerate(names[1:], 1):
        header = read_header(path.parent / name)
        own = Metadata(header.entries, str(path.parent / name))
        if (own.integer(SPLIT_NO), own.integer(SPLIT_COUNT)) != (number, count):
            raise CheckpointError(f"{own.where} says that it is another file than its name does", _REMEDY)
        headers.append(header)
    return headers
