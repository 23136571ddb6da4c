"""How much memory this process has used, as the operating system counts it.

It is what a run reports beside what was planned (`quantization.memory`): a plan that nobody compares with the machine
is a guess.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path


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
