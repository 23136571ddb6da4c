"""The search, rounding and packing of the native module: allocates, splits the work among threads, calls.

Results equal the specifications bit for bit (`search`, `codec`, `bits`), whatever the threads and the processor. What
is searched and rounded are groups of plain schemes whose codes are around 0 (`rounding` asks): a matrix [M, B] of
weights, float32, float16 or bfloat16, contiguous and on the CPU, each row of which shares a scale. Here none of it is
checked.

Threads are Python's own, in a pool that lives as long as a call: native functions hold no lock of the interpreter, each
thread writes rows of its own, and how many there are is for the caller to say. Products and training run on torch's
team instead (`kernels`, `fake_native`), because they run between operations of torch, and two teams would fight for
cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from spicerack import _native
from spicerack.numerics import dtypes
from spicerack.numerics.levels import TableLevels, bounds, in_order
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.search import (
    FINE,
    PIECE,
    REFINEMENTS,
    Fit,
    Range,
    best_prefix,
    coarse_factors,
    empty_scale,
    ordered_sum,
    shifts,
)

TYPES = dtypes.SOURCES
"""Types of weights that native functions read."""
ISAS: tuple[str, ...] = tuple(_native.instruction_sets())
"""Instruction sets that the search can use on this processor, widest first."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Team:
    """Threads that share a range of rows.

    pool      where they run, for as long as the call that made the team
    threads   how many
    """

    pool: ThreadPoolExecutor
    threads: int

    def run(self, work: Callable[[int, int], T], count: int, step: int = 1) -> list[T]:
        """work(first, last) over 0..count in multiples of `step` -> its results, in order.

        Four pieces a thread: a thread that was held up costs a quarter of its share, not all of it.
        """
        chunk = -(-count // (4 * self.threads * step)) * step if self.threads > 1 else count
        starts = range(0, count, max(chunk, 1))
        if len(starts) <= 1:
            return [work(first, count) for first in starts]
        return list(self.pool.map(lambda first: work(first, min(first + chunk, count)), starts))


@contextmanager
def team(threads: int) -> Iterator[Team]:
    """A Team of so many of Python's threads for the length of a `with` block; with one, everything runs in the
    caller's."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        yield Team(pool, threads)


@dataclass(frozen=True, slots=True)
class Quantized:
    """M groups of B weights, searched and rounded.

    codes   int8 [M, B]
    scale   float32 [M] with values as stored
    zero    int8 [M]; zeros where the scheme has none
    fits    no scale is 0 or infinite. If one is, the codes are of no use: the scale has to be put right first
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    fits: bool


def levels_of(scheme: Scheme) -> _native.Levels:
    """The scheme's levels in the form that native functions take: integers, or a table `in_order` of at most 16.

    Raises SchemeError for others.
    """
    if in_order(scheme.levels) and isinstance(scheme.levels, TableLevels):
        values = scheme.levels.values
        return _native.Levels.table(values, bounds(values).tolist())
    integers = scheme.integers
    return _native.Levels(integers.lo, integers.hi, integers.half, scheme.zero)


def quantize(
    w: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    range_: Range,
    importance: torch.Tensor | None = None,
    *,
    threads: int = 1,
    isa: str = "",
) -> Quantized | None:
    """Search and round groups w [M, B], B <= PIECE, against scales stored in `dtype`; None if a weight is not finite.

    w           [M, B]
    scheme      a plain one, or a table of 16 levels in place of its integers; not ternary: for that the search sorts,
                which is done in torch
    dtype       float16, bfloat16 or float32
    range_      as in `search.search`
    importance  float32, one value per weight, or of a length that repeats along the flattened weights
    threads     how many share the groups
    isa         one of ISAS; "" is the widest
    """
    count, size = w.shape
    codes = torch.empty((count, size), dtype=torch.int8, device="cpu")
    scale = torch.empty(count, dtype=torch.float32, device="cpu")
    zero = torch.empty(count, dtype=torch.int8, device="cpu")
    levels, type_name = levels_of(scheme), str(dtype).removeprefix("torch.")
    optimize, empty = range_ == "opt", empty_scale(scheme, dtype)
    coarse = coarse_factors(scheme) if optimize else ()
    fine = [factor for pair in FINE for factor in pair]
    period = 1 if importance is None else min(importance.numel() // size, count)

    def work(first: int, last: int) -> tuple[bool, bool]:
        part = None
        if importance is not None:
            part = importance[first * size : last * size] if importance.numel() == w.numel() else importance
        rows = slice(first, last)
        return _native.search(
            w[rows], levels, type_name, coarse, shifts(scheme), fine, REFINEMENTS, empty,
            part, scale[rows], zero[rows], codes[rows], isa,
        )  # fmt: skip

    with team(threads) as workers:
        finite, fits = zip(*workers.run(work, count, 16 if period == count else period), strict=True)
    return Quantized(codes, scale, zero, all(fits)) if all(finite) else None


def encode(
    w: torch.Tensor,
    scheme: Scheme,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    threads: int = 1,
    isa: str = "",
) -> torch.Tensor:
    """Codes int8 [M, B] of groups w [M, B] against scales and zero points that are given.

    w         float32, float16 or bfloat16, contiguous, on the CPU
    scheme    a plain one
    scale     float32 [M], none of them 0
    zero      int8 [M], or None for none
    threads   how many share the groups
    isa       one of ISAS; "" is the widest
    """
    codes = torch.empty(w.shape, dtype=torch.int8, device="cpu")
    levels = levels_of(scheme)

    def work(first: int, last: int) -> None:
        rows = slice(first, last)
        _native.encode(w[rows], levels, scale[rows], None if zero is None else zero[rows], codes[rows], isa)

    with team(threads) as workers:
        workers.run(work, len(w), 16)
    return codes


def compare(
    w: torch.Tensor,
    scheme: Scheme,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    *,
    threads: int = 1,
) -> tuple[float, float]:
    """sum (decoded - w)^2 and sum w^2 of groups of weights.

    w         [M, B], as in `quantize`
    scheme    a plain one
    scale     float32 [M]
    zero      int8 [M], or None for none
    codes     int8 [M, B]
    threads   how many share the groups

    The one result here whose last digits depend on threads and processor: it is reported, never computed with.
    """
    levels = levels_of(scheme)

    def work(first: int, last: int) -> tuple[float, float]:
        rows = slice(first, last)
        return _native.compare(w[rows], levels, scale[rows], None if zero is None else zero[rows], codes[rows])

    with team(threads) as workers:
        wrong, total = zip(*workers.run(work, len(w)), strict=True)
    return sum(wrong), sum(total)


@dataclass(frozen=True, slots=True)
class LongGroups:
    """Groups w [M, B] of any length for `search.search`: pieces are judged natively, one candidate at a time.

    w         [M, B], as in `quantize`
    scheme    a plain one
    workers   the threads; they share a group and not the groups
    isa       as in `quantize`

    For groups longer than PIECE: a scale for a tensor, or for a very long row. All weights matter the same.
    """

    w: torch.Tensor
    scheme: Scheme
    workers: Team
    isa: str = ""

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Groups.bounds`; float32 whatever the weights' type."""
        return self.w.amin(1).float(), self.w.amax(1).float()

    def weight(self) -> torch.Tensor:
        """See `Groups.weight`: the number of weights, which all matter the same."""
        return torch.full((len(self.w),), float(self.w.shape[1]), dtype=torch.float64, device="cpu")

    def judge(self, scale: torch.Tensor, zero: torch.Tensor) -> Fit:
        """See `Groups.judge`: piece by piece, the pieces shared among the threads and added in their order."""
        usable = (scale != 0) & torch.isfinite(scale)
        sums = torch.stack([self._sums(*one) for one in zip(self.w, scale.tolist(), zero.tolist(), strict=True)])
        error, xv, vv, x, v = sums.unbind(1)
        return Fit(scale, zero, torch.where(usable, error, torch.inf), xv, vv, x, v)

    def ternary(self) -> torch.Tensor:
        """See `Groups.ternary`: one group after the other, because sorting takes memory."""
        return torch.cat([_ternary(group) for group in self.w])

    def _sums(self, group: torch.Tensor, scale: float, zero: float) -> torch.Tensor:
        """Error, xv, vv, x and v of one group [B] for one stored scale and zero: float64 [5], as `Fit` has them.

        Whole pieces are shared among the threads, and the rest behind them comes last: the order is the
        specification's.
        """
        whole = len(group) // PIECE
        pieces, rest = group[: whole * PIECE].view(whole, PIECE), group[whole * PIECE :].view(1, -1)
        out = torch.zeros((whole + 1, 5), dtype=torch.float64, device="cpu")
        levels = levels_of(self.scheme)

        def work(first: int, last: int) -> None:
            _native.judge(pieces[first:last], levels, scale, zero, out[first:last], self.isa)

        self.workers.run(work, whole)
        if rest.numel():
            _native.judge(rest, levels, scale, zero, out[whole:], self.isa)
        return ordered_sum(list(out))


def _ternary(group: torch.Tensor) -> torch.Tensor:
    """`TensorGroups.ternary` of one long group [B], in 8 bytes a weight at most. -> [1]."""
    if group.dtype == torch.float32:
        size = torch.from_numpy(np.sort(group.abs().numpy())).flip(0)[None]
        return best_prefix(size)
    counts = torch.zeros(
        1 << 15, dtype=torch.int64, device="cpu"
    )  # 16-bit floats: there are not more magnitudes than that
    for piece in group.split(PIECE):
        counts += torch.bincount(piece.view(torch.int16).to(torch.int32) & 0x7FFF, minlength=len(counts))
    patterns = counts.nonzero()[:, 0].flip(0)
    return best_prefix(patterns.to(torch.int16).view(group.dtype).float()[None], counts[patterns][None])


def pack(codes: torch.Tensor, bits: int, *, offset: int = 0, threads: int = 1) -> torch.Tensor:
    """`bits.pack` of codes + offset: int8 or uint8 [..., R, C] -> int32 [..., R, words]. bits: 1 to 8.

    Only the low bits of the sum are kept: codes that are not of the levels are the caller's mistake.
    """
    rows = codes.contiguous().view(torch.uint8).reshape(-1, codes.shape[-1])
    words = torch.empty((len(rows), -(-rows.shape[1] * bits // 32)), dtype=torch.int32, device="cpu")
    with team(threads) as workers:
        workers.run(lambda a, b: _native.pack(rows[a:b], bits, offset, words[a:b]), len(rows))
    return words.reshape(*codes.shape[:-1], -1)


def unpack(words: torch.Tensor, bits: int, columns: int, *, offset: int = 0, threads: int = 1) -> torch.Tensor:
    """`bits.unpack` minus offset: int32 [..., R, words] -> uint8 [..., R, columns], modulo 256.

    View it as int8 for signed codes. `words` must be those of `columns` codes.
    """
    rows = words.contiguous().reshape(-1, words.shape[-1])
    codes = torch.empty((len(rows), columns), dtype=torch.uint8, device="cpu")
    with team(threads) as workers:
        workers.run(lambda a, b: _native.unpack(rows[a:b], bits, offset, codes[a:b]), len(rows))
    return codes.reshape(*words.shape[:-1], columns)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the codes of a block of a file lie in its bytes; what else is in it is not looked at.

    count   codes of a block, a multiple of 32, at most 256
    nbytes  of a block
    planes  bits, stride, shift and first byte of each: bits shift..shift+bits-1 of all codes, of which runs of `stride`
            (1, or a multiple of 8) share bytes, the first run lowest
    """

    count: int
    nbytes: int
    planes: tuple[tuple[int, int, int, int], ...]


def to_blocks(words: torch.Tensor, bits: int, blocks: Blocks, raw: torch.Tensor, *, threads: int = 1) -> None:
    """Codes in streams, int32 [R, W] as `pack` has them -> their bits in raw, uint8 [R, bytes of blocks], in place.

    Both on the CPU, contiguous; raw's other bytes stay what they are.
    """
    shape = blocks.count, blocks.nbytes
    with team(threads) as workers:
        workers.run(lambda a, b: _native.to_blocks(words[a:b], bits, shape, blocks.planes, raw[a:b]), len(raw))


def from_blocks(raw: torch.Tensor, bits: int, blocks: Blocks, *, threads: int = 1) -> torch.Tensor:
    """Inverse of `to_blocks`: uint8 [R, bytes of blocks] -> int32 [R, W]."""
    raw, shape = raw.contiguous(), (blocks.count, blocks.nbytes)
    columns = raw.shape[1] // blocks.nbytes * blocks.count
    words = torch.empty((len(raw), columns * bits // 32), dtype=torch.int32, device="cpu")
    with team(threads) as workers:
        workers.run(lambda a, b: _native.from_blocks(raw[a:b], bits, shape, blocks.planes, words[a:b]), len(raw))
    return words
