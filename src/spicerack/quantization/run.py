"""What `spicerack.quantize` does: a module in memory -> a new module; a model folder -> a smaller folder.

    recipe -> decided -> prepare -> plan -> preflight -> calibrate -> write -> finish

How it works. `prepare` decides about every tensor from headers; `plan` says what memory that takes; what is left is
work that cannot be refused any more. With calibration text the first blocks are tried from end to end (`preflight`),
then every block is solved into a file of its own (`calibration/loop.py`). In the end, with or without text, all tensors
stream through once, into shards (`stream.py`), and the folder appears by one rename.

A run can be killed anywhere: blocks that are solved and shards that are written stay, and the same call continues, to
the same bytes. Which call is the same is written down first (`stream.identity`); another one is refused by name.

What is given up. A module in memory is rounded to nearest only: calibration needs a model that it can run block by
block from a folder. Solved blocks and hidden states lie on disk beside the output while the run lasts.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spicerack.algorithms import method as methods
from spicerack.algorithms.method import Method
from spicerack.errors import UsageError
from spicerack.evaluation import check as checks
from spicerack.evaluation.check import Check
from spicerack.kernels.kernel import Compute
from spicerack.machine import devices, processor
from spicerack.machine.memory import peak_rss_bytes
from spicerack.models import choices
from spicerack.quantization import bar, preflight
from spicerack.quantization.job import Job, Sizes, prepare
from spicerack.quantization.memory import MemoryPlan
from spicerack.quantization.modules.quantize import quantize_module
from spicerack.quantization.recipe import Recipe, decided
from spicerack.quantization.stream import Means, Stream, calibrate, identity, is_done, plan
from spicerack.quantization.watch import Finished, Watch
from spicerack.storage.files import local
from spicerack.storage.writer import SHARD_BYTES
from spicerack.text.calibration import Calibration

Progress = Callable[[int], None]
"""Called with the bytes of each source tensor as it is done."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished run did.

    output               the folder
    sizes                of its tensors, before and after
    seconds              of this run; of one that continued, from there on
    planned_peak_bytes   of memory, as planned
    peak_rss_bytes       the most that the process had, as measured
    resumed              whether it went on where an earlier one stopped
    format               of the folder
    notes                what a person should know of it; the command prints them before work starts
    already_there        whether an earlier call of the same had finished it, so that nothing was left to do
    output_error         ||out - out_float|| / ||out_float|| of the last block's hidden states; None where no text went
                         through it in this run
    output_error_rounded the same, were that block's layers rounded to nearest
    check                what the folder lost, as far as it was measured behind the run; None where nobody asked
    """

    output: Path
    sizes: Sizes
    seconds: float
    planned_peak_bytes: int
    peak_rss_bytes: int
    resumed: bool
    format: str
    notes: tuple[str, ...] = ()
    already_there: bool = False
    output_error: float | None = None
    output_error_rounded: float | None = None
    check: Check | None = None

    def as_dict(self) -> dict[str, Any]:
        """By the names of the command line's contract."""
        return {
            "output": str(self.output),
            **dataclasses.asdict(self.sizes),
            "seconds": self.seconds,
            "planned_peak_bytes": self.planned_peak_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "resumed": self.resumed,
            "already_there": self.already_there,
            "format": self.format,
            "notes": list(self.notes),
            "output_error": self.output_error,
            "output_error_rounded": self.output_error_rounded,
            **({} if self.check is None else {"check": self.check.as_dict()}),
        }


@dataclass(frozen=True, slots=True)
class FolderOptions:
    """What `quantize` takes for folders and not for modules, by the same names; the defaults are what none means."""

    output: str | Path | None
    calibration: Calibration | None = None
    effort: str = "normal"
    device: str = "cpu"
    threads: int | None = None
    memory: int | None = None
    shard_bytes: int | None = None
    check: bool = False
    progress: Progress | bool | None = None


def in_memory(
    module: torch.nn.Module, chosen: Recipe, compute: Compute | None, options: FolderOptions
) -> torch.nn.Module:
    """A new module, rounded to nearest by the recipe `chosen`.

    Raises UsageError for methods that need text, and for options of folders.
    """
    if options.calibration is not None or chosen.method not in (None, Method()) or chosen.observer is not None:
        raise UsageError("a module in memory is only rounded to nearest", "save it as a folder, and quantize that")
    if chosen.for_ is not None:
        raise UsageError(f"for {chosen.for_}: engines read folders", "save the module as a folder, and quantize that")
    if options.effort != "normal":
        raise UsageError(f"effort {options.effort}: a module in memory is only rounded to nearest", "leave it out")
    if options.device != "cpu":
        raise UsageError(f"device {options.device}: a module is rounded to nearest where it is", "move the module")
    others = (
        options.output,
        options.threads,
        options.memory,
        options.shard_bytes,
        options.progress or None,
        options.check or None,
    )
    if any(option is not None for option in others):
        raise UsageError(
            "output, threads, memory, shard_bytes, check and progress are for folders; a module is quantized in memory",
            "write it with spicerack.save(module, folder)",
        )
    return quantize_module(module, chosen, compute)


@torch.inference_mode(False)  # solvers take gradients
def of_folder(model: str | Path, chosen: Recipe, options: FolderOptions) -> Summary:
    """A smaller folder, by this process alone. Raises UsageError without an output, and what `execute` raises."""
    calibration, device = options.calibration, options.device
    if options.output is None:
        raise UsageError(f"no output folder for {model}", "pass output='...'")
    if device != "cpu" and calibration is None:
        raise UsageError(f"device {device}: without calibration text all is done on the CPU", "pass calibration=...")
    means = Means(devices.find(device), options.threads, options.memory)
    with_text = calibration is not None
    recipe_ = decided(chosen, with_text, options.effort)
    job = prepare(model, recipe_, with_text=with_text, shard_bytes=options.shard_bytes or SHARD_BYTES)
    told = notes(job, calibration, chosen, options.effort)
    with _watching(options.progress, job, calibrated=with_text) as watch:
        summary = execute(job, local(options.output), calibration=calibration, means=means, watch=watch, notes=told)
    assert summary is not None, "this is the only process"
    return check_written(summary, job, calibration, means) if options.check else summary


@contextmanager
def _watching(progress: Progress | bool | None, job: Job, *, calibrated: bool) -> Iterator[Watch]:
    """Who looks on, within, as the caller of `quantize` wished."""
    if progress is True:
        with bar.shown(job.bytes_before, calibrated=calibrated) as watch:
            yield watch
    else:
        yield Progressing(progress) if progress else Watch()


class Progressing(Watch):
    """The Watch of somebody who only wants to know how far it is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def progress(self, nbytes: int) -> None:
        """See `Watch.progress`."""
        self._progress(nbytes)


def notes(job: Job, calibration: Calibration | None, asked: Recipe, effort: str) -> tuple[str, ...]:
    """What a person should know before work starts: of the model, the text, speed here, and what more effort would do.

    job: decided. calibration: the text, if there is one. asked: the recipe before its method was decided. effort: what
    may be spent.
    """
    slow = choices.without_vectors(action.stored for action in job.actions if action.stored is not None)
    chosen = calibration is not None and asked.method is None and effort == "normal"
    dearer = methods.gain_of_effort(asked.scheme) if chosen else None
    text = () if calibration is None else calibration.notes
    return (*job.notes, *text, *slow, *(() if dearer is None else (dearer,)))


def execute(
    job: Job,
    output: Path,
    *,
    calibration: Calibration | None = None,
    means: Means = Means(),  # noqa: B008  # frozen
    watch: Watch = Watch(),  # noqa: B008  # it has no state
    notes: tuple[str, ...] = (),
) -> Summary | None:
    """Write what `job` decided into `output` -> what was done; None from every rank but the first, which writes.

    job           of `prepare`, its recipe `decided`
    output        the folder to write; if it is there, by the same call before, nothing is done
    calibration   what flows through the model; None where methods need none. Models of many blocks are tried first
    means         what the run may use of the machine
    watch         told how it gets on; asked whether to stop
    notes         of the function `notes`, for the summary

    Raises UsageError (memory would be exceeded), WeightError (tensor, place, value), ActivationError (the same of what
    flows), LoadError (the trial's folder computes something else) and OutputError; whatever was finished stays, and the
    same call continues. KeyboardInterrupt where the watch asked for it.
    """
    begin = time.time()
    ranks, planned = means.ranks, plan(job, calibration, means.memory)
    facts = identity(job, calibration, planned, means)
    done = ranks.first and is_done(job, output, facts)
    stream = Stream(job, output, facts) if ranks.first and not done else None
    with nullcontext() if stream is None else stream.discarding():
        last = _solved(job, calibration, planned, output, means, watch, stream)
        if stream is not None:
            stream.write(means.workers, watch)
    if not ranks.first:
        return None
    summary = Summary(
        output=output,
        sizes=job.sizes(),
        seconds=round(time.time() - begin, 3),
        planned_peak_bytes=planned.peak_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        resumed=stream is not None and stream.resumed,
        format=job.format.name,
        notes=notes,
        already_there=done,
        output_error=None if last is None else last.error,
        output_error_rounded=None if last is None else last.rounded,
    )
    if stream is None:
        return summary
    machine = {"platform": platform.platform(), "processor": processor.name(), "cpus": os.cpu_count()}
    source = str(job.source.folder)
    stream.finish({**summary.as_dict(), "command": sys.argv, "source": source, "machine": machine})
    return summary


def check_written(
    summary: Summary,
    job: Job,
    calibration: Calibration | None,
    means: Means,
    progress: Callable[[str, float], None] | None = None,
) -> Summary:
    """Measure what the folder of a finished run lost -> the summary with it; the figures are in the folder's ledger.

    summary, job, calibration, means   of the run; of a folder that was there already the check in its ledger is taken
    progress                           called with what is being done and the share of it, 0 to 1
    """
    checked = checks.check(
        summary.output, job.source.folder, seconds=summary.seconds, device=str(means.device), memory=means.memory,
        spare=None if calibration is None else calibration.spare, progress=progress, kept=summary.already_there,
    )  # fmt: skip
    return dataclasses.replace(summary, check=checked)


def _solved(
    job: Job,
    calibration: Calibration | None,
    planned: MemoryPlan,
    output: Path,
    means: Means,
    watch: Watch,
    stream: Stream | None,
) -> Finished | None:
    """Try the first blocks of a run that begins, then solve all: the last one, or None where none had to be solved.

    stream: of the first rank; None of the others, and where all is done. The others are those of `calibrate`.
    """
    needed = stream is not None and calibration is not None and stream.is_pending
    if stream is not None and calibration is not None and needed and not stream.resumed:
        trial = preflight.run(job, calibration, stream.workshop, means)
        if trial is not None:
            watch.tried(trial)
    # the first rank knows, and all must go into the loop, or none
    if not bool(means.ranks.largest(torch.tensor(needed, dtype=torch.bool, device="cpu"))):
        return None
    assert calibration is not None, "a rank needs it"
    return calibrate(job, calibration, planned, output, means, watch)
