"""Metadata of GGUF files: keys with typed values. A value keeps the type it has in the file, so that it can go back.

Scalars are a `Value`. Arrays are an `Array`, which holds the bytes of its items as the file has them and reads one when
it is asked for: a vocabulary of a quarter of a million tokens costs eight bytes a token until somebody wants them.
`Metadata` is the mapping of all, with accessors that say by name what is missing or of another type.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from spicerack.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

KINDS: dict[str, tuple[int, str]] = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"),
    "bool": (7, "?"), "string": (8, ""), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip
"""Type of a value -> (its number in files, how `struct` reads it); strings are a length of eight bytes and UTF-8."""
KIND_BY_ID: dict[int, str] = {number: kind for kind, (number, _) in KINDS.items()}
ARRAY_ID = 9
"""The number of arrays in files: the type of their items follows, then how many, then they."""
INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")
_REMEDY = "fetch the file again, or convert the model anew"

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Value:
    """One value that is no array: `kind` is a key of KINDS, `value` what it is. f32 are given as float, exactly."""

    kind: str
    value: Scalar

    @property
    def raw(self) -> bytes:
        """The bytes of the value in a file. Raises ValueError for one that its type cannot hold."""
        return encoded(self.kind, self.value)


class Array(Sequence[Scalar]):
    """Items of one type, as the bytes that a file has for them.

    kind    type of an item, a key of KINDS
    raw     their bytes, one behind the other
    starts  of strings: where each begins in `raw`; None for others
    where   what errors begin with: file and key
    """

    __slots__ = ("_count", "_starts", "kind", "raw", "where")

    def __init__(self, kind: str, raw: memoryview, count: int, starts: array[int] | None, where: str = "") -> None:
        self.kind, self.raw, self.where = kind, raw, where
        self._count, self._starts = count, starts

    @classmethod
    def of(cls, kind: str, items: Iterable[Scalar]) -> Array:
        """An Array of these items, in memory. Raises ValueError for one that the type cannot hold."""
        parts = [encoded(kind, item) for item in items]
        starts = None
        if kind == "string":
            starts, at = array("Q"), 0
            for part in parts:
                starts.append(at)
                at += len(part)
        return cls(kind, memoryview(b"".join(parts)), len(parts), starts)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | list[Scalar]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._item(index % self._count)

    def __iter__(self) -> Iterator[Scalar]:
        return map(self._item, range(self._count))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and (self.kind, self._count, self.raw) == (other.kind, len(other), other.raw)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Array({self.kind}, {self._count} items)"

    def numpy(self) -> np.ndarray[Any, Any]:
        """The items of a type that is no string, [count], sharing the file's memory where they may not be written."""
        import numpy as np

        return np.frombuffer(self.raw, dtype=np.dtype(KINDS[self.kind][1]).newbyteorder("<"), count=self._count)

    def strings(self) -> list[str]:
        """All items of an array of strings. Raises CheckpointError for another type, and for what is no UTF-8."""
        if self.kind != "string":
            raise CheckpointError(f"{self.where} is an array of {self.kind}, not of strings", _REMEDY)
        return [str(item) for item in self]

    def _item(self, index: int) -> Scalar:
        """One item, `index` from 0 on. Raises CheckpointError for a string that is no UTF-8."""
        if self._starts is None:
            code = KINDS[self.kind][1]
            value: Scalar = struct.unpack_from("<" + code, self.raw, index * struct.calcsize(code))[0]
            return value
        start = self._starts[index]
        (length,) = struct.unpack_from("<Q", self.raw, start)
        return decoded_text(self.raw[start + 8 : start + 8 + length], f"{self.where}[{index}]")


Entry = Value | Array


class Metadata(Mapping[str, Entry]):
    """Keys and values of a file, in its order, with accessors by the type that the caller needs.

    The accessors return `default` for a key that is not there, and without one raise CheckpointError, naming file and
    key; they raise it for a value of another type, too.
    """

    def __init__(self, entries: Mapping[str, Entry], where: str = "metadata") -> None:
        self._entries, self.where = dict(entries), where

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of any of the integer types."""
        value = self._scalar(key, INTEGERS, default, "an integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, whole or not."""
        value = float(self._scalar(key, (*INTEGERS, "f32", "f64"), default, "a number"))
        if not math.isfinite(value):
            raise CheckpointError(f"{self.where}: {key} is {value}", _REMEDY)
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return bool(self._scalar(key, ("bool",), default, "true or false"))

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return str(self._scalar(key, ("string",), default, "a string"))

    def array(self, key: str, *kinds: str) -> Array:
        """An array whose items are of one of `kinds` (any, if none is given)."""
        entry = self._entries.get(key)
        if entry is None:
            raise CheckpointError(f"{self.where}: {key} is missing", _REMEDY)
        if not isinstance(entry, Array) or (kinds and entry.kind not in kinds):
            raise CheckpointError(
                f"{self.where}: {key} is {_kind(entry)}, not an array of {' or '.join(kinds)}", _REMEDY
            )
        return entry

    def _scalar(self, key: str, kinds: Sequence[str], default: Any, wanted: str) -> Any:
        """The value of `key`, of one of `kinds`; `default` where there is none, if it is not None."""
        entry = self._entries.get(key)
        if entry is None:
            if default is None:
                raise CheckpointError(f"{self.where}: {key} is missing", _REMEDY)
            return default
        if not isinstance(entry, Value) or entry.kind not in kinds:
            raise CheckpointError(f"{self.where}: {key} is {_kind(entry)}, not {wanted}", _REMEDY)
        return entry.value


def encoded(kind: str, value: Scalar) -> bytes:
    """The bytes of a value of type `kind` in a file. Raises ValueError, naming both, for one that it cannot hold."""
    if kind == "string":
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no string")
        try:
            text = value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{value!r} is no text that UTF-8 holds") from error
        return struct.pack("<Q", len(text)) + text
    if isinstance(value, str) or (isinstance(value, bool) != (kind == "bool")):
        raise ValueError(f"{value!r} is no {kind}")
    try:
        return struct.pack("<" + KINDS[kind][1], value)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{value!r} is no {kind}") from error


def decoded_text(raw: memoryview | bytes, where: str) -> str:
    """The text of UTF-8 bytes. Raises CheckpointError, beginning with `where`, for bytes that are none."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not text in UTF-8: {error.reason}", _REMEDY) from error


def _kind(entry: Entry) -> str:
    """What an entry is, for messages."""
    return f"an array of {entry.kind}" if isinstance(entry, Array) else f"{entry.kind} {str(entry.value)[:60]!r}"
