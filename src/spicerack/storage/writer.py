"""Writes a folder of safetensors shards: streaming, atomic, resumable.

Everything happens in `OUT.partial`, which becomes `OUT` in one rename at the very end, so that no reader ever meets
half a folder. Inside it a finished shard is the progress record:

    1. its tensors stream into `<shard>.tmp`, header first (all shapes are known before a weight is read);
    2. its ledger entries go to `<shard>.ledger.json`;
    3. fsync, then the rename that makes the shard count.

When all shards are there, `finish` adds the side files, the index, the ledger and, last, config.json; `seal` clears the
progress records and renames. A run that is killed anywhere and started again continues from what is on disk. A
different recipe, model or version is refused by name instead of mixed in, and so is a second run while one is at work.
The format is written by hand because the safetensors library writes only what is in memory all at once; tests read
every shard back with that library.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from spicerack.errors import CheckpointError, OutputError
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.storage import ledger
from spicerack.storage.durable import (
    LOCK,
    disk_error,
    json_bytes,
    locked,
    read_json,
    refuse_other,
    sync,
    write_atomically,
)
from spicerack.storage.files import CONFIG, LEDGER
from spicerack.storage.ledger import Entry
from spicerack.storage.reader import BITS, Checkpoint

SHARD_BYTES = 2_000_000_000
"""Bytes at which shards are closed (a single larger tensor gets a shard of its own): what a crash can cost at most."""
_ELSEWHERE = "choose another output folder"
_PROGRESS = "progress.json"  # OUT.partial: whose it is
_AGAIN = "remove it to make it again"


def partial_folder(output: Path) -> Path:
    """Where `output` lies until it is whole: beside it, so that the last rename crosses no file system."""
    return output.with_name(output.name + ".partial")


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor that will be written, known before its numbers are.

    name    in the output
    dtype   as safetensors calls it ("BF16")
    shape   of the stored tensor
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk; types of less than a byte are packed."""
        return -(-math.prod(self.shape) * BITS[self.dtype] // 8)


@dataclass(frozen=True, slots=True)
class Unit:
    """What one source tensor becomes: never split over shards. No tensors: the tensor is dropped."""

    source: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the output and the units in it, in order."""

    file: str
    units: tuple[Unit, ...]


_DIFFUSERS = "diffusion_pytorch_model"
"""How the names of diffusers' weight files begin."""


def shards_of(units: Sequence[Unit], shard_bytes: int = SHARD_BYTES, stem: str = "model") -> tuple[Shard, ...]:
    """Units dealt to shards, in order; one is called `model.safetensors`, several are numbered as transformers does.

    units: what source tensors become, in the source's order. shard_bytes: no shard's tensors are larger together, but
    for one that holds a single unit. stem: in place of `model`, see `stem_of`. The deal depends on these alone, so that
    a resumed run makes the same files.
    """
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if size and size + unit.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    if len(groups) == 1:
        return (Shard(f"{stem}.safetensors", tuple(groups[0])),)
    return tuple(Shard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for i, g in enumerate(groups, 1))


def stem_of(shards: Iterable[str]) -> str:
    """What the files of a model's shards are called in its output: as diffusers' classes look for them where the source
    has its names, else as transformers does."""
    return _DIFFUSERS if any(name.startswith(_DIFFUSERS) for name in shards) else "model"


class Writer:
    """One output folder in the making: `pending`/`shard` until all are there, then `finish`, then `seal`.

    output      the folder that will appear; `partial` is where it lies until then
    shards      what will be in it
    identity    facts, of values that JSON has, that must be equal for a resumed run to continue this folder (recipe,
                source, versions)
    side_bytes  of side files, for the disk to have room for
    lasting     what is written stays if something fails, for the same command to continue: errors say so

    resumed: an earlier run left finished shards. complete: it left everything but the final rename. Raises OutputError
    if OUT exists or cannot be a folder, if OUT.partial belongs to something else or is being written, or if the disk is
    too small.
    """

    def __init__(
        self, output: Path, shards: Sequence[Shard], identity: Mapping[str, Any], side_bytes: int = 0, *,
        lasting: bool = True,
    ) -> None:  # fmt: skip
        refuse_place(output)
        self._lasting = lasting
        self.output = output
        self.partial = partial_folder(output)
        self.shards = tuple(shards)
        self._begin(dict(identity), side_bytes)

    def _begin(self, identity: dict[str, Any], side_bytes: int) -> None:
        """Take the folder into possession: checks first, then the lock, then what an earlier run left half-done goes.

        identity: the facts of this run, which are written down before its first shard. Raises as the class says.
        """
        refuse_existing(self.output, identity)
        record = self.partial / _PROGRESS
        if self.partial.exists():
            before = read_json(record) or (read_json(self.partial / LEDGER) or {}).get("identity")
            if before is None and any(p.name != LOCK for p in self.partial.iterdir()):
                raise OutputError(f"{self.partial} exists and is not ours", "remove it or choose another output folder")
            if before is not None:
                refuse_other(self.partial, before, identity)
        self.complete = (self.partial / CONFIG).exists()
        self.resumed = self.complete or any((self.partial / shard.file).exists() for shard in self.shards)
        missing = sum(u.nbytes for s in self.shards for u in s.units if not (self.partial / s.file).exists())
        check_disk(self.output.parent, missing + side_bytes)
        self._made = [p for p in (self.partial, *self.partial.parents) if not p.exists()]
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be made: {error.strerror}", _ELSEWHERE) from error
        self._unlock = weakref.finalize(self, os.close, locked(self.partial))
        try:
            for leftover in self.partial.glob("*.tmp"):
                leftover.unlink()
            if not self.complete:
                write_atomically(record, json_bytes(identity))
        except OSError as error:
            self.discard()
            raise disk_error(error, self.partial, stays=False) from error

    def discard(self) -> None:
        """Take back that the folder was begun, with parents that were made for it: for runs that are refused before
        anything in it is worth to be kept. A folder that was there before stays."""
        self._unlock()
        if self.partial in self._made:
            shutil.rmtree(self.partial, ignore_errors=True)
            for folder in self._made[1:]:
                with suppress(OSError):  # somebody else's files are in it by now
                    folder.rmdir()

    def pending(self) -> Iterator[Shard]:
        """Shards that are not on disk yet, in order; asked anew each time, so that it shrinks as shards are written."""
        return (shard for shard in self.shards if not (self.partial / shard.file).exists())

    @contextmanager
    def shard(self, shard: Shard) -> Iterator[ShardWriter]:
        """Write one shard in a `with` statement; it counts once that ends without an exception. Raises OutputError.

        An error of the system becomes one that names the folder; the shard's temporary file stays, and the next run
        removes it.
        """
        temporary = self.partial / (shard.file + ".tmp")
        try:
            with temporary.open("wb") as file:
                writer = ShardWriter(file, shard)
                yield writer
                writer.finish()
                file.flush()
                os.fsync(file.fileno())
            # before the shard has its name: a shard that counts has its entries
            write_atomically(self._ledger_of(shard), json_bytes([entry.as_dict() for entry in writer.entries]))
            temporary.replace(self.partial / shard.file)
            sync(self.partial)
        except OSError as error:
            raise disk_error(error, self.partial, stays=self._lasting) from error

    def _ledger_of(self, shard: Shard) -> Path:
        """The file beside a shard that holds its ledger entries until the folder is whole."""
        return self.partial / (shard.file + ".ledger.json")

    def entries(self) -> tuple[Entry, ...]:
        """Ledger entries of all shards, in order, from disk: the same whether or not the run was interrupted."""
        return tuple(Entry.of(record) for shard in self.shards for record in read_json(self._ledger_of(shard)) or [])

    def finish(self, files: Mapping[str, bytes], source: Path, side_files: Iterable[str]) -> None:
        """Copy the side files, write the index, then `files` in order; the last, config.json, completes the folder.

        files        name -> content, in the order of writing
        source       the folder that the side files are copied from
        side_files   their names, relative, '/'-separated

        Without config.json nobody loads a folder, so that one that was cut off here is taken up again. Raises
        OutputError for errors of the system.
        """
        if list(files)[-1] != CONFIG:
            raise AssertionError("config.json must be the last file")
        try:
            for name in side_files:
                target = self.partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target)
            if len(self.shards) > 1:
                name = f"{stem_of(shard.file for shard in self.shards)}.safetensors.index.json"
                write_atomically(self.partial / name, json_bytes(index_of(self.shards)))
            for name, content in files.items():
                write_atomically(self.partial / name, content)
        except OSError as error:
            raise disk_error(error, self.partial, stays=self._lasting) from error

    def seal(self) -> None:
        """Clear the progress records and make OUT appear, by one rename. Needs a complete folder; raises OutputError
        for errors of the system."""
        try:
            for leftover in [*self.partial.glob("*.ledger.json"), self.partial / _PROGRESS, self.partial / LOCK]:
                leftover.unlink(missing_ok=True)
            sync(self.partial)
            self._unlock()
            self.partial.replace(self.output)
            sync(self.output.parent)
        except OSError as error:
            raise disk_error(error, self.partial, stays=self._lasting) from error


class ShardWriter:
    """One shard in the making: the header first, then tensors in the order that it promised.

    file: open for writing, at its beginning. shard: its units. entries: those of the ledger, which whoever writes
    tensors appends for each unit.

    The header is padded with spaces to a multiple of eight bytes, as safetensors itself does, so that tensors lie
    aligned.
    """

    def __init__(self, file: BinaryIO, shard: Shard) -> None:
        self._file = file
        self._todo = [tensor for unit in shard.units for tensor in unit.tensors]
        self.entries: list[Entry] = []
        file.write(header_bytes(shard))
        self._todo.reverse()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor; it must be the next one promised, in name, type and shape, else AssertionError: a fault of
        ours.

        tensor: on the CPU; one that is not contiguous is copied.
        """
        promised = self._todo.pop()
        offered = OutputTensor(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        if offered != promised:
            raise AssertionError(f"the layout promised {promised}, the encoder made {offered}")
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Nothing that the header promised is missing."""
        if self._todo:
            raise AssertionError(f"{len(self._todo)} promised tensors were not written, first {self._todo[-1].name}")


def header_bytes(shard: Shard) -> bytes:
    """What stands before the tensors of a shard: its length and the header, padded."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in (tensor for unit in shard.units for tensor in unit.tensors):
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The index as transformers writes it: which shard holds which tensor."""
    weight_map = {t.name: shard.file for shard in shards for unit in shard.units for t in unit.tensors}
    total = sum(unit.nbytes for shard in shards for unit in shard.units)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def refuse_place(output: Path) -> None:
    """Raise OutputError if no folder can be made at `output`, whatever is written into it.

    It has no name of its own, begins with the home of nobody, leads through a file, is a link to nothing, is longer
    than the file system takes, or lies where this process may not write.
    """
    reason = None
    try:
        above = next((parent for parent in output.parents if parent.exists()), Path())
        if not output.name:
            reason = "it has no name that a folder could be made under"
        elif output.parts[0].startswith("~"):
            reason = f"there is no user {output.parts[0]}"
        elif not above.is_dir():
            reason = f"{above} is a file"
        elif output.is_symlink() and not output.exists():
            reason = "it is a link to nothing"
        elif not os.access(above, os.W_OK):
            reason = f"nothing may be written in {above}"
        else:
            partial_folder(output).exists()  # names that are too long are refused by the system
            if "\0" in str(output):
                reason = "its name has a zero byte"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise OutputError(f"no folder can be made at {str(output)!r}: {reason}", _ELSEWHERE)


def refuse_existing(output: Path, identity: Mapping[str, Any]) -> None:
    """Raise OutputError if `output` exists: a finished folder is never overwritten.

    The error says which it is: of another tool, of another run (and what differs), or of this very run, finished
    already.
    """
    if not output.exists():
        return
    _refuse_other_origin(output, identity)
    raise OutputError(f"{output} is finished already, from the same model and recipe", _AGAIN)


def is_finished(output: Path, shards: Sequence[Shard], side_files: Iterable[str], identity: Mapping[str, Any]) -> bool:
    """Whether `output` is the whole result of this very run already; False where there is nothing of that name.

    output       the folder, or where one would be
    shards       what would be in it
    side_files   names of what would lie beside them
    identity     facts in which it must agree, as of `Writer`

    Looked at are headers, not weights. Raises OutputError for anything else: what another tool or another run wrote,
    and what this run wrote and somebody changed since, naming what differs.
    """
    refuse_place(output)
    if not output.exists():
        return False
    _refuse_other_origin(output, identity)
    try:
        tensors = Checkpoint.open(output).tensors
    except CheckpointError as error:
        raise OutputError(f"{output} is from this command, but damaged: {error.message}", _AGAIN) from error
    there = {(info.name, info.dtype, info.shape) for info in tensors.values()}
    wanted = {(t.name, t.dtype, t.shape) for shard in shards for unit in shard.units for t in unit.tensors}
    missing = [name for name in side_files if not (output / name).is_file()]
    missing += sorted(name for name, _, _ in wanted ^ there)
    if missing:
        raise OutputError(f"{output} is from this command, but changed since: {missing[0]} is not as written", _AGAIN)
    return True


def _refuse_other_origin(output: Path, identity: Mapping[str, Any]) -> None:
    """Raise OutputError for a folder that exists and has no ledger of ours, or that of another run, naming what
    differs."""
    try:
        written = ledger.read(output)
    except CheckpointError:
        written = None
    if written is None:
        raise OutputError(f"{output} exists and is not a folder that spicerack wrote", _ELSEWHERE)
    refuse_other(output, written.identity, identity)


def check_disk(folder: Path, needed: int) -> None:
    """Raise OutputError unless the disk under `folder`, which need not exist yet, has room for `needed` bytes.

    Asked before the first byte is written, about what is missing: a disk that fills up later is told when it happens.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder} has {free / 1e9:.2f} GB free; the output takes {needed / 1e9:.2f} GB", "free some space"
        )
