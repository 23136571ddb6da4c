"""What was written, read back before it gets its name: by the engine's own reader where that is installed.

Every weight is compared, a tensor at a time: what a reader decodes must be what our codes stand for, exactly, in the
type that it decodes into; floats must be the bytes that they were. The first difference raises, and nothing is left of
the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from spicerack import plugins
from spicerack.errors import OutputError
from spicerack.exports.source import Source
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.storage.format import StoredTensor

Weights = Callable[[str], torch.Tensor]
"""Name of a tensor in the source (`X.weight` of what is packed) -> its values, [.., N, K] in a float type; a float
tensor as it is stored. Raises KeyError for one that is not there."""
_ROWS = 1 << 22
"""Weights that are compared at a time: 16 MB of float32 beside the tensor itself."""
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

    def opened(self, path: Path, to: str, source: Source, /) -> Weights:
        """What was written at `path` under the name `to`, for one tensor at a time."""


def choose(to: str, source: Source) -> Reader | None:
    """The reader that is asked: the engine's own if it is here; None if there is none at all."""
    readers: list[Reader] = [
        plugins.get("exports.readers", name, "READER") for name in plugins.names("exports.readers")
    ]
    able = [reader for reader in readers if reader.obstacle(to, source) is None]
    return min(able, key=lambda reader: not reader.foreign, default=None)


def verify(reader: Reader, to: str, source: Source, path: Path) -> None:
    """Compare every tensor of `source` with what `reader` reads at `path`. Raises OutputError naming the first that
    differs, how much and where."""
    weights = reader.opened(path, to, source)
    for tensor, value in source.walk():
        if isinstance(tensor, StoredTensor):
            assert isinstance(value, QTensor)
            name, pieces = f"{tensor.module}.weight", _pieces(value)
        else:
            assert isinstance(value, torch.Tensor)
            name, pieces = tensor.name, iter((value,))
        try:
            read = weights(name)
        except KeyError as error:
            raise OutputError(f"{name} is not in what was written, as {reader.name} reads it", _FAULT) from error
        _compare(name, pieces, read, reader.name)


def _pieces(q: QTensor) -> Iterator[torch.Tensor]:
    """The decoded weights [R, K], rows after rows, in float32."""
    *_, n, k = q.shape
    rows = q.scheme.group_shape(n, k)[0]
    return codec.decode_rows(q, max(_ROWS // k // rows, 1) * rows)


def _compare(name: str, pieces: Iterator[torch.Tensor], read: torch.Tensor, who: str) -> None:
    """Raise OutputError unless the pieces, in the type that was read, are what was read, in order."""
    start = 0
    for piece in pieces:
        wanted = piece.reshape(-1).to(read.dtype)
        part = read.reshape(-1)[start : start + wanted.numel()]
        if part.shape != wanted.shape or not torch.equal(part, wanted):
            raise OutputError(f"{name}: {who} reads {_difference(part, wanted, start, read)}", _FAULT)
        start += wanted.numel()
    if start != read.numel():
        raise OutputError(f"{name}: {who} reads {read.numel()} numbers of {start}", _FAULT)


def _difference(part: torch.Tensor, wanted: torch.Tensor, start: int, read: torch.Tensor) -> str:
    """What differs first, for an error."""
    if part.shape != wanted.shape:
        return f"{read.numel()} numbers, and too few"
    at = int((part != wanted).nonzero()[0])
    return f"{float(part[at])} at {start + at}, where {float(wanted[at])} was to be written"


def facts(reader: Reader | None) -> Mapping[str, Any]:
    """What the ledger says of who read back."""
    return {"verified_by": None if reader is None else reader.name}
