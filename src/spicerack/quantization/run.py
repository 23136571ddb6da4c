"""The loop: one tensor in memory, one shard on disk at a time; and the same for a module in memory."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from spicerack.algorithms import method as methods
from spicerack.algorithms import solver as solvers
from spicerack.algorithms.method import Method
from spicerack.errors import RecipeError, SchemeError, UsageError
from spicerack.kernels.kernel import Compute
from spicerack.machine import devices
from spicerack.machine.memory import peak_rss_bytes
from spicerack.machine.ranks import ALONE, Ranks
from spicerack.numerics import rounding
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import memory as calibrating_plan
from spicerack.quantization import preflight, recipe
from spicerack.quantization.calibration import loop
from spicerack.quantization.calibration.chunks import Text
from spicerack.quantization.calibration.states import Solutions, blocks_folder, clear
from spicerack.quantization.job import Action, Job, prepare
from spicerack.quantization.memory import MemoryPlan
from spicerack.quantization.module import quantize_module
from spicerack.quantization.recipe import Range, Recipe, Rule, check_observer, check_range
from spicerack.quantization.watch import Finished, Trial, Watch
from spicerack.storage.durable import json_bytes
from spicerack.storage.files import CONFIG, LEDGER, RUN
from spicerack.storage.ledger import Entry, Ledger
from spicerack.storage.writer import SHARD_BYTES, ShardWriter, Writer
from spicerack.text.calibration import Calibration

OBSERVER = "percentile"
"""The best measured (docs/quality.md)."""
Progress = Callable[[int], None]


@overload
def quantize(
    model: torch.nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    range_: Range | None = ...,
    rules: Iterable[str | Rule] = ...,
    compute: Compute | None = ...,
) -> torch.nn.Module: ...
@overload
def quantize(
    model: str | Path,
    scheme: str | Scheme | Recipe,
    *,
    output: str | Path,
    range_: Range | None = ...,
    method: str | Method | None = ...,
    observer: str | None = ...,
    calibration: Calibration | None = ...,
    rules: Iterable[str | Rule] = ...,
    device: str = ...,
    threads: int | None = ...,
    memory: int | None = ...,
    shard_bytes: int | None = ...,
    progress: Progress | None = ...,
) -> dict[str, Any]: ...
def quantize(
    model: torch.nn.Module | str | Path,
    scheme: str | Scheme | Recipe,
    *,
    output: str | Path | None = None,
    range_: Range | None = None,
    method: str | Method | None = None,
    observer: str | None = None,
    calibration: Calibration | None = None,
    rules: Iterable[str | Rule] = (),
    compute: Compute | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> torch.nn.Module | dict[str, Any]:
    """Quantize a module -> a new module, or a model folder (or hub id) -> the folder `output` and a summary of it.

    scheme: a name such as "w4g128", a Scheme, or a Recipe. range_: "opt" (default) or "absmax"; method: a chain
    such as "gptq" or "awq+gptq", for folders; observer: such as "mse", for static activations; all three win
    over the Recipe's. calibration: what flows through a folder's model, of `calibration.read`. rules: "PATTERN=SCHEME"
    or "PATTERN=skip"; later ones win, and all over the Recipe's. device: where a folder's blocks compute while they are
    calibrated.
    threads, shard_bytes, progress (called with the bytes of each source tensor as it is done), memory (bytes that must
    not be exceeded, pages that are mapped from files left out): for folders. compute: as in `load`, for modules.
    Raises the errors of `errors.py`.
    """
    what = recipe.of(scheme, rules)
    chain = methods.parse(method) if isinstance(method, str) else method or what.method
    seen_by = what.observer if observer is None else check_observer(observer)
    what = dataclasses.replace(what, range_=check_range(range_ or what.range_), method=chain, observer=seen_by)
    if isinstance(model, torch.nn.Module):
        if calibration is not None or what.method not in (None, Method()) or what.observer is not None:
            raise UsageError("a module in memory is only rounded to nearest", "save it as a folder, and quantize that")
        if device != "cpu":
            raise UsageError(f"device {device}: a module is rounded to nearest where it is", "move the module")
        if any(option is not None for option in (output, threads, memory, shard_bytes, progress)):
            raise UsageError(
                "output, threads, memory, shard_bytes and progress are for folders; a module is quantized in memory",
                "write it with spicerack.save(module, folder)",
            )
        return quantize_module(model, what, compute)
    if compute is not None:
        raise UsageError("compute is no property of a folder", "pass it to load(folder, compute=...)")
    if output is None:
        raise UsageError(f"no output folder for {model}", "pass output='...'")
    if device != "cpu" and calibration is None:
        raise UsageError(f"device {device}: without calibration text all is done on the CPU", "pass calibration=...")
    where = devices.find(device)
    job = prepare(model, calibrated(what, calibration is not None), shard_bytes=shard_bytes or SHARD_BYTES)
    return execute(
        job, Path(output), calibration=calibration, device=where, threads=threads, memory=memory, progress=progress
    )


def calibrated(what: Recipe, with_text: bool) -> Recipe:
    """The recipe with its method and observer decided.

    Raises RecipeError or SchemeError if they need a calibration text and there is none, or an observer has no use.
    """
    method = what.method or methods.auto(what.scheme, with_text)
    if method.needs_text and not with_text:
        raise RecipeError(f"{method} needs calibration text", "pass --calib FILE (calibration=...), or --method rtn")
    if what.is_static and not with_text:
        raise SchemeError(
            "static activation scales (a8s) need calibration text", "pass --calib FILE (calibration=...), or use a8"
        )
    if what.observer is not None and not what.is_static:
        raise RecipeError(f"observer {what.observer}: no scheme has static activations", "use a8s, such as w8a8s")
    observer = (what.observer or OBSERVER) if what.is_static else None
    return dataclasses.replace(what, method=method, observer=observer)


def plan(job: Job, calibration: Calibration | None, memory: int | None) -> MemoryPlan:
    """What will be in memory. Raises UsageError if that cannot be made to fit in `memory` bytes."""
    text = None if calibration is None else (len(calibration.ids), calibration.ids.shape[1])
    return calibrating_plan.make(job, text, memory)


def execute(
    job: Job,
    output: Path,
    *,
    calibration: Calibration | None = None,
    device: torch.device = devices.CPU,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    tried: Callable[[Trial], None] = lambda _: None,
    finished: Callable[[Finished], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Write what `job` decided -> the summary that the command line prints.

    device: where blocks compute while they are calibrated; another type of device is another run.
    tried: called with what became of the model's first blocks, where they were tried before the rest is calibrated;
    finished: called with each block that is calibrated; stopping: asked behind each, whether to raise KeyboardInterrupt
    there. ranks: processes that calibrate together; the first of them writes, the others return an empty summary.
    memory: bytes that each process must not exceed.
    Raises UsageError (it would), WeightError (tensor, place, value), ActivationError (the same of what flows) and
    OutputError; whatever was finished stays and the same call continues.
    """
    started = time.time()
    threads = threads or max((os.cpu_count() or 1) // ranks.count, 1)
    planned = plan(job, calibration, memory)

    def calibrate() -> None:
        assert calibration is not None
        try:
            loop.run(
                job, Text(calibration, planned.sequences), blocks_folder(output), threads=threads,
                device=device, ranks=ranks, watch=_Callbacks(finished, stopping),
            )  # fmt: skip
        except torch.OutOfMemoryError as error:  # of a GPU
            raise UsageError(
                f"--device {device}: its memory is full; {planned.block_bytes / 1e9:.1f} GB were planned at most",
                "begin anew with a smaller --memory, which less of the text at once then fits in",
            ) from error

    if not ranks.first:
        if bool(ranks.largest(torch.tensor(False))):
            calibrate()
        return {}
    identity = job.identity()
    if calibration is not None:
        facts = {"text": calibration.sha256, "tokens": calibration.fingerprint, "chunk": planned.sequences}
        identity |= {"calibration": facts}
    if device.type != "cpu":
        identity |= {"device": device.type}
    if ranks.count > 1:
        identity |= {"ranks": ranks.count}
    side_bytes = sum((job.source.folder / name).stat().st_size for name in job.source.side_files)
    writer = Writer(output, job.shards, identity, side_bytes)
    solved = Solutions(blocks_folder(output))
    resumed = writer.resumed or bool(solved)
    needed = calibration is not None and next(writer.pending(), None) is not None
    if needed and not resumed and calibration is not None:
        again = partial(execute, device=device, threads=threads)
        trial = preflight.run(job, calibration, writer.partial / "preflight", again)
        if trial is not None:
            tried(trial)
    if bool(ranks.largest(torch.tensor(needed))):
        calibrate()
        solved = Solutions(blocks_folder(output))
    by_source = {action.info.name: action for action in job.actions}
    done = progress or (lambda _: None)
    waiting = list(writer.pending())
    done(job.bytes_before - sum(by_source[unit.source].info.nbytes for shard in waiting for unit in shard.units))
    for shard in waiting:
        with writer.shard(shard) as out:
            for unit in shard.units:
                action = by_source[unit.source]
                out.entries.append(_one(job, action, out, solved, threads))
                done(action.info.nbytes)
    result = {"output": str(output), **job.summary(), "seconds": round(time.time() - started, 3)}
    result |= {"planned_peak_bytes": planned.peak_bytes, "peak_rss_bytes": peak_rss_bytes(), "resumed": resumed}
    if not writer.complete:
        ledger = Ledger(identity, (*writer.entries(), *map(_dropped, _drops(job))))
        files = {RUN: _run(job, result), LEDGER: ledger.content(), CONFIG: json_bytes(dict(job.config))}
        writer.finish(files, job.source.folder, job.source.side_files)
    clear(blocks_folder(output))
    writer.seal()
    return result


class _Callbacks(Watch):
    """The calibrated loop's watch, as `execute` is given it."""

    def __init__(self, finished: Callable[[Finished], None], stopping: Callable[[], bool]) -> None:
        self._finished, self._stopping = finished, stopping

    def finished(self, block: Finished) -> None:
        self._finished(block)

    def stopping(self) -> bool:
        return self._stopping()


def _one(job: Job, action: Action, out: ShardWriter, solved: Solutions, threads: int) -> Entry:
    """Read, quantize or copy, write one tensor -> its ledger entry."""
    name = action.info.name
    w = job.source.read(name)
    if action.planned is None:
        changed = solved.changed(name)
        out.write(name, w if changed is None else changed)
        moved = () if changed is None else ("divided by factors that the layers behind it have now",)
        return _entry(action, action.info.nbytes, events=moved)
    p = action.planned
    w = w.transpose(-1, -2).contiguous() if p.transposed else w
    events: list[str] = []
    if name in solved:
        q, events, error = solved.read(name, p), solved.events(name), solved.error(name)
    else:
        q = rounding.to_nearest(w, p.scheme, range_=job.recipe.range_, name=name, threads=threads)
        if job.recipe.method is not None:
            alone = solvers.solve_weight(job.recipe.method.solver, w, q)
            q, events = alone.q, list(alone.events)
        error = rounding.relative_error(w, q, threads=threads)
    for key, tensor in job.format.encode(p, q).items():
        out.write(key, tensor)
    return _entry(action, sum(slot.nbytes for slot in action.slots), error, events)


def _entry(action: Action, bytes_after: int, error: float | None = None, events: Iterable[str] = ()) -> Entry:
    info = action.info
    return Entry(
        info.name, action.what, action.why, action.layer_type,
        action.planned.scheme.name if action.planned else None,
        info.dtype, info.shape, info.nbytes, bytes_after, error, tuple(events),
    )  # fmt: skip


def _dropped(action: Action) -> Entry:
    return _entry(action, 0)


def _drops(job: Job) -> list[Action]:
    return [action for action in job.actions if not action.slots]


def _run(job: Job, result: dict[str, Any]) -> bytes:
    """What is true of this run only: the one file that differs between two runs of the same command."""
    machine = {"platform": platform.platform(), "processor": platform.processor(), "cpus": os.cpu_count()}
    return json_bytes({**result, "command": sys.argv, "source": str(job.source.folder), "machine": machine})
