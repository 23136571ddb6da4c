"""What this machine can do at most, measured: dot products a second, bytes a second."""

from __future__ import annotations

import time

from spicerack import _native
from spicerack.kernels.panels import zeros


def dot_peak(threads: int, *, engine: int = 0, seconds: float = 0.3) -> float:
    """Operations per second (2 for a multiply-add) of integer dot products that touch registers only; the best turn."""
    best, rounds, end = 0.0, 200_000, time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or not best:
        done = _native.spin(engine, rounds, threads)
        best = max(best, done / (time.perf_counter() - begin))
    return best


def read_bandwidth(nbytes: int, threads: int, *, engine: int = 0, turns: int = 5) -> float:
    """Bytes per second that `threads` threads read together from nbytes of memory, in order; the best turn."""
    data = zeros(nbytes).fill_(1)
    best = 0.0
    for _ in range(turns):
        begin = time.perf_counter()
        _native.read_all(engine, data, threads)
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best
