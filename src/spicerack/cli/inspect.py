"""`spicerack inspect MODEL`: what is in a model folder, and what it would weigh.

Kinds of layers and not layers are listed: numbers in names become `*`, so that a model of 30 blocks has a dozen rows,
whose first column can be given to `quantize --set` and `--skip` as it stands. Sizes in other schemes are computed, by
the code that decides a quantization, and not measured: nothing is read but headers.

What is shown fits 80 columns: a narrower terminal than `_WIDE` gets fewer of them, and long names in two lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _output
from spicerack.cli._commands import About
from spicerack.cli._output import size
from spicerack.errors import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from spicerack.models.config import Architecture
    from spicerack.models.outliers import Spread
    from spicerack.models.overview import Estimate, Report, Row

ABOUT = About(place=10, summary="What is in a model folder, and what it would weigh.")
_SMALL = {"norm": "all norms", "bias": "all biases"}
"""Roles that are many, small and alike: a line for all of them."""
_HEIGHTS = "·▁▂▃▄▅▆▇█"
"""Bars of eight heights, behind a dot for none."""
_SHARE_OF_LOWEST_BAR = 1e-7
"""A step of the bars is then about a power of ten, and the lowest one a weight in ten million."""
_NARROW_NAME = 32
"""Longest name on one line of a narrower terminal."""
_SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
"""Standard deviation, in titles."""
_BARS = f"0{_SIGMA}        12{_SIGMA}"
"""Title of the histogram: it begins at 0 standard deviations and ends at 12, a bar for each."""
_TEXTS = ("layers", "role", "numbers", "linear layers in", _BARS)
"""Titles of columns that begin at the left; numbers end at the right."""
_LISTED = 4
"""Notes that are shown; all of them are in the JSON."""
_WIDE = 100
"""Columns of a terminal that holds every column; narrower ones get fewer."""
_LEGEND = (
    f"Bars: how many weights lie 0-1, 1-2, 2-3 ... standard deviations ({_SIGMA}) from the mean; each step down is "
    "about ten times fewer. A bell curve ends after five or six bars. What lies beyond are outliers: a scale must "
    "reach them, so the steps between all other weights that share it grow coarser. Smaller groups help."
)
"""What is printed below the histograms: nobody can read them without."""
_REST = "Embeddings, heads, routers, norms and biases stay as they are."
"""What the estimates assume, said below them."""


@click.command()
@_output.model_argument
@click.option("--weights", is_flag=True, help="Read the weights, too: how far the largest stick out, by kind of layer.")
@_output.json_option
def command(model: str, weights: bool, as_json: bool) -> None:
    """Show what is in a model folder, and what it would weigh.

    MODEL is a folder in Hugging Face layout (safetensors) or a hub id, quantized or not. Without --weights only the
    headers of its files are read. The names in the first column are patterns for `quantize --set` and `--skip`.
    """
    from spicerack.models.overview import look

    report = look(model)
    console = _output.console(as_json)
    if not as_json:  # before transformers is asked or weights are read, which takes time: what headers tell, at once
        _show(report, console)
    report = _promised(report)
    if not as_json:
        _show_sizes(report, console)
    spreads = _measure(report) if weights else None
    if as_json:
        _output.emit(_as_json(report, spreads))
    elif spreads is not None:
        _show_spreads(spreads, console)


def _as_json(report: Report, spreads: list[Spread] | None) -> dict[str, Any]:
    """The report under the contract's names: `bytes`, and words for the three totals of each type.

    spreads: how far the largest weights stick out, by kind of layer, as the key `weights`; None leaves it out: they
    were not read.
    """
    result = asdict(report, dict_factory=_json_names)
    result["folder"] = str(report.folder)
    totals = ("tensors", "parameters", "bytes")
    result["types"] = {kind: dict(zip(totals, values, strict=True)) for kind, values in report.types.items()}
    return result if spreads is None else {**result, "weights": [asdict(spread) for spread in spreads]}


def _json_names(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of one dataclass. `bytes` is a type in Python, so that attributes are called nbytes."""
    return {"bytes" if name == "nbytes" else name: value for name, value in fields}


def _measure(report: Report) -> list[Spread]:
    """Read all weights, behind a bar on standard error: how far the largest stick out, a figure for each kind of layer.

    Weights that are not finite are counted and raise nothing: a look at a broken model must not fail.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from spicerack.models.opening import open_model
    from spicerack.models.outliers import measure

    checkpoint = open_model(report.folder)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_output.console(as_json=True), transient=True) as bar:
        task = bar.add_task("reading", total=total)
        return measure(checkpoint, lambda nbytes: bar.advance(task, nbytes))


def _show(report: Report, console: Console) -> None:
    """What kind of model it is, its tensors, and for a float model its size in common schemes.

    At most `_LISTED` notes are shown: a folder with a fault in each layer would scroll everything else away.
    """
    from rich.markup import escape

    files = counted(report.shards, "file")
    console.print(f"[bold]{escape(str(report.folder))}[/bold]", soft_wrap=True)
    console.print(escape(" · ".join(_facts(report.architecture))))
    console.print(f"{_count(report.parameters)} parameters · {size(report.nbytes)} in {files} · {_types(report)}")
    if report.quantized:
        console.print(f"quantized: [bold]{escape(report.quantized)}[/bold]")
    for alias, owner in report.tied.items():
        names = alias.removesuffix(".weight"), owner.removesuffix(".weight")
        console.print(f"tied: {escape(names[0])} is {escape(names[1])}, stored and counted once")
    for note in report.notes[:_LISTED]:
        console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True)
    if len(report.notes) > _LISTED:
        console.print(f"[yellow]note[/yellow] and {len(report.notes) - _LISTED} more (--json lists them)")
    console.print()
    console.print(_tensors(report, console.width))


def _show_sizes(report: Report, console: Console) -> None:
    """For a float model its size in common schemes; or why `quantize` would refuse the folder."""
    from rich.markup import escape

    if report.estimates:
        console.print()
        console.print(_sizes(report))
        console.print(_REST)
        for line in _misfits(report.estimates):
            console.print(escape(line), style="yellow", soft_wrap=True)
    elif report.refused is not None:
        console.print(f"\n[yellow]note[/yellow] quantize refuses it: {escape(report.refused)}", soft_wrap=True)


def _promised(report: Report) -> Report:
    """The report with the sizes that `quantize` keeps to: where names alone do not tell them, transformers is asked."""
    if report.by_names or not report.estimates:
        return report
    from spicerack.models import census
    from spicerack.models.opening import open_stored
    from spicerack.models.overview import estimates
    from spicerack.quantization.door import promised

    checkpoint = open_stored(report.folder)
    kept, refused = promised(checkpoint)
    sizes = () if refused is not None else estimates(census.take(checkpoint), kept)
    return replace(report, estimates=sizes, refused=refused)


def _facts(architecture: Architecture) -> list[str]:
    """Family and class, then what there is so many of; what config.json does not say is left out."""
    facts = [architecture.model_type, *architecture.classes[:1]]
    counts = {"layers": architecture.layers, "heads": architecture.heads, "experts": architecture.experts}
    facts += [f"{count} {name}" for name, count in counts.items() if count]
    sizes = {"width": architecture.hidden, "vocabulary": architecture.vocabulary}
    return facts + [f"{name} {size:,}" for name, size in sizes.items() if size]


def _table(titles: Iterable[str], width: int = _WIDE) -> Table:
    """A plain table in which only the first column wraps.

    titles: those in `_TEXTS` begin at the left, numbers end at the right. width: of the terminal, in characters; a
    narrow one gets one space between columns instead of two.
    """
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2 if width >= _WIDE else 1, 0, 0))
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if title in _TEXTS else "right", no_wrap=i > 0, overflow="fold")
    return table


def _tensors(report: Report, width: int) -> Table:
    """Kinds of layers one by one; norms and biases in a line each.

    width: of the terminal, in characters. The column of types is left out where all tensors have one; errors take the
    place of roles where a quantized folder is shown on a narrow terminal, because there they are what one came for.
    """
    from rich.text import Text

    cells: dict[str, Callable[[Row], str]] = {
        "role": lambda row: row.role,
        "n": lambda row: str(row.count),
        "shape": lambda row: "x".join(map(str, row.shape)) if row.shape is not None else "",
        "params": lambda row: _count(row.parameters),
        "bytes": lambda row: size(row.nbytes),
    }
    if len(report.types) > 1:  # else the line above the table has said it
        cells["numbers"] = lambda row: row.stored
    if report.quantized:  # and give up another column for it
        cells["error"] = lambda row: "" if row.error is None else f"{row.error:.2%}"
        if width < _WIDE:
            del cells["role"]
    table = _table(["layers", *cells], width)
    shown = [row for row in report.rows if row.role not in _SMALL]
    for row in (*shown, *_merged(report.rows)):
        table.add_row(Text(_broken(row.pattern, width)), *(cell(row) for cell in cells.values()))
    return table


def _broken(pattern: str, width: int) -> str:
    """In a narrow terminal, a name of more than `_NARROW_NAME` characters in two lines, broken before a dot.

    A pattern without a dot so early stays whole: half a word is not a pattern.
    """
    cut = pattern.rfind(".", 0, _NARROW_NAME)
    if width >= _WIDE or len(pattern) <= _NARROW_NAME or cut < 0:
        return pattern
    return f"{pattern[:cut]}\n  {pattern[cut:]}"


def _merged(rows: Iterable[Row]) -> Iterable[Row]:
    """The many small rows, added up."""
    from spicerack.models.overview import Row

    for role, title in _SMALL.items():
        members = [row for row in rows if row.role == role]
        if members:
            stored = " ".join(sorted({row.stored for row in members}))
            totals = sum(row.parameters for row in members), sum(row.nbytes for row in members)
            yield Row(title, role, sum(row.count for row in members), None, stored, *totals)


def _sizes(report: Report) -> Table:
    """What the model would weigh; a star where some layers stay in float, which `_misfits` explains."""
    table = _table(("linear layers in", "whole model", "of now", "bits/weight", "over the whole model"))
    for estimate in report.estimates:
        table.add_row(
            estimate.scheme + " *" * bool(estimate.indivisible),
            size(estimate.nbytes),
            f"{estimate.nbytes / max(report.nbytes, 1):.1%}",
            f"{estimate.bits_per_weight:.2f}" if estimate.bits_per_weight else "-",
            f"{estimate.bits_per_weight_total:.2f}",
        )
    return table


def _misfits(estimates: Iterable[Estimate]) -> list[str]:
    """What groups do not tile, schemes with the same trouble in one line: `* w4g128, w3g64: 5 layers with K=172
    ...`."""
    schemes: dict[tuple[int, str], list[str]] = {}
    for estimate in estimates:
        counts: dict[str, int] = {}
        for misfit in estimate.indivisible:
            counts[misfit.remedy] = counts.get(misfit.remedy, 0) + misfit.count
        for remedy, count in counts.items():
            schemes.setdefault((count, remedy), []).append(estimate.scheme)
    return [
        f"* {', '.join(names)}: {counted(count, 'layer')} with {remedy}" for (count, remedy), names in schemes.items()
    ]


def _show_spreads(spreads: list[Spread], console: Console) -> None:
    """A row for each kind of layer, those with the farthest outliers first, and how to read it.

    Columns are the root mean square, the largest weight as a multiple of it, kurtosis, shares beyond 4 and 6 standard
    deviations, and a histogram of twelve bars. A narrow terminal goes without the first and the fourth. Weights that
    are NaN or infinite are named in red below.
    """
    from rich.text import Text

    console.print()
    if not spreads:
        console.print("No float matrices: there is nothing to measure.")
        return
    cells: dict[str, Callable[[Spread], str]] = {
        "rms": lambda s: f"{s.rms:.2g}",
        "max/rms": lambda s: f"{s.max_over_rms:.1f}",
        "kurtosis": lambda s: f"{s.kurtosis:.1f}",
        f">4{_SIGMA}": lambda s: _share(s.beyond_4),
        f">6{_SIGMA}": lambda s: _share(s.beyond_6),
        _BARS: lambda s: "".join(map(_bar, s.histogram)),
    }
    if console.width < _WIDE:
        del cells["rms"], cells[f">4{_SIGMA}"]
    table = _table(["layers", *cells], console.width)
    for spread in sorted(spreads, key=lambda s: -s.max_over_rms):
        table.add_row(Text(_broken(spread.pattern, console.width)), *(cell(spread) for cell in cells.values()))
    console.print(table)
    worst = max(spreads, key=lambda s: s.max_over_rms)
    line = f"\nFarthest out: {worst.worst}, {worst.max_over_rms:.1f} times its rms."
    console.print(line, markup=False, soft_wrap=True)
    console.print(_LEGEND)
    for spread in spreads:
        if spread.nonfinite:
            line = f"{spread.pattern}: {spread.nonfinite} weights are NaN or infinite"
            console.print(line, style="red", markup=False, soft_wrap=True)


def _bar(share: float) -> str:
    """A bar whose height is the logarithm of `share`: full for 1, lowest for 1e-7, a dot for none at all."""
    if share <= 0:
        return _HEIGHTS[0]
    height = 1 - math.log(max(share, _SHARE_OF_LOWEST_BAR)) / math.log(_SHARE_OF_LOWEST_BAR)
    return _HEIGHTS[1 + round(height * 7)]


def _share(share: float) -> str:
    """Per cent, or a power of ten below a hundredth of one; 0 for none at all."""
    return f"{share:.1e}" if 0 < share < 1e-4 else f"{share:.2%}" if share else "0"


def _types(report: Report) -> str:
    """Types and schemes of the tensors, with their share of the bytes where there are several that matter."""
    total = max(report.nbytes, 1)
    shares = {kind: nbytes / total for kind, (_, _, nbytes) in report.types.items()}
    return ", ".join(f"{kind} {share:.0%}" if 0.005 < share < 0.995 else kind for kind, share in shares.items())


def _count(n: int) -> str:
    """12,345,678 -> `12.3 M`: three digits and the unit that fits, as parameters of models are spoken of."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= factor:
            return f"{n / factor:.3g} {unit}" if n < 1000 * factor else f"{n / factor:.0f} {unit}"
    return str(n)
