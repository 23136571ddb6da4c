"""What `spicerack quantize` shows: what will be done, a line for each block, what came out.

All of it goes through a console that is silent on every rank but the first: processes of torchrun share a terminal.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from spicerack.cli import _output
from spicerack.errors import counted, listed

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from spicerack.algorithms.method import Method
    from spicerack.machine.ranks import Ranks
    from spicerack.quantization.job import Job, Sizes
    from spicerack.quantization.memory import MemoryPlan
    from spicerack.quantization.run import Summary
    from spicerack.quantization.watch import Finished, Trial, Watch
    from spicerack.storage.ledger import Entry
    from spicerack.text.calibration import Calibration


def bar(ranks: Ranks) -> Progress:
    """The bar's place, on standard error; the first rank draws there, and nobody where that is no terminal."""
    from spicerack.quantization.bar import columns

    return columns(_output.console(as_json=True), disabled=not ranks.first)


def watching(place: Progress, job: Job, stopping: Callable[[], bool], ranks: Ranks, *, calibrated: bool) -> Watch:
    """The Watch that draws the bar and prints a line for each block, on the first rank.

    place: open, see `bar`. job: how many bytes there are to do. stopping: whether Ctrl+C asked for an end, passed on to
    every rank. ranks: of several the first one prints. calibrated: whether blocks are, before bytes are written.
    """
    from spicerack.quantization.bar import Bar, duration

    class Lines(Bar):
        def tried(self, trial: Trial) -> None:
            super().tried(trial)
            self.bar.console.print(_trial(trial), soft_wrap=True, highlight=False)
            if (expected := _expected(trial, job.recipe.method)) is not None:
                self.bar.console.print(expected, soft_wrap=True, highlight=False)

        def finished(self, block: Finished) -> None:
            super().finished(block)
            if ranks.first:
                until = f"; about {duration(self.left)} left" if block.number + 1 < block.count else ""
                self.bar.console.print(_line(block, until), soft_wrap=True, highlight=False)

        def stopping(self) -> bool:
            return stopping()

    return Lines(place, job.bytes_before, calibrated=calibrated)


def _trial(trial: Trial) -> str:
    """One line on the first blocks, tried before the rest: how far what was loaded is from what was computed."""
    return (
        f"preflight: {trial.blocks} of {counted(trial.count, 'block')} rounded, saved and loaded again: as computed "
        f"within {trial.difference:.2%} (off the float model's by {trial.error:.2%}), {trial.seconds:.1f} s"
    )


def _expected(trial: Trial, method: Method | None) -> str | None:
    """One line on how long the run will take, and what a quicker method would; None where nobody knows."""
    from spicerack.algorithms.method import LEARNING
    from spicerack.quantization.bar import duration

    if trial.expected is None or method is None:
        return None
    seconds, alone = trial.expected, f"about {duration(trial.rounded)} rounded without --calib"
    if method.solver == trial.solver:
        return f"expected: about {duration(seconds)} for {counted(trial.count, 'block')}; {alone}"
    least, most = (duration(factor * seconds) for factor in LEARNING)
    quicker = f"{trial.solver} takes about {duration(seconds)}"
    return f"expected: {least} to {most} for {counted(trial.count, 'block')}; {quicker}, {alone}"


def _line(block: Finished, until: str) -> str:
    """What is printed of a calibrated block: layers, bits, its error beside that of plain rounding, time and memory.

    The error of plain rounding is left out where it is the same, which it is for methods that only round. Events of
    single layers follow, a line each. until: how long the blocks behind it will take.
    """
    from rich.markup import escape

    plain = f" (rounded to nearest {block.rounded:.2%})" if block.rounded != block.error else ""
    events = "".join(f"\n  [yellow]note[/yellow] {escape(event)}" for event in block.events)
    return (
        f"{block.block}: {counted(block.layers, 'layer')}, {block.bits:.2f} bits, output off by {block.error:.2%}"
        f"{plain}, {block.seconds:.1f} s, peak {_output.size(block.peak_rss_bytes)}{until}{events}"
    )


def announce(
    job: Job,
    calibration: Calibration | None,
    planned: MemoryPlan,
    device: torch.device,
    console: Console,
    notes: Iterable[str],
) -> None:
    """Print what will be done, before it begins: model, recipe, format, calibration text, memory, device and notes.

    calibration   the text and its tokens; None where the method needs none, and then there is no line of it
    planned       what the run will have in memory; on another device than the CPU also the share of it that lies there
    device        where blocks compute
    console       where people read; silent on all ranks but the first
    notes         what a person should know
    """
    from rich.markup import escape

    console.print(f"[bold]model [/bold] {escape(str(job.source.folder))}", soft_wrap=True)
    console.print(f"[bold]recipe[/bold] {escape(str(job.recipe))}", soft_wrap=True)
    console.print(f"[bold]format[/bold] {job.format.name}", soft_wrap=True)
    if calibration is not None:
        sequences, length = calibration.ids.shape
        text = f"{calibration.source}, {counted(sequences, 'sequence')} of up to {counted(length, 'token')}"
        console.print(f"[bold]calib [/bold] {escape(text)}", soft_wrap=True)
    console.print(f"[bold]memory[/bold] {_output.size(planned.peak_bytes)} at most, {planned.where}", soft_wrap=True)
    if device.type != "cpu":
        size = _output.size(planned.block_bytes)
        console.print(f"[bold]device[/bold] {device}, {size} of its memory at most", soft_wrap=True)
    if calibration is not None:
        told = "told before the first block, or within it; without --calib weights are rounded at the speed of the disk"
        console.print(f"[bold]time  [/bold] {told}", soft_wrap=True)
    for note in notes:
        console.print(f"[yellow]note[/yellow]   {escape(note)}", soft_wrap=True)
    console.print()


def foretell(job: Job, console: Console) -> None:
    """Print what would come out: the table and the totals of a run, without the errors that only a run finds."""
    _table([action.entry() for action in job.actions], console)
    console.print(f"\n{_totals(job.sizes())}", soft_wrap=True)
    console.print("nothing was written: this was a dry run")


def report(summary: Summary, console: Console) -> None:
    """Print what came out: a row for each kind of layer with its sizes and error, the totals, time and memory.

    Errors are read from the folder's ledger, and not kept from the run: what is shown is what the folder says of
    itself.
    """
    from rich.markup import escape

    from spicerack.storage import ledger

    written = ledger.read(summary.output)
    assert written is not None, "quantized just now"
    _table(written.entries, console)
    console.print(f"\n{_totals(summary.sizes)}", soft_wrap=True)
    if summary.already_there:
        console.print(f"{escape(str(summary.output))} is already there, from the same command", soft_wrap=True)
    else:
        resumed = ", resumed" if summary.resumed else ""
        console.print(f"{summary.seconds:.1f} s, peak memory {_output.size(summary.peak_rss_bytes)}{resumed}")
    if broken := [entry.tensor for entry in written.entries if ledger.NOT_FINITE in entry.events]:
        told = f"{listed(broken, 3, 'tensors')}: {ledger.NOT_FINITE}"
        console.print(f"[yellow]note[/yellow]   {escape(told)}", soft_wrap=True)
    if summary.output_error is not None and summary.output_error_rounded is not None:
        console.print(_output_error(summary.output_error, summary.output_error_rounded), soft_wrap=True)


def conclude(summary: Summary, source: Path, console: Console) -> None:
    """Print what the check measured, if there was one, or what to do next.

    source: the float model's folder, for the command that compares the two.
    """
    from spicerack.cli import _loss
    from spicerack.models.kind import obstacle
    from spicerack.storage.files import CONFIG, MAX_CONFIG_BYTES, read_json

    if summary.check is not None:
        for line in _loss.checked(summary.check):
            console.print(line, soft_wrap=True, markup=False)
    elif obstacle(read_json(source / CONFIG, MAX_CONFIG_BYTES)) is None:  # else there is nothing that compares them
        line = shlex.join(["spicerack", "eval", str(summary.output), "--against", str(source), "--text", "FILE"])
        console.print(f"next: {line}", soft_wrap=True, markup=False)


def _table(entries: Iterable[Entry], console: Console) -> None:
    """A row for each kind of layer: what it is in now, how many there are, sizes, and the error where one is known.

    The error is of weights, which says little of a calibrated model: codes that were chosen by what flows through it
    are farther from the weights than rounded ones, and nearer by what comes out. So the column says whose it is.
    """
    from rich.table import Table

    from spicerack.storage import ledger

    rows = ledger.by_layer_type(entries)
    known = any(row.error is not None for row in rows)
    titles = ("layers", "numbers", "count", "before", "after", *(["weight error"] if known else []))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in titles:
        table.add_column(name, justify="left" if name in ("layers", "numbers") else "right", no_wrap=name != "layers")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.2%}"
        sizes = (_output.size(row.bytes_before), _output.size(row.bytes_after))
        table.add_row(row.layers, row.numbers, str(row.count), *sizes, *([error] if known else []))
    console.print(table)


def _totals(total: Sizes) -> str:
    """Sizes before and after, and bits of a weight, in a line."""
    before, after, stored = total.bytes_before, total.bytes_after, total.bytes_stored
    coded = f" (as stored {_output.size(stored)}, {stored / after:.2f} times)" if stored != before else ""
    return (
        f"[bold]{_output.size(before)} -> {_output.size(after)}[/bold], {before / after:.2f} times smaller{coded}; "
        f"{total.bits_per_weight:.2f} bits a quantized weight, {total.bits_per_weight_total:.2f} in all"
    )


def _output_error(error: float, rounded: float) -> str:
    """What the last block gives, beside the float model's: all that was lost in front of it is in that, too."""
    plain = f" (with its layers rounded to nearest: {rounded:.2%})" if rounded != error else ""
    return f"output of the last block off by {error:.2%}{plain}"
