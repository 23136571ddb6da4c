"""Taking turns: every runtime in a process of its own, one at work at a time.

Thread pools of different runtimes in one process fight, so each gets a worker process (`worker.py`), which blocks on a
pipe while others work. The controller asks one after another, several rounds over, so that a machine that slows down,
or another program, meets all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from benchmarks.harness.rows import Row

Sample = dict[str, float]
"""One turn: figure -> seconds, or what a limit is measured in."""

_REST = 0.03
"""Seconds between turns. onnxruntime's idle threads were seen to spin for about that long, the others' for less."""
_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerError(Exception):
    """The work could not be prepared or done; the worker is there for the next unless its process died."""


class Worker(AbstractContextManager["Worker"]):
    """A process that holds prepared work under keys and does it when asked. Thread pools have `threads` threads."""

    def __init__(self, threads: int) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "benchmarks.harness.worker", str(theirs.fileno())]
        environment = os.environ | dict.fromkeys(_POOLS, str(threads))
        self._process = subprocess.Popen(  # what runtimes print must not get between the tables
            command, pass_fds=[theirs.fileno()], env=environment, stdout=sys.stderr, cwd=Path(__file__).parents[2]
        )
        theirs.close()

    def ask(self, *message: Any) -> Any:
        """("prepare", key, target, *arguments): call target ("module:function") and keep its work -> its facts.
        ("turn", key): do the work once -> its figures. ("drop", key): forget it, and its memory."""
        try:
            self._pipe.send(message)
            done, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise WorkerError(f"its process died with exit code {self._process.wait()}") from error
        if done:
            return answer
        raise WorkerError(answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()  # the worker's loop ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Workers(AbstractContextManager["Workers"]):
    """Workers by name, each started when it is first asked for."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._open = ExitStack()
        self._workers: dict[str, Worker] = {}

    def __getitem__(self, name: str) -> Worker:
        if name not in self._workers:
            self._workers[name] = self._open.enter_context(Worker(self._threads))
        return self._workers[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def prepare(self, work: Mapping[Row, object], notes: dict[str, str]) -> dict[Row, dict[str, Any]]:
        """Prepare each row's work -> its facts. What cannot be prepared goes to `notes`, name -> why."""
        facts = {}
        for row, what in work.items():
            try:
                facts[row] = self[row.peer].ask("prepare", row.name, row.target, row.variant, what)
            except WorkerError as error:
                notes[row.name] = str(error)
                click.echo(f"{row.name}: {error}", err=True)
        return facts

    def drop(self, rows: Iterable[Row]) -> None:
        """Forget the work of these rows."""
        for row in rows:
            with suppress(WorkerError):  # it died, which is told where it happened
                self[row.peer].ask("drop", row.name)

    def take_turns(self, rows: Iterable[Row], rounds: int, notes: dict[str, str]) -> dict[Row, list[Sample]]:
        """`rounds` rounds of all rows' turns, in order. What fails goes to `notes` and is left out from then on."""
        samples: dict[Row, list[Sample]] = {row: [] for row in rows}
        for _ in range(rounds):
            for row in list(samples):
                time.sleep(_REST)
                try:
                    samples[row].append(self[row.peer].ask("turn", row.name))
                except WorkerError as error:
                    notes[row.name] = str(error)
                    del samples[row]
        return samples
