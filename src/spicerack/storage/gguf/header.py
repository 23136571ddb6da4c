"""The header of one GGUF file: metadata and the table of tensors, every number in it checked before it is used.

    "GGUF", u32 version, u64 tensors, u64 keys
    keys: string key, u32 type, value            type 9: u32 type of the items, u64 how many, the items
    tensors: string name, u32 dimensions, u64 of each (those of a row first), u32 type, u64 offset
    padding to a multiple of general.alignment, then the tensors' bytes, to which offsets are relative

A string is a u64 length and UTF-8. All is little endian. Versions 2 and 3 are the same but for files of big-endian
machines, which are refused, as is version 1, whose lengths have four bytes.

A file is mapped and looked at, not read: what is kept of a vocabulary is where its strings begin. Nothing is reserved
by a number that a file gives before the file is known to be long enough for it; the limits below, far above every model
that there is, bound the time that a hostile file can take.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spicerack.errors import CheckpointError
from spicerack.storage.gguf.ggml import BY_ID, TensorSpec
from spicerack.storage.gguf.metadata import ARRAY_ID, KIND_BY_ID, KINDS, Array, Entry, Value, decoded_text

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
ALIGNMENT = 32
"""Of tensors where the metadata says nothing."""
MAX_ALIGNMENT = 1 << 16
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_ITEMS = 1 << 22
"""Of all arrays together; the largest vocabularies have a quarter of a million tokens, and merges twice as many."""
MAX_TEXT = 1 << 27
"""Bytes of a string: some files have a tokenizer.json in one."""
MAX_NAME = 1000
"""Bytes of a key or of a tensor's name, which errors print."""
MAX_AXES = 4
"""ggml has no more."""
_DAMAGED = "the file is damaged or incomplete: fetch it again"
_STRANGE = "do not trust this file"


@dataclass(frozen=True, slots=True)
class GgufTensor(TensorSpec):
    """A tensor of a file: file is the one that holds it, by name; begin is where in that file its bytes begin."""

    file: str
    begin: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says. entries: its metadata, in its order. tensors: its table, in its order. version: of GGUF."""

    entries: dict[str, Entry]
    tensors: tuple[GgufTensor, ...]
    version: int


def read_header(path: Path) -> Header:
    """The header of the file at `path`; no tensor is read.

    Raises CheckpointError, naming file, key or tensor and what is wrong: whatever is no GGUF file, is cut off, gives
    lengths, counts, types or offsets that cannot be, has a key or a tensor twice, or tensors that overlap.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file", "give the name of a .gguf file")
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}", _DAMAGED)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", _DAMAGED) from error
    return _Parser(memoryview(mapping), path).header()


class _Parser:
    """A place in the bytes of a file, which moves on as they are read; errors begin with the file and what is read."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self._data, self._path, self._at, self._where, self._items = data, path, len(MAGIC), str(path), 0

    def header(self) -> Header:
        """See `read_header`."""
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            kind = "is of a big-endian machine" if swapped else f"has version {version} of GGUF"
            raise CheckpointError(f"{self._path} {kind}; versions 2 and 3 are read", "convert the model anew")
        tensors = self._count("Q", MAX_TENSORS, 33, "tensors")
        keys = self._count("Q", MAX_KEYS, 13, "keys")
        entries: dict[str, Entry] = {}
        for _ in range(keys):
            key = self._name("a key")
            self._where = f"{self._path}: {key}"
            if key in entries:
                raise self._refused("is there twice", _STRANGE)
            entries[key] = self._entry()
        specs = [self._spec() for _ in range(tensors)]
        start = self._padded(self._at, self._alignment(entries))
        return Header(entries, self._placed(specs, start, self._alignment(entries)), version)

    # ---- metadata ----------------------------------------------------------------------------------------------------

    def _entry(self) -> Entry:
        """The value of a key: its type, and then itself."""
        number = self._number("I")
        if number == ARRAY_ID:
            return self._array()
        kind = self._kind(number)
        if kind == "string":
            return Value(kind, decoded_text(self._text(MAX_TEXT), self._where))
        if kind == "bool" and self._peek() > 1:
            raise self._refused(f"is neither true nor false but {self._peek()}")
        return Value(kind, self._number(KINDS[kind][1]))

    def _array(self) -> Array:
        """An array of numbers or strings: only strings are walked over, to find where they end."""
        number = self._number("I")
        if number == ARRAY_ID:
            raise self._refused("is an array of arrays, which is not read", "convert the model anew")
        kind = self._kind(number)
        size = 8 if kind == "string" else struct.calcsize(KINDS[kind][1])
        count = self._count("Q", MAX_ITEMS - self._items, size, "items")
        self._items += count
        begin, starts = self._at, None
        if kind == "string":
            starts = self._walk(count)
        else:
            self._take(count * size)
        raw = self._data[begin : self._at]
        if kind == "bool" and max(raw, default=0) > 1:
            raise self._refused("has items that are neither true nor false")
        return Array(kind, raw, count, starts, self._where)

    def _walk(self, count: int) -> array[int]:
        """Pass so many strings -> where each begins, from the first on. Half a microsecond each: no call for one."""
        length, begin, starts = struct.Struct("<Q"), self._at, array("Q")
        at, end = begin, len(self._data)
        for _ in range(count):
            starts.append(at - begin)
            at += 8 + (length.unpack_from(self._data, at)[0] if at + 8 <= end else 0)
            if at > end:
                self._at = begin + starts[-1]
                raise self._refused(f"has a string at byte {self._at} that is longer than the file")
        self._at = at
        return starts

    def _kind(self, number: int) -> str:
        """The type that a file gives as a number."""
        if number not in KIND_BY_ID:
            raise self._refused(f"has the unknown type {number}", "update spicerack")
        return KIND_BY_ID[number]

    def _alignment(self, entries: dict[str, Entry]) -> int:
        """What tensors are aligned to: a power of two."""
        entry = entries.get(ALIGNMENT_KEY, Value("u32", ALIGNMENT))
        value = entry.value if isinstance(entry, Value) and entry.kind == "u32" else 0
        if not isinstance(value, int) or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            given = str(entry)[:80]  # a string may be as long as the file
            raise CheckpointError(f"{self._path}: {ALIGNMENT_KEY} is {given}, not a power of two in a u32", _STRANGE)
        return value

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def _spec(self) -> tuple[TensorSpec, int]:
        """An entry of the table: the tensor, and its offset."""
        self._where = str(self._path)
        name = self._name("a tensor's name")
        self._where = f"{self._path}: tensor {name}"
        axes = self._number("I")
        if not 0 < axes <= MAX_AXES:
            raise self._refused(f"has {axes} dimensions, not 1 to {MAX_AXES}")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        number, offset = self._number("I"), self._number("Q")
        if number not in BY_ID:
            raise self._refused(f"has the unknown type {number}", "update spicerack")
        spec = TensorSpec(name, BY_ID[number], shape)
        if 0 in shape:
            raise self._refused(f"has the shape {list(shape)}")
        if shape[-1] % spec.type.block:
            raise self._refused(f"has rows of {shape[-1]}, no whole blocks of {spec.type.block} of {spec.type}")
        if math.prod(shape) > len(self._data) * spec.type.block:  # a block has a byte at least
            raise self._refused(f"has the shape {list(shape)}, more than the file has bytes for")
        return spec, offset

    def _placed(self, specs: Sequence[tuple[TensorSpec, int]], start: int, alignment: int) -> tuple[GgufTensor, ...]:
        """The table, once every tensor lies aligned in the file, and none on another."""
        placed: dict[str, GgufTensor] = {}
        for spec, offset in specs:
            self._where = f"{self._path}: tensor {spec.name}"
            if spec.name in placed:
                raise self._refused("is there twice", _STRANGE)
            if offset % alignment:
                raise self._refused(f"begins at {offset}, no multiple of {alignment}", _STRANGE)
            if start + offset + spec.nbytes > len(self._data):
                raise self._refused(
                    f"ends at byte {start + offset + spec.nbytes}, the file has {len(self._data)}", _DAMAGED
                )
            placed[spec.name] = GgufTensor(spec.name, spec.type, spec.shape, self._path.name, start + offset)
        ordered = sorted(placed.values(), key=lambda tensor: tensor.begin)
        for one, other in itertools.pairwise(ordered):
            if one.begin + one.nbytes > other.begin:
                raise CheckpointError(f"{self._path}: tensors {one.name} and {other.name} overlap", _STRANGE)
        return tuple(placed.values())

    # ---- numbers and texts -------------------------------------------------------------------------------------------

    def _take(self, count: int) -> memoryview:
        """The next `count` bytes, of which none is copied."""
        if count > len(self._data) - self._at:
            raise CheckpointError(
                f"{self._where}: {count} bytes are promised at byte {self._at}, the file has {len(self._data)}",
                _DAMAGED,
            )
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def _number(self, code: str) -> int:
        """A number as `struct` reads it by `code`; of floats a float, of bools a bool."""
        value: int = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _peek(self) -> int:
        """The next byte, which stays the next."""
        at = self._at
        (value,) = self._take(1)
        self._at = at
        return value

    def _count(self, code: str, most: int, size: int, noun: str) -> int:
        """How many things follow that have `size` bytes each at least; refused where the file is too short for them."""
        count = self._number(code)
        if count > most or count * size > len(self._data) - self._at:
            raise CheckpointError(f"{self._where}: {count} {noun}, more than are read or the file has", _STRANGE)
        return count

    def _text(self, most: int) -> memoryview:
        """The bytes of a string."""
        length = self._number("Q")
        if length > most:
            raise CheckpointError(f"{self._where}: a string of {length} bytes; at most {most} are read", _STRANGE)
        return self._take(length)

    def _name(self, noun: str) -> str:
        """A key, or a tensor's name: short, and printable."""
        text = decoded_text(self._text(MAX_NAME), f"{self._where}: {noun}")
        if not text or not text.isprintable():
            raise CheckpointError(f"{self._where}: {noun} is {text[:60]!r}: empty or not printable", _STRANGE)
        return text

    @staticmethod
    def _padded(at: int, alignment: int) -> int:
        """The next multiple of `alignment`."""
        return -(-at // alignment) * alignment

    def _refused(self, reason: str, remedy: str = _DAMAGED) -> CheckpointError:
        """What is raised for the key or tensor that is being read."""
        return CheckpointError(f"{self._where} {reason}", remedy)
