"""Writes a GGUF file: the header first, then tensors in the order that it promised; whole or not at all.

All shapes and types are known before a weight is read, so the header can be written first and tensors stream behind it,
one in memory at a time. Files are written in a folder beside where they will be, brought to the disk, and renamed at
the very end, the first of a split model last: without it nobody opens the others. If anything fails before that,
nothing is left. A file is never overwritten.

What is read with `reader` and written again has the same bytes, as long as tensors lay in the order of the table.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from spicerack.errors import OutputError
from spicerack.storage.durable import LOCK, disk_error, locked, sync
from spicerack.storage.gguf.ggml import TensorSpec
from spicerack.storage.gguf.header import ALIGNMENT, ALIGNMENT_KEY, MAGIC, MAX_ALIGNMENT, MAX_AXES
from spicerack.storage.gguf.metadata import ARRAY_ID, KINDS, Array, Entry, Value, encoded
from spicerack.storage.gguf.reader import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_names
from spicerack.storage.writer import check_disk, partial_folder

VERSION = 3
MAX_TENSOR_NAME = 63
"""Bytes of a tensor's name: ggml refuses files with longer ones."""
MAX_KEY = 65535
"""Bytes of a key, by the specification of GGUF."""
_ELSEWHERE = "choose another output file"


@dataclass(frozen=True, slots=True)
class _Part:
    """One file in the making. name: of it. header: its bytes up to the tensors. tensors: that follow."""

    name: str
    header: bytes
    tensors: tuple[TensorSpec, ...]


class GgufWriter:
    """A model in the making, for a `with` statement: the files appear when that ends, or nothing does.

    path         of the file; of a split model NAME.gguf, whose files are then called NAME-00001-of-00003.gguf ...
    metadata     keys and values, in the order of writing; those of splitting are added here
    tensors      every tensor that will be written, in that order
    split_bytes  bytes of tensors at which a file is closed (a single larger one gets a file of its own); None for one
                 file
    check        called with the first file, in a folder where all have the names that they will have, before any has
                 it; if it raises, nothing is left

    Raises OutputError for files that exist, for keys, names and shapes that no reader takes, for a disk that is too
    small, and while another process writes the same; AssertionError for tensors other than promised, a fault of ours.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Entry],
        tensors: Sequence[TensorSpec],
        *,
        split_bytes: int | None = None,
        check: Callable[[Path], object] | None = None,
    ) -> None:
        _check(path, metadata, tensors)
        self._alignment = _alignment(metadata)
        self._parts = _parts(path, metadata, tensors, split_bytes, self._alignment)
        self._path, self._verify = path, check
        self._refuse_existing()
        size = sum(_padded(spec.nbytes, self._alignment) for spec in tensors)
        check_disk(path.parent, size + sum(len(part.header) for part in self._parts))
        self._todo = [(part, spec) for part in self._parts for spec in part.tensors][::-1]
        self._begun: list[_Part] = []
        self._file: BinaryIO | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that will be there at the end, the first of a split model first."""
        return tuple(self._path.with_name(part.name) for part in self._parts)

    def __enter__(self) -> GgufWriter:
        self._made = [folder for folder in self._path.parents if not folder.exists()]
        with _named(self._path):
            try:
                self._partial.mkdir(parents=True, exist_ok=True)
                self._lock = locked(self._partial)
            except BaseException:
                self._remove_folders()
                raise
            for leftover in self._partial.glob("*.gguf"):  # of a run that was killed
                leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _named(self._path):
                    self._finish()
        finally:
            if self._file is not None:
                self._file.close()
            for part in self._begun:
                (self._partial / part.name).unlink(missing_ok=True)
            (self._partial / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._remove_folders()

    def _remove_folders(self) -> None:
        """What was made for the files goes, unless something is in it."""
        with contextlib.suppress(OSError):  # of a file that is not ours, or of the model
            for folder in (self._partial, *self._made):
                folder.rmdir()

    def write(self, name: str, raw: torch.Tensor) -> None:
        """Append one tensor, which must be the next one promised.

        raw: uint8 of the promised `TensorSpec.raw_shape`, on the CPU; one that is not contiguous is copied.
        """
        part, spec = self._todo.pop()
        if (name, raw.dtype, tuple(raw.shape)) != (spec.name, torch.uint8, spec.raw_shape):
            raise AssertionError(f"promised is {spec.name} {spec.raw_shape}, made {name} {raw.dtype} {[*raw.shape]}")
        with _named(self._path):
            file = self._of(part)
            file.write(raw.detach().contiguous().reshape(-1).numpy().data)
            file.write(bytes(-spec.nbytes % self._alignment))

    @property
    def _partial(self) -> Path:
        """The folder of files in the making."""
        return partial_folder(self._path)

    def _of(self, part: _Part) -> BinaryIO:
        """The open file of `part`, begun with its header where it is not yet; the one before is closed."""
        if self._file is None or self._begun[-1] is not part:
            self._close()
            self._begun.append(part)
            self._file = (self._partial / part.name).open("wb")
            self._file.write(part.header)
        return self._file

    def _close(self) -> None:
        """The open file is whole: bring it to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _finish(self) -> None:
        """Have the files checked, and move them to where they belong, the first one last; all or none."""
        if self._todo:
            raise AssertionError(f"{len(self._todo)} promised tensors were not written, first {self._todo[-1][1].name}")
        if not self._begun:  # metadata alone: a vocabulary
            self._of(self._parts[0])
        self._close()
        if self._verify is not None:
            self._verify(self._partial / self._parts[0].name)
        self._refuse_existing()  # somebody may have written them since
        moved: list[Path] = []
        try:
            for path in reversed(self.paths):
                (self._partial / path.name).replace(path)
                moved.append(path)
            sync(self._path.parent)
            moved.clear()
        finally:  # whatever stopped it, Ctrl+C too
            for path in moved:
                path.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        """Raise OutputError if one of the files is there already."""
        for path in self.paths:
            if path.exists() or path.is_symlink():
                raise OutputError(f"{path} exists already", _ELSEWHERE)


def write_hollow(path: Path, metadata: Mapping[str, Entry], tensors: Sequence[TensorSpec]) -> None:
    """A file with a whole header and a hole for its tensors, which takes no room on the disk: for who only counts.

    The path must be free. Raises OutputError as `GgufWriter` does.
    """
    _check(path, metadata, tensors)
    alignment = _alignment(metadata)
    (part,) = _parts(path, metadata, tensors, None, alignment)
    with _named(path), path.open("xb") as file:
        file.write(part.header)
        file.truncate(len(part.header) + sum(_padded(spec.nbytes, alignment) for spec in tensors))


def written_bytes(
    path: Path, metadata: Mapping[str, Entry], tensors: Sequence[TensorSpec], split_bytes: int | None = None
) -> int:
    """Bytes of all files that a `GgufWriter` with these arguments writes. Raises OutputError as it does for names."""
    _check(path, metadata, tensors)
    alignment = _alignment(metadata)
    parts = _parts(path, metadata, tensors, split_bytes, alignment)
    return sum(len(part.header) + sum(_padded(s.nbytes, alignment) for s in part.tensors) for part in parts)


def header_bytes(metadata: Mapping[str, Entry], tensors: Sequence[TensorSpec], alignment: int = ALIGNMENT) -> bytes:
    """The bytes of a file before its first tensor: metadata and the table, padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, entry in metadata.items():
        parts.append(encoded("string", key))
        if isinstance(entry, Array):
            parts += [struct.pack("<IIQ", ARRAY_ID, KINDS[entry.kind][0], len(entry)), bytes(entry.raw)]
        else:
            parts += [struct.pack("<I", KINDS[entry.kind][0]), entry.raw]
    offset = 0
    for spec in tensors:
        axes = len(spec.shape)
        parts.append(encoded("string", spec.name))
        parts.append(struct.pack(f"<I{axes}QIQ", axes, *spec.shape[::-1], spec.type.id, offset))
        offset += _padded(spec.nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _parts(
    path: Path, metadata: Mapping[str, Entry], tensors: Sequence[TensorSpec], split_bytes: int | None, alignment: int
) -> list[_Part]:
    """The files, by the arguments of `GgufWriter`: tensors in order, a file closed before it would become too large."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in tensors:
        if split_bytes is not None and groups[-1] and size + spec.nbytes > split_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += _padded(spec.nbytes, alignment)
    names = [path.name] if len(groups) == 1 else split_names(path, len(groups))
    parts = []
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        own = dict(metadata) if number == 0 else {k: v for k, v in metadata.items() if k == ALIGNMENT_KEY}
        if len(groups) > 1:
            own[SPLIT_NO] = Value("u16", number)
            own[SPLIT_COUNT] = Value("u16", len(groups))
            own[SPLIT_TENSORS] = Value("i32", len(tensors))
        try:
            header = header_bytes(own, group, alignment)
        except ValueError as error:
            raise OutputError(f"{path}: metadata that GGUF cannot hold: {error}", "correct it") from error
        parts.append(_Part(name, header, tuple(group)))
    return parts


def _check(path: Path, metadata: Mapping[str, Entry], tensors: Sequence[TensorSpec]) -> None:
    """Raise OutputError for what readers of the file would refuse."""
    if not path.name.endswith(".gguf"):
        raise OutputError(f"{path}: files of GGUF end with .gguf", _ELSEWHERE)
    for key in metadata:
        if not key or not key.isprintable() or len(key.encode()) > MAX_KEY or key.startswith("split."):
            raise OutputError(f"{path}: the key {key[:60]!r} cannot be written", "give it another name")
    seen: set[str] = set()
    for spec in tensors:
        reason = None
        if spec.name in seen:
            reason = "is there twice"
        elif not 0 < len(spec.name.encode()) <= MAX_TENSOR_NAME or not spec.name.isprintable():
            reason = f"has a name that llama.cpp refuses: at most {MAX_TENSOR_NAME} bytes, printable"
        elif not 0 < len(spec.shape) <= MAX_AXES or 0 in spec.shape:
            reason = f"has the shape {list(spec.shape)}, not 1 to {MAX_AXES} axes"
        elif spec.shape[-1] % spec.type.block:
            reason = f"has rows of {spec.shape[-1]}, no whole blocks of {spec.type.block} of {spec.type}"
        if reason is not None:
            raise OutputError(f"{path}: tensor {spec.name[:80]!r} {reason}", "choose another type for it")
        seen.add(spec.name)


def _alignment(metadata: Mapping[str, Entry]) -> int:
    """What tensors are aligned to: what the metadata says, if it is a power of two. Raises OutputError if not."""
    entry = metadata.get(ALIGNMENT_KEY, Value("u32", ALIGNMENT))
    value = entry.value if isinstance(entry, Value) and entry.kind == "u32" else 0
    if not isinstance(value, int) or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise OutputError(f"{ALIGNMENT_KEY} is {entry}, not a power of two in a u32", "leave it out")
    return value


def _padded(nbytes: int, alignment: int) -> int:
    """Bytes with the padding behind them."""
    return -(-nbytes // alignment) * alignment


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system in a `with` block become OutputError, which names the file."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, stays=False) from error
