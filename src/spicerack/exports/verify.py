"""What was written, read back before it gets its name: by the engine's own reader where that is installed.

Every weight is compared, a tensor at a time, exactly; floats must be the bytes that they were. Most readers give the
integers, scales and minima that their numbers are made of, all of which are compared, and decode some rows themselves
(`sampled`): these must be what our codes stand for, in the type that the reader decodes into. Others decode all rows.
The first difference raises, and nothing is left of the output.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from spicerack import plugins
from spicerack.errors import OutputError, SpicerackError
from spicerack.exports.source import Source
from spicerack.numerics import codec, native
from spicerack.numerics.qtensor import QTensor, Scale
from spicerack.numerics.scheme import Scheme
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
    samples  some rows as the reader's own code computes them from these: the first one's number, and float [R, K]
    """

    codes: torch.Tensor | Words
    scales: torch.Tensor
    zeros: torch.Tensor
    biases: torch.Tensor | None = None
    samples: Sequence[tuple[int, torch.Tensor]] = ()

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
    parts    the bytes that it decodes, all of them, as we take them apart: then it decodes those of `sampled` alone;
             None where it decodes all
    """

    count: int
    decoded: Callable[[int, int], torch.Tensor]
    parts: Undecoded | None = None


Weights = Callable[[str], torch.Tensor | Grid | Rows]
"""Name of a tensor in the source (`X.weight` of what is packed) -> its values, [.., N, K] in a float type, or what they
are computed from; a float tensor as it is stored. Raises KeyError for one that is not there."""
_SAMPLED = 1 << 15
"""Weights of each of three pieces of a matrix that a reader decodes itself: some rows, of each tensor of a model."""
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


def sampled(name: str, shape: tuple[int, int], multiple: int = 1) -> list[tuple[int, int]]:
    """Rows of a matrix [N, K] that a reader decodes: the first ones, some that its name draws, and the last ones.

    Of each piece the first row, and the one behind the last, in multiples; all in one piece where they are few.
    """
    n, k = shape
    count = -(-max(_SAMPLED // k, 1) // multiple) * multiple
    if 3 * count >= n:
        return [(0, n)]
    middle = random.Random(name).randrange(count, n - 2 * count + 1) // multiple * multiple
    last = (n - count) // multiple * multiple
    return [(0, count), (middle, middle + count), (last, min(last + count, n))]


def verify(reader: Reader, source: Source, path: Path) -> None:
    """Compare every tensor of `source` with what `reader` reads at `path`. Raises OutputError naming the first that
    differs, how much and where."""
    weights, who = reader.opened(path, source), reader.name
    for tensor, value in source.walk():
        name = f"{tensor.module}.weight" if isinstance(tensor, StoredTensor) else tensor.name
        try:
            read = weights(name)
        except KeyError as error:
            raise OutputError(f"{name} is not in what was written, as {who} reads it", _FAULT) from error
        except SpicerackError:
            raise
        except Exception as error:  # somebody else's code: whatever it raises, it does not read this
            raise OutputError(f"{name}: {who} does not read it: {error!r}", _FAULT) from error
        if isinstance(value, torch.Tensor):
            assert not isinstance(read, Grid), "floats are read as floats"
            _compare(name, iter((value,)), read, who)
        elif isinstance(read, Grid):
            if (different := _different(value, read)) is not None:
                raise OutputError(f"{name}: {who} reads other {different}", _FAULT)
            _compare_samples(name, value, read.samples, who)
        elif isinstance(read, Rows) and read.parts is not None:
            if not _same_parts(value, read.parts):
                parts = codec.decode(replace(read.parts.qtensor(), transposed=False))
                _compare(name, _pieces(_decoded(value)), parts, who)
                raise OutputError(f"{name}: {who} reads other scales", _FAULT)
            pieces = sampled(name, read.parts.shape)
            _compare_samples(name, value, [(start, read.decoded(start, stop)) for start, stop in pieces], who)
        else:
            _compare(name, _pieces(_decoded(value)), read, who)


def _compare_samples(name: str, q: QTensor | Undecoded, samples: Iterable[tuple[int, torch.Tensor]], who: str) -> None:
    """Raise OutputError unless rows of q are what was read of them: the first one's number, and values [R, K]."""
    for start, values in samples:
        rows = codec.decode(_decoded(_rows_of(q, start, start + len(values))))
        _compare(name, iter((rows,)), values, who, start * rows.shape[1])


def _rows_of(q: QTensor | Undecoded, start: int, stop: int) -> QTensor | Undecoded:
    """Some rows of a matrix [N, K], whose groups are of one row or of all."""
    if isinstance(q, Undecoded) and q.order == "quarters":
        q = q.qtensor()
    n, k = q.shape
    rows = q.scheme.group_shape(n, k)[0]
    assert rows in (1, n), "no scheme that is exported has others"

    def part(values: Scale | None) -> Any:
        """Scales, zero points or minima of these rows."""
        if values is None or rows == n:
            return values
        return _rows_of(values, start, stop) if isinstance(values, QTensor) else values[start:stop]

    parts = {"scale": part(q.scale), "zero": part(q.zero), "min": part(q.min)}
    if isinstance(q, Undecoded):
        return replace(q, shape=(stop - start, k), data=q.data[start:stop], transposed=False, **parts)
    return replace(q, codes=q.codes[start:stop], transposed=False, **parts)


def _same_parts(q: QTensor | Undecoded, read: Undecoded) -> bool:
    """Whether a matrix is the one that was read: by its integers and floats where both have the same, else by what they
    stand for."""
    if q.scheme.levels == read.scheme.levels and _same_kind(q.scheme, read.scheme):
        words = _words_of(q)
        return torch.equal(words, read.data) and _same_scales(q.scale, read.scale) and _same_scales(q.min, read.min)
    low = None if read.min is None else _floats(read.min)
    if q.scheme.plain_obstacle is None and read.scheme.levels_obstacle is None:
        zero = torch.tensor(float(-read.scheme.levels.lo), dtype=torch.float32, device="cpu")
        grid = Grid(Words(read.data, read.scheme.bits, read.shape[1]), _floats(read.scale), zero, low)
        if read.scheme.bits == q.scheme.bits and _different(q, grid) is None:
            return True
        if read.min is None:
            return _same_integers(_decoded(q), read)
    return all(torch.equal(a, b) for a, b in zip(_pieces(_decoded(q)), _pieces(read.qtensor()), strict=True))


def _same_integers(q: QTensor, read: Undecoded) -> bool:
    """Whether two matrices are the same integers times the same floats, whatever their zero points and halves, or the
    negative ones times negative floats."""
    others = read.qtensor()
    scale, integers = _floats(read.scale), others.codes  # bytes: no type without minima has more than 8 bits
    grid = tuple(scale.shape)
    own, codes = spread(q.plain_scale, grid).float(), q.codes.to(torch.int8)
    if q.zero is not None:
        codes = (codes.unflatten(-1, (grid[1], -1)) - spread(q.zero, grid)[..., None]).flatten(-2)
    if q.scheme.integers.half:
        own, codes = own / 2, 2 * codes + 1
    return any(torch.equal(sign * own, scale.float()) and torch.equal(sign * codes, integers) for sign in (1, -1))


def _same_kind(a: Scheme, b: Scheme) -> bool:
    """Whether scales and minima of two schemes are of one kind, and their groups the same."""
    kinds = [[kind.levels if isinstance(kind, Scheme) else kind is None for kind in (s.scale, s.min)] for s in (a, b)]
    return kinds[0] == kinds[1] and (a.group, a.zero) == (b.group, b.zero)


def _words_of(q: QTensor | Undecoded) -> torch.Tensor:
    """Codes as words of a stream."""
    if isinstance(q, Undecoded) and q.order == "stream":
        return q.data
    return native.pack(_decoded(q).codes, q.scheme.bits, offset=-q.scheme.levels.lo)


def _same_scales(a: Scale | None, b: Scale | None) -> bool:
    """Whether two scales or minima have the same numbers, and, of those that are quantized, the same codes."""
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return torch.equal(a.codes, b.codes) and _same_scales(a.scale, b.scale) and _same_scales(a.min, b.min)
    if a is None or b is None or isinstance(a, QTensor) or isinstance(b, QTensor):
        return a is b
    return (
        _equal(a.view(torch.uint8), b.view(torch.uint8)) if a.element_size() == 1 == b.element_size() else _equal(a, b)
    )


def _floats(part: Scale) -> torch.Tensor:
    """Scales or minima as they count in arithmetic."""
    return codec.decode(part) if isinstance(part, QTensor) else part


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
