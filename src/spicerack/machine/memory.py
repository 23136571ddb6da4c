"""How much memory this process has used, as the operating system counts it, and how much there is; and giving back what
nobody uses.

The first is what a run reports beside what was planned (`quantization.memory`): a plan that nobody compares with the
machine is a guess.

The second is for long loops, and `steady` is between their steps. glibc raises the size from which on it maps memory
apart to that of what was freed last, 32 MB at most; from then on activations come from its heap, small results that are
kept come to lie between them, and the heap only grows: an evaluation of 110,000 tokens took 3.6 GB, of which 0.3 were
in use. `malloc_trim` gives the pages between back to the system. Behind every window it held that evaluation at 0.3 GB;
asked for whenever 64 MB came on top, as here, it held one of 60 windows at 0.4 GB. The other remedy, a fixed size from
which on memory is mapped apart (`mallopt`), does that too, but every activation is then cleared by the system anew: two
thirds more processor time, and for the whole process.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
GROWTH = 64 << 20
"""Bytes that may come on top before memory is given back: a trim takes about 20 ms, which so much memory is worth."""
_STATM = Path("/proc/self/statm")
_PAGE = resource.getpagesize()


def peak_rss_bytes() -> int:
    """The process's largest resident memory so far, in bytes, shared pages included.

    getrusage is the second choice: on Linux its figure begins with the memory of the process that started this one.
    Where it is asked, macOS counts bytes and all others kilobytes.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_bytes() -> int | None:
    """The process's resident memory now, in bytes, pages that are mapped from files left out; None but on Linux."""
    if not _STATM.exists():
        return None
    _, resident, shared, *_ = map(int, _STATM.read_text().split())
    return (resident - shared) * _PAGE


def available_bytes() -> int:
    """Bytes that a process can still have without swapping: what the system says, or its control group if that is less.

    Where the system does not say (macOS), half of the memory that is built in.
    """
    info = Path("/proc/meminfo")
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(min(int(line.split()[1]) * 1024, _left_in_group(Path("/sys/fs/cgroup"))))


def _left_in_group(group: Path) -> int | float:
    """Bytes below the limit of a control group (version 2), files that it caches not counted as used; infinite where it
    has none."""
    most, now, stat = (group / name for name in ("memory.max", "memory.current", "memory.stat"))
    limit = most.read_text().strip() if most.is_file() else "max"
    if not limit.isdigit():
        return math.inf
    cached = next((line for line in stat.read_text().splitlines() if line.startswith("inactive_file ")), "x 0")
    return max(int(limit) - int(now.read_text()) + int(cached.split()[1]), 0)


def steady(steps: Iterable[_T]) -> Iterator[_T]:
    """The same steps, with `settle` behind each of them."""
    for step in steps:
        yield step
        settle()


def settle() -> None:
    """Between two steps of a long loop: give back what malloc keeps and nobody uses, if much came on top.

    What is in use stays, and counts as the process's own from then on. Nothing happens but with glibc.
    """
    _heap().settle()


class _Heap:
    """glibc's heap, of which a process has one. floor: anonymous memory behind the last trim."""

    def __init__(self, trim: Callable[[int], int] | None) -> None:
        self._trim = trim
        self.floor = 0

    def settle(self) -> None:
        """See `settle`."""
        now = anonymous_bytes()
        if self._trim is not None and now is not None and now > self.floor + GROWTH:
            self._trim(0)
            self.floor = anonymous_bytes() or now


@cache
def _heap() -> _Heap:
    """The heap of this process."""
    return _Heap(_of_c("malloc_trim"))


def _of_c(name: str) -> Callable[[int], int] | None:
    """A function of the C library, of one int; None where it has no such."""
    try:
        function: Callable[[int], int] = ctypes.CDLL(None)[name]
    except (AttributeError, OSError, TypeError):  # not in this library; no library at all
        return None
    return function
