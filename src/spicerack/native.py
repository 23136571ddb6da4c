"""The native module's Python side: allocates, splits the work among threads, calls. The only file that imports it.

Results equal the specifications bit for bit (`search`, `codec`, `bits`), whatever the threads and the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from spicerack import _native
from spicerack.scheme import IntLevels, Scheme
from spicerack.search import FINE, PIECE, REFINEMENTS, Fit, Range, coarse_factors, ordered_sum, shifts

TYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS: tuple[str, ...] = tuple(_native.instruction_sets())
"""Instruction sets that the search can use on this processor, widest first."""

Run = Callable[[Callable[[int, int], bool | None], int, int], bool]


@contextmanager
def team(threads: int) -> Iterator[Run]:
    """Yields run(work, count, step): work(first, last) over 0..count in multiples of `step`, on `threads` threads.

    -> whether no call returned False.
    """
    with ThreadPoolExecutor(max_workers=threads) as pool:

        def run(work: Callable[[int, int], bool | None], count: int, step: int) -> bool:
            chunk = -(-count // (4 * threads * step)) * step if threads > 1 else count
            starts = range(0, count, max(chunk, 1))
            if len(starts) == 1:
                return work(0, count) is not False
            return all(r is not False for r in list(pool.map(lambda s: work(s, min(s + chunk, count)), starts)))

        yield run


def levels_of(scheme: Scheme) -> _native.Levels:
    """The scheme's integer levels in the form that native functions take."""
    assert isinstance(scheme.levels, IntLevels)
    return _native.Levels(scheme.levels.lo, scheme.levels.hi, scheme.levels.half, scheme.zero)


def quantize(
    w: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    range_: Range,
    importance: torch.Tensor | None = None,
    *,
    threads: int = 1,
    isa: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Blocks w [M, B], B <= PIECE -> codes int8 [M, B], scale float32 [M] as stored in `dtype`, zero int8 [M].

    importance: float32, one value per weight, or of a length that repeats along the flattened weights. None is returned
    if a weight is NaN or infinite.
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

    def work(first: int, last: int) -> bool:
        part = None
        if importance is not None:
            part = importance[first * size : last * size] if importance.numel() == w.numel() else importance
        rows = slice(first, last)
        return _native.search(
            w[rows], levels, type_name, coarse, shifts(scheme), fine, REFINEMENTS,
            part, scale[rows], zero[rows], codes[rows], isa,
        )  # fmt: skip

    with team(threads) as run:
        finite = run(work, count, 16 if period == count else period)
    return (codes, scale, zero) if finite else None


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

    with team(threads) as run:
        run(work, len(w), 16)
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
    sums: dict[int, tuple[float, float]] = {}

    def work(first: int, last: int) -> None:
        rows = slice(first, last)
        sums[first] = _native.compare(w[rows], levels, scale[rows], None if zero is None else zero[rows], codes[rows])

    with team(threads) as run:
        run(work, len(w), 1)
    wrong, total = zip(*(sums[first] for first in sorted(sums)), strict=True)
    return sum(wrong), sum(total)


@dataclass(frozen=True, slots=True)
class LongBlocks:
    """Blocks w [M, B] of any length for `search.search`: pieces are judged natively, one candidate at a time."""

    w: torch.Tensor
    scheme: Scheme
    run: Run
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

    def _sums(self, block: torch.Tensor, scale: float, zero: float) -> torch.Tensor:
        whole = len(block) // PIECE
        pieces, rest = block[: whole * PIECE].view(whole, PIECE), block[whole * PIECE :].view(1, -1)
        out = torch.zeros((whole + 1, 5), dtype=torch.float64)
        levels = levels_of(self.scheme)

        def work(first: int, last: int) -> None:
            _native.judge(pieces[first:last], levels, scale, zero, out[first:last], self.isa)

        self.run(work, whole, 1)
        if rest.numel():
            _native.judge(rest, levels, scale, zero, out[whole:], self.isa)
        return ordered_sum(list(out))


def pack(codes: torch.Tensor, bits: int, *, offset: int = 0, threads: int = 1) -> torch.Tensor:
    """`bits.pack` of codes + offset (int8 or uint8 [..., R, C]); only the low bits of that sum are kept."""
    rows = codes.contiguous().view(torch.uint8).reshape(-1, codes.shape[-1])
    words = torch.empty((len(rows), -(-rows.shape[1] * bits // 32)), dtype=torch.int32)
    with team(threads) as run:
        run(lambda a, b: _native.pack(rows[a:b], bits, offset, words[a:b]), len(rows), 1)
    return words.reshape(*codes.shape[:-1], -1)


def unpack(words: torch.Tensor, bits: int, columns: int, *, offset: int = 0, threads: int = 1) -> torch.Tensor:
    """`bits.unpack` minus offset, modulo 256: uint8 [..., R, columns]; view it as int8 for signed codes."""
    rows = words.contiguous().reshape(-1, words.shape[-1])
    codes = torch.empty((len(rows), columns), dtype=torch.uint8)
    with team(threads) as run:
        run(lambda a, b: _native.unpack(rows[a:b], bits, offset, codes[a:b]), len(rows), 1)
    return codes.reshape(*words.shape[:-1], columns)
