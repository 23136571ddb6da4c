"""The native module's Python side: allocates, splits the work among threads, calls. The only file that imports it.

Results equal the specifications bit for bit (`search`, `codec`, `bits`), whatever the threads and the processor.
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
from spicerack.errors import ShapeError
from spicerack.numerics import dtypes
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.search import (
    FINE,
    PIECE,
    REFINEMENTS,
    Fit,
    Range,
    best_prefix,
    coarse_factors,
    ordered_sum,
    shifts,
)

TYPES = dtypes.SOURCES
_NUMBERS = {dtype: number for number, dtype in enumerate(TYPES)}
"""As the native module counts them."""
ISAS: tuple[str, ...] = tuple(_native.instruction_sets())
"""Instruction sets that the search can use on this processor, widest first."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Team:
    """Threads that share a range of rows; native functions release the interpreter's lock."""

    pool: ThreadPoolExecutor
    threads: int

    def run(self, work: Callable[[int, int], T], count: int, step: int = 1) -> list[T]:
        """work(first, last) over 0..count in multiples of `step` -> its results, in order."""
        chunk = -(-count // (4 * self.threads * step)) * step if self.threads > 1 else count
        starts = range(0, count, max(chunk, 1))
        if len(starts) <= 1:
            return [work(first, count) for first in starts]
        return list(self.pool.map(lambda first: work(first, min(first + chunk, count)), starts))


@contextmanager
def team(threads: int) -> Iterator[Team]:
    """A Team for the length of a `with` block."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        yield Team(pool, threads)


@dataclass(frozen=True, slots=True)
class Found:
    """codes int8 [M, B], scale float32 [M] as stored, zero int8 [M]; fits: no scale is 0 or infinite."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    fits: bool


def levels_of(scheme: Scheme) -> _native.Levels:
    """The scheme's integer levels in the form that native functions take."""
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
) -> Found | None:
    """Search and round blocks w [M, B], B <= PIECE, against scales stored in `dtype`; None if one is NaN or infinite.

    importance: float32, one value per weight, or of a length that repeats along the flattened weights.
    """
    count, size = w.shape
    codes = torch.empty((count, size), dtype=torch.int8)
    scale = torch.empty(count, dtype=torch.float32)
    zero = torch.empty(count, dtype=torch.int8)
    levels, type_name = levels_of(scheme), str(dtype).removeprefix("torch.")
    optimize = range_ == "opt"
    coarse = coarse_factors(scheme) if optimize else ()
    fine = [factor for pair in FINE for factor in pair]
    period = 1 if importance is None else min(importance.numel() // size, count)

    def work(first: int, last: int) -> tuple[bool, bool]:
        part = None
        if importance is not None:
            part = importance[first * size : last * size] if importance.numel() == w.numel() else importance
        rows = slice(first, last)
        return _native.search(
            w[rows], levels, type_name, coarse, shifts(scheme), fine, REFINEMENTS,
            part, scale[rows], zero[rows], codes[rows], isa,
        )  # fmt: skip

    with team(threads) as workers:
        finite, fits = zip(*workers.run(work, count, 16 if period == count else period), strict=True)
    return Found(codes, scale, zero, all(fits)) if all(finite) else None


def encode(
    w: torch.Tensor,
    scheme: Scheme,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    threads: int = 1,
    isa: str = "",
) -> torch.Tensor:
    """Codes int8 [M, B] of blocks w [M, B] against scale float32 [M] and zero int8 [M]."""
    codes = torch.empty(w.shape, dtype=torch.int8)
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
    """sum (decoded - w)^2 and sum w^2 of blocks w [M, B] with codes int8 [M, B], scale float32 [M] and zero int8 [M].

    The last digits depend on threads and processor.
    """
    levels = levels_of(scheme)

    def work(first: int, last: int) -> tuple[float, float]:
        rows = slice(first, last)
        return _native.compare(w[rows], levels, scale[rows], None if zero is None else zero[rows], codes[rows])

    with team(threads) as workers:
        wrong, total = zip(*workers.run(work, len(w)), strict=True)
    return sum(wrong), sum(total)


@dataclass(frozen=True, slots=True)
class LongBlocks:
    """Blocks w [M, B] of any length for `search.search`: pieces are judged natively, one candidate at a time."""

    w: torch.Tensor
    scheme: Scheme
    workers: Team
    isa: str = ""

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w.amin(1).float(), self.w.amax(1).float()

    def weight(self) -> torch.Tensor:
        return torch.full((len(self.w),), float(self.w.shape[1]), dtype=torch.float64)

    def judge(self, scale: torch.Tensor, zero: torch.Tensor) -> Fit:
        usable = (scale != 0) & torch.isfinite(scale)
        sums = torch.stack([self._sums(*one) for one in zip(self.w, scale.tolist(), zero.tolist(), strict=True)])
        error, xv, vv, x, v = sums.unbind(1)
        return Fit(scale, zero, torch.where(usable, error, torch.inf), xv, vv, x, v)

    def ternary(self) -> torch.Tensor:
        return torch.cat([_ternary(block) for block in self.w])

    def _sums(self, block: torch.Tensor, scale: float, zero: float) -> torch.Tensor:
        whole = len(block) // PIECE
        pieces, rest = block[: whole * PIECE].view(whole, PIECE), block[whole * PIECE :].view(1, -1)
        out = torch.zeros((whole + 1, 5), dtype=torch.float64)
        levels = levels_of(self.scheme)

        def work(first: int, last: int) -> None:
            _native.judge(pieces[first:last], levels, scale, zero, out[first:last], self.isa)

        self.workers.run(work, whole)
        if rest.numel():
            _native.judge(rest, levels, scale, zero, out[whole:], self.isa)
        return ordered_sum(list(out))


def _ternary(block: torch.Tensor) -> torch.Tensor:
    """`TensorBlocks.ternary` of one long block [B], in 8 bytes a weight at most. -> [1]."""
    if block.dtype == torch.float32:
        size = torch.from_numpy(np.sort(block.abs().numpy())).flip(0)[None]
        return best_prefix(size)
    counts = torch.zeros(1 << 15, dtype=torch.int64)  # 16-bit floats: there are not more magnitudes than that
    for piece in block.split(PIECE):
        counts += torch.bincount(piece.view(torch.int16).to(torch.int32) & 0x7FFF, minlength=len(counts))
    found = counts.nonzero()[:, 0].flip(0)
    return best_prefix(found.to(torch.int16).view(block.dtype).float()[None], counts[found][None])


Needed = tuple[bool, bool, bool]
"""Which gradients: of weights, scales, zero points."""


def fake(
    w: torch.Tensor,
    levels: IntLevels,
    block: tuple[int, int],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
    *,
    isa: str = "",
) -> torch.Tensor:
    """w [N, K] rounded in float32, then to `dtype`: `nn.fake.Grid.fake`. scale, zero: float32 [N/rows, K/columns].

    Like `fake_gradients` it uses torch's own threads.
    """
    _check_parts(w, block, scale, zero)
    out = _like(w, dtype)
    w, scale, zero = w.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()
    grid = _native.Levels(levels.lo, levels.hi, levels.half, zero is not None)
    _native.fake(
        w.data_ptr(), _NUMBERS[w.dtype], (*w.shape, *block), scale.data_ptr(), _address(zero), grid,
        out.data_ptr(), _NUMBERS[dtype], isa,
    )  # fmt: skip
    return out


def fake_gradients(
    grad: torch.Tensor,
    w: torch.Tensor,
    levels: IntLevels,
    block: tuple[int, int],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    cells: bool,
    needed: Needed,
    rounded: torch.dtype | None = None,
    spare: bool = False,
    isa: str = "",
) -> tuple[torch.Tensor | None, ...]:
    """`nn.fake.Grid.gradients`, those of scales and zero points without their factors. grad [N, K]: any of TYPES."""
    _check_parts(w, block, scale, zero)
    if grad.shape != w.shape:
        raise ShapeError(f"weights {[*w.shape]}, gradients {[*grad.shape]}")
    reused = spare and grad.dtype == torch.float32 and grad.is_contiguous()
    grad, w, scale = grad.contiguous(), w.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    by_weight = None if not needed[0] else grad if reused else _like(w)
    by_scale = _like(scale) if needed[1] else None
    by_zero = _like(zero) if needed[2] and zero is not None else None
    again = None if rounded is None else _like(w, rounded)
    grid = _native.Levels(levels.lo, levels.hi, levels.half, zero is not None)
    _native.fake_gradients(
        grad.data_ptr(), _NUMBERS[grad.dtype], w.data_ptr(), _NUMBERS[w.dtype], (*w.shape, *block),
        scale.data_ptr(), _address(zero), grid, cells, _address(by_weight), _address(by_scale), _address(by_zero),
        _address(again), 0 if rounded is None else _NUMBERS[rounded], isa,
    )  # fmt: skip
    return by_weight, by_scale, by_zero, again


def _check_parts(w: torch.Tensor, block: tuple[int, int], scale: torch.Tensor, zero: torch.Tensor | None) -> None:
    """Native code gets addresses alone."""
    rows, columns = block
    for part in (scale, zero):
        if part is not None and (part.shape != (len(w) // rows, w.shape[1] // columns) or part.dtype != torch.float32):
            raise ShapeError(f"weights {[*w.shape]} in blocks {[*block]}: scales {[*part.shape]} of {part.dtype}")


def _like(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of x's shape, contiguous and on the CPU, whatever the defaults are."""
    return torch.empty(x.shape, dtype=dtype, device="cpu")


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def pack(codes: torch.Tensor, bits: int, *, offset: int = 0, threads: int = 1) -> torch.Tensor:
    """`bits.pack` of codes + offset (int8 or uint8 [..., R, C]); only the low bits of that sum are kept."""
    rows = codes.contiguous().view(torch.uint8).reshape(-1, codes.shape[-1])
    words = torch.empty((len(rows), -(-rows.shape[1] * bits // 32)), dtype=torch.int32)
    with team(threads) as workers:
        workers.run(lambda a, b: _native.pack(rows[a:b], bits, offset, words[a:b]), len(rows))
    return words.reshape(*codes.shape[:-1], -1)


def unpack(words: torch.Tensor, bits: int, columns: int, *, offset: int = 0, threads: int = 1) -> torch.Tensor:
    """`bits.unpack` minus offset, modulo 256: uint8 [..., R, columns]; view it as int8 for signed codes."""
    rows = words.contiguous().reshape(-1, words.shape[-1])
    codes = torch.empty((len(rows), columns), dtype=torch.uint8)
    with team(threads) as workers:
        workers.run(lambda a, b: _native.unpack(rows[a:b], bits, offset, codes[a:b]), len(rows))
    return codes.reshape(*words.shape[:-1], columns)
