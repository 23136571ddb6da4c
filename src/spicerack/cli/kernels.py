"""`spicerack kernels [OUT]`: the kernels that there are, and those that a folder's layers get.

Each says why it does not run here, or why it was passed over: a choice that nobody can understand cannot be mended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from spicerack.cli import _output
from spicerack.cli._commands import About

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.models.choices import Layers, Row

ABOUT = About(place=70, summary="What can multiply on this machine, and what a folder's layers get.")


_WIDE = 100
"""Characters of a terminal in which names stand in one line."""
_LINE = 34
"""Characters of a name that 80 leave room for beside the other columns."""


@click.command()
@click.argument("out", metavar="[OUT]", required=False)
@click.option(
    "--compute",
    type=click.Choice(["int8", "float"]),
    help="What OUT's layers multiply with, as in load(). Default: int8 where there are vector instructions for it.",
)
@_output.engine_option
@_output.json_option
def command(out: str | None, compute: Literal["int8", "float"] | None, engine: str | None, as_json: bool) -> None:
    """List the kernels, or those that the layers of the quantized folder OUT get, and why.

    Only config.json and the headers of OUT's files are read, but for encoders that may run as one native call: whether
    they do is checked whenever they are loaded, so that they are loaded here, too.

    \b
    spicerack kernels
    spicerack kernels out --compute float
    spicerack kernels out --engine avx2
    """
    for option, value in (("--compute", compute), ("--engine", engine)):
        if out is None and value is not None:
            raise click.UsageError(f"{option} chooses kernels for the layers of OUT, and no OUT is given")
    from spicerack.models import choices

    rows = choices.rows()
    if out is None:
        if as_json:
            _output.emit(_table_as_json(rows))
        else:
            _show_table(rows, _output.console())
        return
    from spicerack.runtime.whole import whole_parts

    layers = choices.layers(out, compute, engine)
    encoders = whole_parts(out, compute, engine) if layers else {}
    if as_json:
        chosen = [asdict(some) for some in layers]
        whole = [{"path": path, "obstacle": obstacle} for path, obstacle in encoders.items()]
        facts = {"folder": out, "compute": compute, "engine": engine}
        _output.emit({**facts, **_table_as_json(rows), "layers": chosen, "one_call": whole})
    else:
        _show_layers(out, layers, _output.console())
        _show_encoders(encoders, _output.console())


def _table_as_json(rows: Iterable[Row]) -> dict[str, Any]:
    """The table, with a plain yes or no beside each reason."""
    return {"kernels": [{**asdict(row), "runs": row.obstacle is None} for row in rows]}


def _show_table(rows: Iterable[Row], console: Console) -> None:
    """All kernels, fastest first; those that do not run here are dim, and say why."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("kernel", "activations", "runs here"):
        table.add_column(title, no_wrap=title != "runs here")
    for row in rows:
        style = None if row.obstacle is None else "dim"
        table.add_row(row.name, row.compute, "yes" if row.obstacle is None else f"no: {row.obstacle}", style=style)
    console.print(table)
    console.print("\nFastest first; a layer gets the first that runs here and fits it: spicerack kernels OUT")


def _show_layers(out: str, layers: list[Layers], console: Console) -> None:
    """Which kernel each kind of layer gets, then for each kernel why no faster one was taken.

    out: the folder, as it was named. layers: kinds of quantized layers, each with its kernel and what was passed over;
    none at all for a float folder, whose layers torch runs.
    """
    from rich.table import Table
    from rich.text import Text

    if not layers:
        console.print(f"{out}: nothing is quantized; torch runs all layers", markup=False, soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("layers", "n", "shape", "numbers", "inputs", "kernel"):
        left = title not in ("n", "shape")
        table.add_column(
            title, justify="left" if left else "right", no_wrap=title not in ("layers", "kernel"), overflow="fold"
        )
    for some in layers:
        shape = "x".join(map(str, some.shape))
        pattern = some.pattern if console.width >= _WIDE else _broken(some.pattern)
        table.add_row(Text(pattern), str(some.count), shape, some.scheme, some.dtype, some.kernel)
    console.print(table)
    for kernel, passed_over, schemes in _choices(layers):
        names = ", ".join(schemes)
        console.print()
        if not passed_over:
            console.print(f"{kernel} for {names}: the fastest there is", markup=False, soft_wrap=True)
            continue
        console.print(f"{kernel} for {names}; faster ones were passed over:", markup=False, soft_wrap=True)
        for reason, rows in _by_reason(passed_over).items():
            console.print(f"  {', '.join(rows)}: {reason}", markup=False, soft_wrap=True)


def _broken(pattern: str) -> str:
    """A name in lines of at most `_LINE` characters where its dots allow that: half a word is not a pattern."""
    lines = [""]
    for part in re.findall(r"\.?[^.]+", pattern):
        if lines[-1] and len(lines[-1]) + len(part) > _LINE:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _show_encoders(encoders: Mapping[str, str | None], console: Console) -> None:
    """Which parts run as one native call: path -> why not, or None."""
    for path, obstacle in encoders.items():
        name = path or "the model"
        told = "one native call" if obstacle is None else f"its modules, one by one: {obstacle}"
        console.print(f"\n{name}: {told}", markup=False, soft_wrap=True)


def _choices(layers: Iterable[Layers]) -> list[tuple[str, dict[str, str], list[str]]]:
    """Kernel, what it was preferred to (name -> reason), and the schemes for which that holds, in the order of the
    layers.

    Two schemes that got one kernel for different reasons are two entries: the reasons are what is asked for.
    """
    choices: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for some in layers:
        schemes = choices.setdefault((some.kernel, tuple(some.passed_over.items())), [])
        if some.scheme not in schemes:
            schemes.append(some.scheme)
    return [(kernel, dict(passed_over), schemes) for (kernel, passed_over), schemes in choices.items()]


def _by_reason(passed_over: dict[str, str]) -> dict[str, list[str]]:
    """Reason -> the kernels that were passed over for it: mostly one instruction set, and all its kernels."""
    reasons: dict[str, list[str]] = {}
    for name, reason in passed_over.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
