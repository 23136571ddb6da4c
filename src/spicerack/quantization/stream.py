"""The stages that turn a job into a folder: plan memory, calibrate, write tensor after tensor, finish.

    plan         what will be in memory, and how much of the calibration text goes through a block at once
    calibrate    blocks are solved, a file for each beside the output; only where there is calibration text
    write        one tensor is read, rounded (or what was solved is taken), laid out as the format says, appended to a
                 shard; a shard that is whole is renamed, and never made again
    finish       ledger, index, config.json; then the folder appears under its name

One tensor is in memory and one shard unfinished at a time, so that a model may be far larger than memory, and what a
crash costs is at most a shard and a block. What is given up: a tensor is written where the source had it, so that
shards cannot be balanced by what their tensors become; and an error is known only once its tensor is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spicerack.algorithms import solver as solvers
from spicerack.errors import SpicerackError, UsageError
from spicerack.machine.devices import CPU
from spicerack.machine.memory import steady
from spicerack.machine.ranks import ALONE, Ranks
from spicerack.numerics import rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import memory
from spicerack.quantization.calibration import chunks, loop
from spicerack.quantization.calibration.chunks import Text
from spicerack.quantization.calibration.states import Solutions, blocks_folder, clear
from spicerack.quantization.job import Action, Job
from spicerack.quantization.memory import MemoryPlan
from spicerack.quantization.watch import Finished, Watch
from spicerack.storage.durable import json_bytes
from spicerack.storage.files import CONFIG, LEDGER, RUN
from spicerack.storage.ledger import NOT_FINITE, Entry, Ledger
from spicerack.storage.writer import ShardWriter, Writer, is_finished
from spicerack.text.calibration import Calibration


@dataclass(frozen=True, slots=True)
class Means:
    """What a run may use of the machine; none of it changes what the numbers mean.

    device    where blocks compute while they are calibrated; another type of device is another run
    threads   of the CPU; None: one for each core, shared between the ranks
    memory    bytes that each process must not exceed, pages mapped from files left out; None: no limit
    ranks     processes that calibrate together; the first of them writes
    """

    device: torch.device = CPU
    threads: int | None = None
    memory: int | None = None
    ranks: Ranks = ALONE

    @property
    def workers(self) -> int:
        """Threads of this process."""
        return self.threads or max((os.cpu_count() or 1) // self.ranks.count, 1)


def plan(job: Job, calibration: Calibration | None, limit: int | None) -> MemoryPlan:
    """What the run will have in memory.

    Raises UsageError if that cannot be made to fit in `limit` bytes, and for a model or a text that cannot be used.
    """
    if calibration is not None:
        chunks.check(job, calibration)
    text = None if calibration is None else (len(calibration.ids), calibration.ids.shape[1])
    return memory.make(job, text, limit)


def identity(job: Job, calibration: Calibration | None, planned: MemoryPlan, means: Means) -> dict[str, Any]:
    """The facts in which a run that goes on must agree with the one that began: in progress.json and in the ledger."""
    facts = job.identity()
    if calibration is not None:
        text = {"text": calibration.sha256, "tokens": calibration.fingerprint, "chunk": planned.sequences}
        facts |= {"calibration": text}
    if means.device.type != "cpu":
        facts |= {"device": means.device.type}
    if means.ranks.count > 1:
        facts |= {"ranks": means.ranks.count}
    return facts


def calibrate(
    job: Job, calibration: Calibration, planned: MemoryPlan, output: Path, means: Means, watch: Watch
) -> Finished | None:
    """Solve what lies in the model's blocks, a file for each beside `output` -> the last one; continues what is there.

    job           its recipe has a method
    calibration   the text
    planned       how many sequences go through a block at once
    output        beside which the files lie
    means         device, threads and ranks
    watch         told of each block

    None where an earlier run solved the last one. Raises ActivationError (block, layer, token), and UsageError where
    the memory of a GPU does not do.
    """
    try:
        return loop.run(
            job, Text(calibration, planned.sequences), blocks_folder(output), threads=means.workers,
            device=means.device, ranks=means.ranks, watch=watch,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:  # of a GPU
        raise UsageError(
            f"--device {means.device}: its memory is full; {planned.block_bytes / 1e9:.1f} GB were planned at most",
            "begin anew with a smaller --memory, which less of the text at once then fits in",
        ) from error


def is_done(job: Job, output: Path, facts: dict[str, Any]) -> bool:
    """Whether `output` is what the job would write, made by the same call before; False where nothing is there yet.

    facts: of `identity`. Raises OutputError for a folder that is something else.
    """
    return is_finished(output, job.shards, job.source.side_files, facts)


class Stream:
    """A job on its way into the folder `output`, begun or continued.

    job      what was decided of every tensor
    output   the folder that will appear; it must not exist
    facts    in which a continued run must agree, see `identity`

    resumed: whether an earlier run left something. Raises OutputError for an output that exists, is another run's, or
    is at work; and where the disk is too small.
    """

    def __init__(self, job: Job, output: Path, facts: dict[str, Any]) -> None:
        self.job, self.output, self.facts = job, output, facts
        side_bytes = sum((job.source.folder / name).stat().st_size for name in job.source.side_files)
        self._writer = Writer(output, job.shards, facts, side_bytes)
        # blocks that are solved lie apart from shards, and make a run one that goes on as well
        self.resumed = self._writer.resumed or bool(Solutions(blocks_folder(output)))

    @property
    def is_pending(self) -> bool:
        """Whether a shard is missing yet."""
        return next(self._writer.pending(), None) is not None

    @property
    def workshop(self) -> Path:
        """A folder for what is tried on the way; it goes when the output appears."""
        return self._writer.partial / "preflight"

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Within, a refusal leaves no folder behind, unless something in it is finished: a block, or a shard."""
        try:
            yield
        except SpicerackError:
            begun = any((self._writer.partial / shard.file).exists() for shard in self.job.shards)
            if not (self.resumed or begun or Solutions(blocks_folder(self.output))):
                self._writer.discard()
            raise

    def write(self, threads: int, watch: Watch) -> None:
        """All shards that are missing. Raises WeightError (tensor, place, value) and OutputError."""
        solutions = Solutions(blocks_folder(self.output))
        actions = {action.info.name: action for action in self.job.actions}
        shards = list(self._writer.pending())
        pending = sum(actions[unit.source].info.nbytes for shard in shards for unit in shard.units)
        watch.progress(self.job.bytes_before - pending)
        for shard in shards:
            with self._writer.shard(shard) as out:
                for unit in steady(shard.units):
                    action = actions[unit.source]
                    out.entries.append(_write(self.job, action, out, solutions, threads))
                    watch.progress(action.info.nbytes)

    def finish(self, record: dict[str, Any]) -> None:
        """Complete the folder and let it appear. record: what is true of this run only, for run.json."""
        writer = self._writer
        if not writer.complete:
            dropped = (action.entry() for action in self.job.actions if not action.tensors)
            ledger = Ledger(self.facts, (*writer.entries(), *dropped))
            config = json_bytes(dict(self.job.config))
            files = {RUN: json_bytes(record), LEDGER: ledger.content(), CONFIG: config}
            writer.finish(files, self.job.source.folder, self.job.source.side_files)
        clear(blocks_folder(self.output))
        writer.seal()


def _write(job: Job, action: Action, out: ShardWriter, solutions: Solutions, threads: int) -> Entry:
    """Read, quantize or copy, and write one tensor -> its ledger entry."""
    name, stored = action.info.name, action.stored
    w = job.source.read(name)
    if stored is None:
        changed = solutions.changed(name)
        out.write(name, w if changed is None else changed)
        moved = () if changed is None else ("divided by factors that the layers behind it have now",)
        broken = () if _finite(w) else (NOT_FINITE,)
        return action.entry(events=(*job.source.told(name), *moved, *broken))
    # codes are [..., N, K] everywhere but in the files of whoever stores the transpose
    w = w.transpose(-1, -2).contiguous() if stored.transposed else w
    if name in solutions:
        q, error = solutions.read(name, stored), solutions.error(name)
        events = tuple(solutions.events(name))
    else:
        q, events = _solve(job, w, stored.scheme, name, threads)
        error = rounding.relative_error(w, q, threads=threads)
    for key, tensor in job.format.encode(stored, q).items():
        out.write(key, tensor)
    return action.entry(error, (*job.source.told(name), *events))


def _finite(w: torch.Tensor) -> bool:
    """Whether all numbers of a tensor that is copied are finite. A sum is not where one of them is not, and is made at
    the speed of memory; it may overflow, so what it says against a tensor is looked at again."""
    if not w.is_floating_point() or w.itemsize < 2 or bool(torch.isfinite(w.sum(dtype=torch.float64))):
        return True
    return bool(torch.isfinite(w).all())


def _solve(job: Job, w: torch.Tensor, scheme: Scheme, name: str, threads: int) -> tuple[QTensor, tuple[str, ...]]:
    """w [..., N, K], which no calibration reached -> its codes, by a solver that needs nothing else, and events."""
    q = rounding.to_nearest(w, scheme, range_=job.recipe.range_, name=name, threads=threads)
    if job.recipe.method is None:
        return q, ()
    solved = solvers.solve_weight(job.recipe.method.solver, w, q)
    return solved.q, solved.events
