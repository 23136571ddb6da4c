"""What was written, read back before it gets its name: by the engine's own reader where that is installed.

Every weight is compared, a tensor at a time: what a reader decodes must be what our codes stand for, exactly, in the
type that it decodes into; floats must be the bytes that they were. The first difference raises, and nothing is left of
the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from spicerack import plugins
from spicerack.errors import OutputError, SpicerackError
from spicerack.exports.source import Source
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.format import StoredTensor
from spicerack.storage.holding import spread


@dataclass(frozen=True, slots=True)
class Words:
    """Codes [N, K] in rows of words, the lowest bits first: what most formats say that they have.

    data     int32 [N, words]
    bits     of a code
    columns  K
    """

    data: torch.Tensor
    bits: int
    columns: int

    def codes(self) -> torch.Tensor:
        """uint8 [N, K]."""
        return torch.from_numpy(stream(self.data.numpy(), self.bits)[:, : self.columns])


def stream(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Words [R, W] of 32 bits -> the codes uint8 [R, 32 W // bits] that lie in their stream, lowest bits first.

    It shares nothing with what packs.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    count = octets.shape[1] * 8 // bits
    codes = np.empty((len(octets), count), np.uint8)
    if 8 % bits == 0:  # no code lies in two bytes
        for place in range(8 // bits):
            np.bitwise_and(octets >> place * bits, 2**bits - 1, out=codes[:, place :: 8 // bits])
        return codes
    for row, line in zip(codes, octets, strict=True):
        flags = np.unpackbits(line, bitorder="little")[: count * bits].reshape(count, bits)
        row[:] = np.packbits(flags, axis=1, bitorder="little")[:, 0]
    return codes


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix [N, K] as a reader takes it apart: w = (codes - zeros) * scales, or codes * scales + biases.

    To compare integers takes a fourth of the memory that the weights do, and an eighth of the time.

    codes    uint8 [N, K], from 0, or the words of a stream that hold them
    scales   float [N, G] of as many groups of a row, or [1, 1]
    zeros    float, like scales, or one for all
    biases   float like scales; None for none
    decoded  float [R, K]: the first rows, as the reader's own code computes them from these; None where it has none
    """

    codes: torch.Tensor | Words
    scales: torch.Tensor
    zeros: torch.Tensor
    biases: torch.Tensor | None = None
    decoded: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """The weights, float32 [N, K]."""
        codes = self.codes.codes() if isinstance(self.codes, Words) else self.codes
        n, k = codes.shape
        grid = self.scales.shape
        wide = [spread(part.float().expand(grid), (n, k)) for part in (self.zeros, self.scales)]
        values = (codes.float() - wide[0]) * wide[1]
        return values if self.biases is None else values + spread(self.biases.float(), (n, k))


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix, or a stack of them below each other, that a reader decodes some rows at a time.

    count    rows
    decoded  first row, and the one behind the last -> these, float [.., K]
    """

    count: int
    decoded: Callable[[int, int], torch.Tensor]


Weights = Callable[[str], torch.Tensor | Grid | Rows]
"""Name of a tensor in the source (`X.weight` of what is packed) -> its values, [.., N, K] in a float type, or what they
are computed from; a float tensor as it is stored. Raises KeyError for one that is not there."""
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
    weights = reader.opened(path, source)
    for tensor, value in source.walk():
        name = f"{tensor.module}.weight" if isinstance(tensor, StoredTensor) else tensor.name
        try:
            read = weights(name)
        except KeyError as error:
            raise OutputError(f"{name} is not in what was written, as {reader.name} reads it", _FAULT) from error
        except SpicerackError:
            raise
        except Exception as error:  # somebody else's code: whatever it raises, it does not read this
            raise OutputError(f"{name}: {reader.name} does not read it: {error!r}", _FAULT) from error
        if isinstance(read, Grid):
            assert not isinstance(value, torch.Tensor), "floats are read as floats"
            if (different := _different(value, read)) is not None:
                raise OutputError(f"{name}: {reader.name} reads other {different}", _FAULT)
            if read.decoded is not None:
                first = next(codec.decode_rows(_decoded(value), len(read.decoded)))
                _compare(name, iter((first,)), read.decoded, reader.name)
        else:
            pieces = iter((value,)) if isinstance(value, torch.Tensor) else _pieces(_decoded(value))
            _compare(name, pieces, read, reader.name)


def _decoded(q: QTensor | Undecoded) -> QTensor:
    """With codes one to a byte."""
    return q.qtensor() if isinstance(q, Undecoded) else q


def _different(q: QTensor | Undecoded, read: Grid) -> str | None:
    """Which part of a matrix of integers is not what was read; None if all are. Raises SchemeError for other levels."""
    if not _same_codes(q, read.codes):
        return "codes"
    lo, half = q.scheme.integers.lo, 0.5 * q.scheme.integers.half
    grid = tuple(read.scales.shape)
    scale, low = q.plain_scale, q.min
    n, groups = scale.shape
    if (n, groups) != grid and (grid[0] % n or grid[1] % groups):
        return "groups"
    scales = spread(scale, grid)
    if not _equal(scales, read.scales):
        return "scales"
    zeros = (
        -lo
        - half
        + (torch.zeros((), dtype=torch.float32, device="cpu") if q.zero is None else spread(q.zero, grid).float())
    )
    if read.biases is None:
        return None if bool((zeros == read.zeros).all()) and low is None else "zero points"
    assert not isinstance(low, QTensor), "quantized minima were refused"
    wanted = -zeros * (scales.double() if scales.dtype == torch.float32 else scales.float()) if low is None else low
    return None if _equal(spread(wanted, grid), read.biases) else "biases"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same numbers, whatever their float types."""
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())


def _same_codes(q: QTensor | Undecoded, read: torch.Tensor | Words) -> bool:
    """Whether the codes are those that were read: words with words, where both have such of as many bits."""
    if isinstance(read, Words):
        if isinstance(q, Undecoded) and q.order == "stream" and read.bits == q.scheme.bits:
            return read.columns == q.shape[1] and torch.equal(q.data, read.data)
        read = read.codes()
    codes, lo = _decoded(q).codes, q.scheme.integers.lo
    # wraps around: a code of int8 less the lowest, in bytes
    return torch.equal(codes.view(torch.uint8) + -lo if lo else codes, read)


def _pieces(q: QTensor) -> Iterator[torch.Tensor]:
    """The decoded weights [R, K], rows after rows, in float32."""
    *_, n, k = q.shape
    rows = q.scheme.group_shape(n, k)[0]
    return codec.decode_rows(q, max(_ROWS // k // rows, 1) * rows)


def _compare(name: str, pieces: Iterator[torch.Tensor], read: torch.Tensor | Rows, who: str) -> None:
    """Raise OutputError unless the pieces, in the type that was read, are what was read, in order."""
    start = rows = 0
    for piece in pieces:
        if isinstance(read, Rows):
            part = read.decoded(rows, rows + len(piece)).reshape(-1)
        else:
            part = read.reshape(-1)[start : start + piece.numel()]
        wanted = piece.reshape(-1).to(part.dtype)
        if part.shape != wanted.shape or not torch.equal(part, wanted):
            raise OutputError(f"{name}: {who} reads {_difference(part, wanted, start)}", _FAULT)
        start, rows = start + wanted.numel(), rows + len(piece)
    if (rows != read.count) if isinstance(read, Rows) else (start != read.numel()):
        raise OutputError(f"{name}: {who} reads more than the {start} numbers that were to be written", _FAULT)


def _difference(part: torch.Tensor, wanted: torch.Tensor, start: int) -> str:
    """What differs first, for an error."""
    if part.shape != wanted.shape:
        return f"{start + part.numel()} numbers, and too few"
    at = int((part != wanted).nonzero()[0])
    return f"{float(part[at])} at {start + at}, where {float(wanted[at])} was to be written"


def facts(reader: Reader | None) -> Mapping[str, Any]:
    """What the ledger says of who read back."""
    return {"verified_by": None if reader is None else reader.name}
