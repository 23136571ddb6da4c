"""Whether a packed matrix is the one that was read: by its integers and floats, or by what they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from spicerack.exports.readings import Grid, Words
from spicerack.numerics import codec, native
from spicerack.numerics.qtensor import QTensor, Scale
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.holding import spread

_ROWS = 1 << 22
"""Weights that are compared at a time: 16 MB of float32 beside the tensor itself."""


def rows_of(q: QTensor | Undecoded, start: int, stop: int) -> QTensor | Undecoded:
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
        return rows_of(values, start, stop) if isinstance(values, QTensor) else values[start:stop]

    parts = {"scale": part(q.scale), "zero": part(q.zero), "min": part(q.min)}
    if isinstance(q, Undecoded):
        return replace(q, shape=(stop - start, k), data=q.data[start:stop], transposed=False, **parts)
    return replace(q, codes=q.codes[start:stop], transposed=False, **parts)


def same_parts(q: QTensor | Undecoded, read: Undecoded) -> bool:
    """Whether a matrix is the one that was read: by its integers and floats where both have the same, else by what they
    stand for."""
    if q.scheme.levels == read.scheme.levels and _same_kind(q.scheme, read.scheme):
        words = _words_of(q)
        return torch.equal(words, read.data) and _same_scales(q.scale, read.scale) and _same_scales(q.min, read.min)
    low = None if read.min is None else _floats(read.min)
    if q.scheme.plain_obstacle is None and read.scheme.levels_obstacle is None:
        zero = torch.tensor(float(-read.scheme.levels.lo), dtype=torch.float32, device="cpu")
        grid = Grid(Words(read.data, read.scheme.bits, read.shape[1]), _floats(read.scale), zero, low)
        if read.scheme.bits == q.scheme.bits and different(q, grid) is None:
            return True
        if read.min is None:
            return _same_integers(decoded(q), read)
    return all(torch.equal(a, b) for a, b in zip(pieces(decoded(q)), pieces(read.qtensor()), strict=True))


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
    return native.pack(decoded(q).codes, q.scheme.bits, offset=-q.scheme.levels.lo)


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


def decoded(q: QTensor | Undecoded) -> QTensor:
    """With codes one to a byte."""
    return q.qtensor() if isinstance(q, Undecoded) else q


def different(q: QTensor | Undecoded, read: Grid) -> str | None:
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
    codes, lo = decoded(q).codes, q.scheme.integers.lo
    # wraps around: a code of int8 less the lowest, in bytes
    return torch.equal(codes.view(torch.uint8) + -lo if lo else codes, read)


def pieces(q: QTensor) -> Iterator[torch.Tensor]:
    """The decoded weights [R, K], rows after rows, in float32."""
    *_, n, k = q.shape
    rows = q.scheme.group_shape(n, k)[0]
    return codec.decode_rows(q, max(_ROWS // k // rows, 1) * rows)
