"""`spicerack bench OUT --against MODEL`.

A table with a column for each model, and one sentence on what was gained. A speed within the other's spread is not
called a gain, and a model that became slower is called slower, with the reason where it is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _output
from spicerack.cli._commands import About
from spicerack.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.evaluation.timing import Benchmark

ABOUT = About(place=50, summary="What the smaller model gained: size, memory, speed.")

_LABELS = {
    "prefill_tokens_per_s": "prompt tokens/s",
    "decode_tokens_per_s": "new tokens/s",
    "items_per_s": "sentences/s",
}
"""What people call a figure."""


@click.command()
@click.argument("out", metavar="OUT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that OUT was made from.")
@click.option("--prefill", type=click.IntRange(min=1), help="Prompt tokens. Default: 512, or what there is room for.")
@click.option("--decode", type=click.IntRange(min=1), default=64, show_default=True, help="New tokens, one by one.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Encoders: sentences at once.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of taking turns.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. Default: as torch chooses.")
@click.option("--device", default="cpu", show_default=True, help="Where the models run: cpu, cuda ...")
@click.option("--float32", is_flag=True, help="Also time the original in float32: bfloat16 is slow on many CPUs.")
@_output.engine_option
@_output.cache_option
@click.option("--trust-remote-code", is_flag=True, help="Run code that came with the model.")
@_output.json_option
def command(out: str, against: str, as_json: bool, **given: Any) -> None:
    """Measure what the quantized folder OUT gained: size on disk, bytes in memory, speed.

    Original and quantized take turns in one run; medians with the whole spread are shown.

    \b
    spicerack bench out --against MODEL
    """
    from spicerack.models.overview import check_sides

    check_sides(out, against, "bench")  # before torch is there
    from spicerack.evaluation.bench import BenchOptions, bench
    from spicerack.storage import records
    from spicerack.storage.files import locate

    with _output.measuring() as progress:
        result = bench(out, against=against, options=BenchOptions(**given), progress=progress)
    records.keep(locate(out), "bench", result.as_dict(), against=against)
    if as_json:
        _output.emit(result.as_dict())
    else:
        _print(result, _output.console())


def _print(result: Benchmark, console: Console) -> None:
    """A column for each model, then how it was measured, and what it means in one sentence.

    Sizes in decimal units; to open takes until a first result; speeds as medians with four digits, the least and the
    most of all turns below them in a dim row. The cache has a row only where every model has one.
    """
    from rich.table import Table

    models = result.models
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column()
    for model in models:
        table.add_column(model.name, justify="right")
    table.add_row("computed with", *(model.compute for model in models))
    table.add_row("on disk", *(_output.size(model.bytes_on_disk) for model in models))
    table.add_row("in memory", *(_output.size(model.resident_bytes) for model in models))
    if all(model.cache_bytes is not None for model in models):
        table.add_row("its cache", *(_output.size(model.cache_bytes or 0) for model in models))
    openings = [model.opening for model in models]
    table.add_row("opens in", *(f"{opening.first:.3f} s" for opening in openings))
    if all(opening.cold is not None for opening in openings):
        table.add_row("  not in the page cache", *(f"{opening.cold:.3f} s" for opening in openings), style="dim")
    for figure in result.original.speeds:
        speeds = [model.speeds[figure] for model in models]
        table.add_row(_LABELS[figure], *(f"{speed.median:,.4g}" for speed in speeds))
        spread = (f"{speed.least:,.4g} to {speed.most:,.4g}" for speed in speeds)
        table.add_row("  least to most", *spread, style="dim")
    console.print(table)
    console.print(_setting(result))
    console.print(_meaning(result))


def _setting(result: Benchmark) -> str:
    """What a turn was, and where: one dim line."""
    from spicerack.evaluation.turns import DecoderTurn

    work = result.work
    turn = (
        f"a prompt of {counted(work.prefill, 'token')}, then {counted(work.decode, 'new one')}"
        if isinstance(work, DecoderTurn)
        else f"{counted(work.batch, 'sentence')} of {counted(work.length, 'token')} at once"
    )
    where = f"{counted(result.threads, 'thread')}, {result.device}"
    return f"[dim]{turn}; median of {counted(result.repeats, 'turn')}; {where}[/dim]"


def _meaning(result: Benchmark) -> str:
    """One plain sentence on what was gained, or not.

    Speeds are called equal where each median lies within the other's spread: then nothing says that the order of the
    two would be the same in the next run. A model that became slower is called slower; where the kernel is the
    reference, the reason is known and said.
    """
    original, quantized = result.original, result.quantized
    doing = "embedding" if result.figure == "items_per_s" else "generating"
    size = f"The quantized model is {original.bytes_on_disk / quantized.bytes_on_disk:.2f} times smaller on disk"
    before, now = (model.speeds[result.figure] for model in (original, quantized))
    if before.least <= now.median <= before.most and now.least <= before.median <= now.most:
        return f"{size}; at {doing} it is as fast as the original, within the spread."
    if result.speedup > 1:
        return f"{size}; at {doing} it is {result.speedup:.2f} times as fast."
    slower = f"{size}; at {doing} it is slower: it takes {1 / result.speedup:.2f} times as long"
    if quantized.compute.startswith("reference"):
        return f"{slower}, because its weights are unpacked in torch for every call."
    return f"{slower}."
