"""llama.cpp's own count: `llama-fit-params`, which builds a model's graph and allocates nothing.

With --fit-print it writes a line for each device and one for the processor, in whole MiB, rounded down:

    CUDA0 4403 1024 258
    Host 281 0 24
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from spicerack.errors import UsageError
from spicerack.machine import programs
from spicerack.planning.engine import Counted, DryRun

PROGRAM = "llama-fit-params"
_LINE = re.compile(r"(\S.*?) (\d+) (\d+) (\d+) *")
"""Device, weights, cache, buffers (common/fit.cpp, `common_fit_print`)."""
_MIB = 1 << 20
_SECONDS = 120.0
"""It takes .05 s, and a second where drivers of cards start; nobody waits longer than this."""
_SAID = 3
"""Lines of its complaint that are repeated."""
_SETTINGS = "LLAMA_ARG_"
"""How variables begin that people set for their server, and that would be counted in place of what is asked for."""


def ask(file: Path, options: Sequence[str], planned: int) -> DryRun:
    """What it counts for a GGUF file. options: of llama.cpp. planned: bytes of buffers, by our formula.

    Raises UsageError where it is not installed, refuses the file, or answers what is not understood.
    """
    remedy = f"install llama.cpp, which has {PROGRAM}, or leave --exact out: plan's own figures need nothing"
    arguments = ["-m", str(file.absolute()), "--fit-print", "on", *options]
    answer = programs.ask(PROGRAM, arguments, remedy=remedy, deaf_to=_SETTINGS, seconds=_SECONDS)
    lines = [match for line in answer.output.splitlines() if (match := _LINE.fullmatch(line))]
    if answer.code or not lines:
        said = [line.strip() for line in (answer.output + answer.complaints).splitlines() if line.strip()]
        reason = " / ".join(said[-_SAID:])
        raise UsageError(
            f"{PROGRAM} counts nothing (exit {answer.code}): {reason or 'it says nothing'}",
            "it may be older than the model, or than --fit-print; leave --exact out",
        )
    counted = tuple(Counted(m[1], int(m[2]) * _MIB, int(m[3]) * _MIB, int(m[4]) * _MIB) for m in lines)
    note = "buffers hold the logits of a whole batch, as llama-cli's do; llama-server keeps a row for each user"
    return DryRun(PROGRAM, counted, _MIB, planned, note)
