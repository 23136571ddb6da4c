"""What this machine can do at most, measured: dot products a second, bytes a second.

The benchmark prints every kernel as a share of these, measured in the same run: a figure of its own says as much about
the machine and its neighbours as about the kernel. The best turn counts, because others can only make it slower. Few
rows (decoding) are bounded by the second, many rows (a prompt) by the first.
"""

from __future__ import annotations

import time

from spicerack import _native
from spicerack.kernels.panels import Room


def dot_peak(threads: int, *, engine: int = 0, seconds: float = 0.3) -> float:
    """Operations per second (2 for a multiply-add) of int8 dot products that touch registers only; the best turn.

    threads: of a team of torch's. engine: a place in `panels.NAMES`. seconds: how long turns are repeated, of 200,000
    rounds each; one turn is made at least. AVX2 has no such instruction: there it is what most of a product of 4 bits
    is, a product of bytes and a sum of 16 bits.
    """
    return _peak(threads, engine, seconds, floats=False)


def float_peak(threads: int, *, engine: int = 0, seconds: float = 0.3) -> float:
    """The same of float32 multiply-adds, as wide as the engine's vectors: what float32 models could reach at most."""
    return _peak(threads, engine, seconds, floats=True)


def _peak(threads: int, engine: int, seconds: float, *, floats: bool) -> float:
    best, rounds, end = 0.0, 200_000, time.perf_counter() + seconds  # a turn is long beside starting a team
    while (begin := time.perf_counter()) < end or not best:
        done = _native.spin(engine, rounds, threads, floats)
        best = max(best, done / (time.perf_counter() - begin))
    return best


def read_bandwidth(nbytes: int, threads: int, *, engine: int = 0, turns: int = 5) -> float:
    """Bytes per second that `threads` threads read together from nbytes of memory, in order; the best turn.

    nbytes should be more than the caches hold. engine: a place in `panels.NAMES`. turns: how often all of it is read.
    """
    data = Room(nbytes).take(nbytes).fill_(1)
    best = 0.0
    for _ in range(turns):
        begin = time.perf_counter()
        _native.read_all(engine, data, threads)
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best
