"""`Bar`: the Watch that draws: blocks that are calibrated, what is done inside one, bytes that are written, time left.

The command line shows it above its lines, and `quantize(..., progress=True)` alone. Where nobody looks on, because
standard error is a pipe or a file, nothing is drawn.

How long a run takes nobody knows before its first block is under way: it depends on the text, the solver and the
machine. Then blocks are taken to be alike, which they are to a few per cent in most models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spicerack.quantization.watch import Finished, Trial, Watch, Working

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_EARLY = 0.1
"""Share of the first block's work from which on it tells how long a block takes."""

_BESIDE = 38
"""Columns beside the words, which are cut to what is left: spinner, bar, `0:12:34`, `about 12 min left`."""


class Clock:
    """How long a calibrated run takes from now on, by the blocks that it has done.

    now: the time in seconds, of any beginning.
    """

    def __init__(self, now: float) -> None:
        self._begin = now
        self._seconds: list[float] = []

    def left(self, at: Working, now: float) -> float | None:
        """Seconds from here, inside a block, to the end of the last one; None while nothing is known."""
        spent = now - self._begin
        if self._seconds:
            return max(self._block * (at.count - at.number) - spent, 0.0)
        return spent / at.share * (at.count - at.number) - spent if at.share >= _EARLY else None

    def finished(self, block: Finished, now: float) -> float:
        """Seconds that are left behind a block."""
        self._begin = now
        self._seconds.append(block.seconds)
        return self._block * (block.count - block.number - 1)

    @property
    def _block(self) -> float:
        """What a block takes, in the mean of those of this run."""
        return sum(self._seconds) / len(self._seconds)


def duration(seconds: float) -> str:
    """Seconds for people: `40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Bar(Watch):
    """Draws in `progress`, which is open. nbytes: of the source. calibrated: whether blocks come before bytes.

    left: seconds that the blocks behind the last finished one will take.
    """

    left = 0.0

    def __init__(self, progress: Progress, nbytes: int, *, calibrated: bool) -> None:
        self.bar, self._nbytes = progress, nbytes
        self._clock = Clock(time.monotonic())
        self._writing = not calibrated
        first = "trying the first blocks" if calibrated else "quantizing"
        self._task = progress.add_task(first, total=None if calibrated else nbytes, left="")

    def tried(self, trial: Trial) -> None:
        """See `Watch.tried`."""
        if trial.expected is not None:
            self.bar.update(self._task, left=f"about {duration(trial.expected)} with {trial.solver}")

    def working(self, at: Working) -> None:
        """See `Watch.working`."""
        left = self._clock.left(at, time.monotonic())
        doing, room = f"block {at.number + 1} of {at.count}: {at.doing}", max(self.bar.console.width - _BESIDE, 20)
        self.bar.update(
            self._task, description=doing if len(doing) <= room else f"{doing[: room - 1]}…", total=at.count,
            completed=at.number + at.share, left="" if left is None else f"about {duration(left)} left",
        )  # fmt: skip

    def finished(self, block: Finished) -> None:
        """See `Watch.finished`. Drawn at once: blocks that end faster than the screen is drawn anew are seen, too."""
        self.left = self._clock.finished(block, time.monotonic())
        self.bar.update(
            self._task, completed=block.number + 1, left=f"about {duration(self.left)} left", refresh=True
        )  # fmt: skip

    def progress(self, nbytes: int) -> None:
        """See `Watch.progress`. The first bytes begin a new bar in the place of that of the blocks."""
        if not self._writing:
            self._writing = True
            self.bar.update(self._task, description="writing", total=self._nbytes, completed=0, left="")
        self.bar.advance(self._task, nbytes)


def columns(console: Console, *, disabled: bool = False) -> Progress:
    """The bar's place on a console: what is done, the bar, the time so far and the time left; gone at the end.

    disabled: nothing is drawn, as where nobody looks on.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    looked_at = console.is_terminal or console.is_jupyter
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=8), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"), console=console, transient=True, disable=disabled or not looked_at,
    )  # fmt: skip


@contextmanager
def shown(nbytes: int, *, calibrated: bool) -> Iterator[Bar]:
    """A bar on standard error, within; as of `Bar`."""
    from rich.console import Console

    with columns(Console(stderr=True)) as progress:
        yield Bar(progress, nbytes, calibrated=calibrated)
