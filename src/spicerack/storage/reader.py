"""Reads a folder of safetensors: everything about the tensors from headers alone, then one tensor at a time.

Headers are parsed by the safetensors library, which proves that the tensors tile each file exactly: truncated files,
gaps and overlaps end here. torch is imported when the first tensor is read, not before: `inspect` runs without it.

What is given up. A file is mapped for each tensor that is read, and its header parsed again (.5 ms); that is what keeps
memory at one tensor, however large the model. Who reads a folder of many tensors holds its shards mapped instead
(`held`), and says which tensors it is done with. Floats that are left mapped must not change on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from spicerack.errors import CheckpointError
from spicerack.storage import files
from spicerack.storage.mapped import MappedShards

if TYPE_CHECKING:
    import torch

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of safetensors' types."""
_MAX_NAME = 1000
"""Characters of a tensor's name; errors print names."""
_COMPARED = 1 << 20
"""Bytes of two tensors that are compared at a time."""
_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""Of each shard in a fingerprint: how many samples, and how long: a page each."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; no data is read for it.

    name     of the tensor, as the file has it
    dtype    safetensors' name of its type ("BF16"), a key of `BITS`
    shape    of the tensor, () for a single number
    nbytes   that it takes in the file
    file     the shard that holds it, by name
    begin    where in that file its bytes begin; 0 where there is no file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    begin: int = 0

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, opened: `open` reads headers, `read` one tensor, and `held` is for who will read them all.

    folder      where it is
    config      what config.json says
    tensors     by name, in the order of their bytes on disk, shard after shard, so that reading them all is sequential
    shards      files that hold them
    side_files  every other file that belongs to the model, relative, '/'-separated
    notes       what was noticed and left alone, for people
    mapped      the shards, where they are held; None where each tensor is read on its own
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    side_files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    mapped: MappedShards | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as the files hold them, which a release in few bits decodes to more."""
        return sum(info.nbytes for info in self.tensors.values())

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a local folder or a hub id: every header is read, no weight is.

        Raises CheckpointError naming file, tensor, rule and remedy: a folder that `files.find` refuses, a shard that is
        damaged, a tensor that is in two shards or that an index promises and no shard has.
        """
        own = files.find(files.locate(model))
        config = files.read_config(own.folder)
        tensors: dict[str, TensorInfo] = {}
        for shard in own.shards:
            for info in _read_header(own.folder / shard):
                if info.name in tensors:
                    raise CheckpointError(
                        f"tensor {info.name} is in both {tensors[info.name].file} and {shard} of {own.folder}",
                        "save the model again with save_pretrained",
                    )
                tensors[info.name] = info
        if not tensors:
            raise CheckpointError(f"{own.folder / own.shards[0]} holds no tensors", "fetch the file again")
        notes = [f"{name} is not part of the model and is left out" for name in own.left_out]
        if own.index is not None:
            notes += _check_index(own.folder, own.index, tensors)
        return cls(own.folder, config, tensors, own.shards, own.side_files, tuple(notes))

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Paths of the files that hold the tensors."""
        return tuple(self.folder / shard for shard in self.shards)

    def held(self) -> Checkpoint:
        """The same, for a pass over many tensors: each shard is mapped once, and what `read` gives are views of that.

        Their pages stay resident until `release` names the tensor, or all is gone.
        """
        return dataclasses.replace(self, mapped=MappedShards(self.folder))

    def release(self, name: str) -> None:
        """A tensor that was read is not needed any more: where shards are held, its pages go. Nobody may keep it."""
        if self.mapped is not None:
            info = self.tensors[name]
            self.mapped.release(info.file, info.begin, info.nbytes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored type. Raises CheckpointError for a file that cannot be read.

        Where shards are not held the file is mapped afresh each time: a mapping that lives on keeps every page it has
        touched resident, until the whole shard is. The tensor's pages go when the tensor goes.
        """
        info = self.tensors[name]
        if self.mapped is not None and (dtype := _torch_dtype(info.dtype)) is not None:
            raw = self.mapped.view(info.file, info.begin, info.nbytes)
            aligned = raw.data_ptr() % dtype.itemsize == 0
            return (raw if aligned else raw.clone()).view(dtype).reshape(info.shape)
        try:
            with safe_open(self.folder / info.file, framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.folder / info.file, error, name) from error
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1 of a tensor's first axis, on the CPU, in its stored type; no other page of the file is
        touched.

        stop may be beyond the last row, as in a slice. Raises CheckpointError for a file that cannot be read.
        """
        info = self.tensors[name]
        try:
            with safe_open(self.folder / info.file, framework="pt") as shard:
                rows: torch.Tensor = shard.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.folder / info.file, error, name) from error
        return rows

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors are the same bytes, of one type and shape; read a mebibyte at a time, and only as far as
        they agree.

        Tensors without a file, of which a ledger tells, or a module, are taken to be the same.
        """
        first, second = self.tensors[a], self.tensors[b]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        if not first.file or not second.file:
            return True
        with (self.folder / first.file).open("rb") as one, (self.folder / second.file).open("rb") as other:
            one.seek(first.begin)
            other.seek(second.begin)
            return all(
                one.read(size) == other.read(size)
                for size in (min(_COMPARED, first.nbytes - at) for at in range(0, first.nbytes, _COMPARED))
            )

    def packed(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """What is packed in a tensor of bytes, where the checkpoint knows: the type's name, and the weights' shape.

        None for what is no such tensor, and where a format says it (`storage.format`).
        """
        return None

    def told(self, name: str) -> tuple[str, ...]:
        """What the ledger says of how a tensor was read: nothing, where it was read as it lies in the file."""
        return ()

    def fingerprint(self) -> str:
        """sha256 hex over config.json and each shard's name, size, header and 16 samples of 4 KiB spread over its data.

        Tells whether a run that resumes still sees the model it began with, in milliseconds at any size. It is not a
        hash of all bytes: a change that hits no sample, and leaves sizes and headers alone, is not seen.
        """
        digest = hashlib.sha256((self.folder / files.CONFIG).read_bytes())
        for shard in self.shards:
            path = self.folder / shard
            size = path.stat().st_size
            digest.update(f"\n{shard}\n{size}\n".encode())
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(header))
                begin, last = 8 + header, max(8 + header, size - _SAMPLE_BYTES)
                for i in range(_SAMPLES):
                    # evenly from the first byte to the last page, so that a change of many bytes hits one
                    file.seek(begin + (last - begin) * i // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _torch_dtype(name: str) -> torch.dtype | None:
    """torch's type of safetensors' name; None for those that torch has in no file of ours, which safetensors reads."""
    from spicerack.numerics.dtypes import BY_SAFETENSORS

    return BY_SAFETENSORS.get(name)


def _read_header(path: Path) -> Iterator[TensorInfo]:
    """Infos of one shard, in the order of their bytes; no data is read. numpy is the framework that costs least.

    Raises CheckpointError for a file that is damaged, a type that is not known, and names that are too long or not
    printable: a name ends up in errors and in terminals.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file", "fetch the shard again")
    try:
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, framework="numpy") as shard:
            for name in shard.offset_keys():
                if len(name) > _MAX_NAME or not name.isprintable():
                    raise CheckpointError(
                        f"{path}: tensor name {name[:60]!r} is too long or not printable", "do not trust this file"
                    )
                view = shard.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                if dtype not in BITS:
                    raise CheckpointError(f"{path}: {name} has the unknown type {dtype}", "update spicerack")
                info = TensorInfo(name, dtype, shape, math.prod(shape) * BITS[dtype] // 8, path.name, begin)
                yield info
                begin += info.nbytes  # tensors tile the file, as safetensors has proved
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception, tensor: str = "") -> CheckpointError:
    """What is raised for a shard, or a tensor in it, that safetensors or the system does not read."""
    place = f"{path}: {tensor}" if tensor else f"{path}"
    return CheckpointError(f"{place} cannot be read: {error}", "the file is damaged or incomplete: fetch it again")


def _check_index(folder: Path, index: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
    """Compare an index with what the shards hold -> notes on tensors that it forgets, which are kept, as transformers
    does.

    Raises CheckpointError for a tensor that it promises and that is not there, or is in another shard.
    """
    for name, shard in index.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder}: the index names tensor {name!r}, which is not in its shard {shard}", "fetch the shard again"
            )
        if tensors[name].file != shard:
            raise CheckpointError(
                f"{folder}: the index says {name!r} is in {shard}, it is in {tensors[name].file}",
                "save the model again with save_pretrained",
            )
    return [
        f"{name} is in {info.file} but not in the index; it is kept"
        for name, info in tensors.items()
        if name not in index
    ]
