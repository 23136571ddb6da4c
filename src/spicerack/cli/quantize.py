"""`spicerack quantize MODEL -o OUT --scheme w4g128`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from spicerack import plugins
from spicerack.cli import _output, _rules
from spicerack.cli._commands import About
from spicerack.errors import RecipeError, UsageError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from spicerack.machine.ranks import Ranks
    from spicerack.quantization.job import Job
    from spicerack.quantization.memory import MemoryPlan
    from spicerack.quantization.recipe import Recipe, Rule
    from spicerack.quantization.run import Summary
    from spicerack.quantization.watch import Finished, Trial, Watch
    from spicerack.text.calibration import Calibration

ABOUT = About(place=20, summary="Turn a model folder into a smaller one that runs.", resumes=True)
_LENGTH = 512


def _names(folder: str) -> str:
    """Names of the plug-ins of a folder, for help."""
    return ", ".join(plugins.names(folder))


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """ "500MB" -> 500,000,000."""
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,11})\s*([kmg]b)?", value.lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size such as 500MB or 2GB", ctx, param)
    return int(match[1]) * _UNITS[match[2] or ""]


def _recipe(
    path: Path | None,
    scheme: str | None,
    range_: str | None,
    method: str | None,
    observer: str | None,
    rules: list[Rule],
) -> Recipe:
    from spicerack.algorithms import method as methods
    from spicerack.numerics.scheme import parse
    from spicerack.quantization import recipe

    if path is None and scheme is None:
        raise RecipeError("neither --scheme nor --recipe is given", "for example --scheme w4g128")
    if path is None:
        assert scheme is not None
        made = recipe.Recipe(parse(scheme))
    else:
        made = recipe.read(path)
        if scheme is not None:
            made = dataclasses.replace(made, scheme=parse(scheme))
    if range_ is not None:
        made = dataclasses.replace(made, range_=recipe.check_range(range_))
    if method is not None:
        made = dataclasses.replace(made, method=None if method == "auto" else methods.parse(method))
    if observer is not None:
        made = dataclasses.replace(made, observer=recipe.check_observer(observer))
    return made.then(rules)


@click.command(cls=_rules.OrderedCommand)
@_output.model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--scheme", help="Numbers of all linear layers: w8, w4g128, w4g32z, w2g32h, nf4 ...")
@click.option("--range", "range_", metavar="opt|absmax", help="How scales are chosen. Default: opt, the least error.")
@click.option(
    "--method",
    metavar="CHAIN",
    help=f"How codes are chosen: {_names('algorithms.solvers')}, or transforms before one: awq+gptq. Default: auto.",
)
@click.option(
    "--observer",
    metavar="NAME",
    help=f"How static scales (a8s) are found: {_names('quantization.calibration.observers')}. Default: percentile.",
)
@click.option("--calib", metavar="TEXT", help="Text to run the model on: file, folder, dataset; none: its own.")
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Sequences of it.")
@click.option("--length", type=click.IntRange(2), help="Tokens of a sequence. Default: 512, or the model's longest.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which sequences.")
@click.option("--device", default="cpu", show_default=True, help="Where blocks compute with --calib: cpu, cuda ...")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="YAML file with scheme and rules.")
@_rules.set_option
@_rules.skip_option
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. Default: one per core.")
@click.option(
    "--shard-size", "shard_bytes", callback=_bytes, default="2GB", show_default=True, help="Largest output file."
)
@click.option("--memory", callback=_bytes, metavar="SIZE", help="Most that may be used: 8GB ... Default: no limit.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing.")
@_output.json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    output: Path,
    scheme: str | None,
    range_: str | None,
    method: str | None,
    observer: str | None,
    calib: str | None,
    samples: int,
    length: int | None,
    seed: int,
    device: str,
    recipe_file: Path | None,
    set_: tuple[str, ...],
    skip: tuple[str, ...],
    threads: int | None,
    shard_bytes: int,
    memory: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Turn a model folder into a smaller one that runs.

    MODEL is a folder in Hugging Face layout (safetensors) or a hub id. Rules match checkpoint names without `.weight`;
    `*` stays within one component, `**` crosses; later rules win.

    \b
    spicerack quantize MODEL -o out --scheme w4g128
    spicerack quantize MODEL -o out --scheme w4g32z --set '**.down_proj=w8' --skip 'model.layers.0.**'
    spicerack quantize MODEL -o out --scheme w3g64 --calib text.jsonl
    """
    if calib is None:
        for name in ("samples", "length", "seed", "device"):
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError(f"--{name} is about calibration text, and there is none", "pass --calib TEXT")
    recipe = _recipe(recipe_file, scheme, range_, method, observer, _rules.of(ctx, set_, skip))
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from spicerack.quantization.job import prepare
    from spicerack.quantization.run import decided, execute
    from spicerack.quantization.stream import Means, plan

    where, ranks = _place(device)
    means = Means(where, threads, memory, ranks)
    console = _output.console(as_json or not ranks.first)
    console.quiet = not ranks.first
    job = prepare(model, decided(recipe, calib is not None), shard_bytes=shard_bytes)
    calibration = None if calib is None else _calibration(job, calib, samples, length, seed)
    planned = plan(job, calibration, memory)
    _announce(job, calibration, planned, where, console)
    if dry_run:
        if as_json:
            sizes = dataclasses.asdict(job.sizes())
            _output.emit({"dry_run": True, **sizes, "planned_peak_bytes": planned.peak_bytes})
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    unit = "this block" if calibration is not None else None
    with (
        Progress(*columns, console=_output.console(as_json=True), transient=True, disable=not ranks.first) as bar,
        _output.interruptible(bar.console, unit) as stopping,
    ):
        watch = _watch(bar, job, stopping, ranks)
        summary = execute(job, output, calibration=calibration, means=means, watch=watch)
    if summary is None:
        return
    if as_json:
        _output.emit(summary.as_dict())
        return
    _report(summary, job.source.folder, console)


def _watch(bar: Progress, job: Job, stopping: Callable[[], bool], ranks: Ranks) -> Watch:
    """What moves the bar and prints a line for each block, on the first rank."""
    from spicerack.quantization.watch import Watch

    task = bar.add_task("quantizing", total=job.bytes_before)

    class Bar(Watch):
        def tried(self, trial: Trial) -> None:
            bar.console.print(_trial(trial), soft_wrap=True, highlight=False)

        def finished(self, block: Finished) -> None:
            if ranks.first:
                bar.console.print(_line(block), soft_wrap=True, highlight=False)
            bar.update(task, description=f"block {block.number + 1} of {block.count}")

        def stopping(self) -> bool:
            return stopping()

        def progress(self, nbytes: int) -> None:
            bar.advance(task, nbytes)

    return Bar()


def _place(device: str) -> tuple[torch.device, Ranks]:
    """Where this process computes, and among which others, if torchrun started it."""
    from spicerack.machine import devices
    from spicerack.machine.ranks import ALONE, join

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices.find(device), ALONE
    found = devices.find(devices.of_rank(device, int(os.environ["LOCAL_RANK"])))
    return found, join(found)


def _calibration(job: Job, source: str, samples: int, length: int | None, seed: int) -> Calibration:
    from spicerack.models.kind import kind_of, positions
    from spicerack.runtime import hf
    from spicerack.runtime.load import load
    from spicerack.text import calibration, generated
    from spicerack.text.tokenizer import read_tokenizer

    folder = job.source.folder
    config, _ = hf.config_and_class(job.source.config, folder)
    tokenizer = read_tokenizer(folder, config)
    longest = positions(config)
    if length is not None and longest is not None and length > longest:
        raise UsageError(f"--length {length}: the model has {longest} positions", f"use --length {longest} or less")
    length = length or min(_LENGTH, longest or _LENGTH)
    if source == "none":
        return generated.from_model(load(folder), tokenizer, samples=samples, length=length, seed=seed)
    what = kind_of(job.source.config, folder)
    return calibration.read(source, tokenizer, samples=samples, length=length, seed=seed, kind=what)


def _trial(trial: Trial) -> str:
    return (
        f"preflight: {trial.blocks} of {trial.count} blocks rounded, saved and loaded again: as computed within "
        f"{trial.difference:.2%} (off the float model's by {trial.error:.2%}), {trial.seconds:.1f} s"
    )


def _line(block: Finished) -> str:
    """What is printed of a block."""
    from rich.markup import escape

    plain = f" (rounded to nearest {block.rounded:.2%})" if block.rounded != block.error else ""
    events = "".join(f"\n  [yellow]note[/yellow] {escape(event)}" for event in block.events)
    return (
        f"{block.block}: {block.layers} layers, {block.bits:.2f} bits, output off by {block.error:.2%}"
        f"{plain}, {block.seconds:.1f} s, peak {_output.size(block.peak_rss_bytes)}{events}"
    )


def _announce(
    job: Job, calibration: Calibration | None, planned: MemoryPlan, device: torch.device, console: Console
) -> None:
    from rich.markup import escape

    console.print(f"[bold]model [/bold] {escape(str(job.source.folder))}", soft_wrap=True)
    console.print(f"[bold]recipe[/bold] {escape(str(job.recipe))}", soft_wrap=True)
    console.print(f"[bold]format[/bold] {job.format.name}", soft_wrap=True)
    if calibration is not None:
        sequences, length = calibration.ids.shape
        text = f"{calibration.source}, {sequences} sequences of up to {length} tokens"
        console.print(f"[bold]calib [/bold] {escape(text)}", soft_wrap=True)
    console.print(f"[bold]memory[/bold] {_output.size(planned.peak_bytes)} at most, {planned.where}", soft_wrap=True)
    if device.type != "cpu":
        size = _output.size(planned.block_bytes)
        console.print(f"[bold]device[/bold] {device}, {size} of its memory at most", soft_wrap=True)
    for note in (*job.notes, *(calibration.notes if calibration is not None else ())):
        console.print(f"[yellow]note[/yellow]   {escape(note)}", soft_wrap=True)
    console.print()


def _report(summary: Summary, source: Path, console: Console) -> None:
    from rich.table import Table

    from spicerack.storage import ledger

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("layers", "numbers", "count", "before", "after", "error"):
        table.add_column(name, justify="left" if name in ("layers", "numbers") else "right", no_wrap=name != "layers")
    written = ledger.read(summary.output)
    assert written is not None, "quantized just now"
    for row in ledger.by_layer_type(written.entries):
        error = "" if row.error is None else f"{row.error:.2%}"
        sizes = (_output.size(row.bytes_before), _output.size(row.bytes_after))
        table.add_row(row.layers, row.numbers, str(row.count), *sizes, error)
    console.print(table)
    total = summary.sizes
    before, after = total.bytes_before, total.bytes_after
    console.print(
        f"\n[bold]{_output.size(before)} -> {_output.size(after)}[/bold], {before / after:.2f} times smaller; "
        f"{total.bits_per_weight:.2f} bits a quantized weight, {total.bits_per_weight_total:.2f} over all"
    )
    resumed = ", resumed" if summary.resumed else ""
    console.print(f"{summary.seconds:.1f} s, peak memory {_output.size(summary.peak_rss_bytes)}{resumed}")
    console.print(f"next: spicerack eval {summary.output} --against {source} --text FILE", soft_wrap=True, markup=False)
