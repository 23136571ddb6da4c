"""What was written, read back before it gets its name: by the engine's own reader where that is installed.

Every weight is compared, a tensor at a time, exactly; floats must be the bytes that they were. Most readers give the
integers, scales and minima that their numbers are made of, all of which are compared, and decode some rows themselves
(`readings.sampled`): these must be what our codes stand for, in the type that the reader decodes into. Others decode
all rows. The first difference raises, and nothing is left of the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from spicerack import plugins
from spicerack.errors import OutputError, SpicerackError
from spicerack.exports import equality
from spicerack.exports.readings import Grid, Rows, Stack, Weights, sampled
from spicerack.exports.source import Source
from spicerack.machine.memory import steady
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.format import StoredTensor
from spicerack.storage.reader import TensorInfo

_FAULT = "this is a fault of spicerack or of the reader: please report it"


class Reader(Protocol):
    """Somebody who reads what a target writes: an engine's own code, or code that shares nothing with the writer."""

    @property
    def name(self) -> str:
        """Who it is, with the version, as people and ledgers are told."""

    @property
    def foreign(self) -> bool:
        """Whether it is the engine's own code: such are preferred."""

    def obstacle(self, to: str, source: Source, /) -> str | None:
        """Why it cannot read what is written of this model under the name `to`: another format, or what it needs is not
        installed. None if it can."""

    def opened(self, path: Path, source: Source, /) -> Weights:
        """What was written at `path`, for one tensor at a time."""


def choose(to: str, source: Source) -> Reader | None:
    """The reader that is asked: the engine's own if it is here; None if there is none at all."""
    readers: list[Reader] = [
        plugins.get("exports.readers", name, "READER") for name in plugins.names("exports.readers")
    ]
    able = [reader for reader in readers if reader.obstacle(to, source) is None]
    return min(able, key=lambda reader: not reader.foreign, default=None)


def verify(reader: Reader, source: Source, path: Path) -> None:
    """Compare every tensor of `source` with what `reader` reads at `path`. Raises OutputError naming the first that
    differs, how much and where."""
    weights, who = reader.opened(path, source), reader.name
    for tensor in steady(source.order()):
        name = f"{tensor.module}.weight" if isinstance(tensor, StoredTensor) else tensor.name
        try:
            read = weights(name)
        except KeyError as error:
            raise OutputError(f"{name} is not in what was written, as {who} reads it", _FAULT) from error
        except SpicerackError:
            raise
        except Exception as error:  # somebody else's code: whatever it raises, it does not read this
            raise OutputError(f"{name}: {who} does not read it: {error!r}", _FAULT) from error
        if isinstance(tensor, TensorInfo):
            assert not isinstance(read, Grid | Stack), "floats are read as floats"
            _compare(name, iter((source.float(name),)), read, who)
        elif isinstance(read, Stack):
            for number, matrix in enumerate(source.matrices(tensor.module)):
                _compare_packed(f"{name}, expert {number}", matrix, read.matrix(number), who)
        else:
            _compare_packed(name, source.either(tensor.module), read, who)
        source.release(tensor)


def _compare_packed(name: str, value: QTensor | Undecoded, read: torch.Tensor | Grid | Rows, who: str) -> None:
    """Raise OutputError unless a packed tensor is what was read of it."""
    if isinstance(read, Grid):
        if (part := equality.different(value, read)) is not None:
            raise OutputError(f"{name}: {who} reads other {part}", _FAULT)
        _compare_samples(name, value, read.samples, who)
    elif isinstance(read, Rows) and read.parts is not None:
        if not equality.same_parts(value, read.parts):
            parts = codec.decode(replace(read.parts.qtensor(), transposed=False))
            _compare(name, equality.pieces(equality.decoded(value)), parts, who)
            raise OutputError(f"{name}: {who} reads other scales", _FAULT)
        pieces = sampled(name, read.parts.shape)
        _compare_samples(name, value, [(start, read.decoded(start, stop)) for start, stop in pieces], who)
    else:
        _compare(name, equality.pieces(equality.decoded(value)), read, who)


def _compare_samples(name: str, q: QTensor | Undecoded, samples: Iterable[tuple[int, torch.Tensor]], who: str) -> None:
    """Raise OutputError unless rows of q are what was read of them: the first one's number, and values [R, K]."""
    for start, values in samples:
        rows = codec.decode(equality.decoded(equality.rows_of(q, start, start + len(values))))
        _compare(name, iter((rows,)), values, who, start * rows.shape[1])


def _compare(name: str, pieces: Iterator[torch.Tensor], read: torch.Tensor | Rows, who: str, first: int = 0) -> None:
    """Raise OutputError unless the pieces, in the type that was read, are what was read, in order.

    first: where in the tensor the first number is.
    """
    start = rows = 0
    for piece in pieces:
        if isinstance(read, Rows):
            part = read.decoded(rows, rows + len(piece)).reshape(-1)
        else:
            part = read.reshape(-1)[start : start + piece.numel()]
        wanted = piece.reshape(-1).to(part.dtype)
        if part.shape != wanted.shape or not (torch.equal(part, wanted) or _same_bytes(part, wanted)):
            raise OutputError(f"{name}: {who} reads {_difference(part, wanted, first + start)}", _FAULT)
        start, rows = start + wanted.numel(), rows + len(piece)
    if (rows != read.count) if isinstance(read, Rows) else (start != read.numel()):
        raise OutputError(f"{name}: {who} reads more than the {start} numbers that were to be written", _FAULT)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one type have the same bytes: floats of a stranger's model may be no numbers."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _difference(part: torch.Tensor, wanted: torch.Tensor, start: int) -> str:
    """What differs first, for an error."""
    if part.shape != wanted.shape:
        return f"{start + part.numel()} numbers, and too few"
    at = int((part != wanted).nonzero()[0])
    return f"{float(part[at])} at {start + at}, where {float(wanted[at])} was to be written"


def facts(reader: Reader | None) -> Mapping[str, Any]:
    """What the ledger says of who read back."""
    return {"verified_by": None if reader is None else reader.name}
