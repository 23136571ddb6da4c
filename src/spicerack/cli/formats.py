"""`spicerack formats MODEL`: which engine reads it exactly, in which file of how many bytes, and if not, why.

Of a float model: the schemes that each engine computes exactly, for `quantize --for`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from spicerack.cli import _output
from spicerack.cli._commands import About

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.exports.survey import Choice, Line

ABOUT = About(place=61, summary="Which engines read a model exactly, and why others do not.")
_COLOURS = {"exact": "green", "another scheme": "yellow", "not at all": "red"}


@click.command()
@_output.model_argument
@_output.json_option
def command(model: str, as_json: bool) -> None:
    """Which engines read a model exactly, in which files of how many bytes, and why others do not.

    MODEL is a quantized folder, a GGUF file, a float folder or a hub id. Of a float model: the schemes that each engine
    computes exactly. Nothing is written.

    \b
    spicerack formats out
    """
    from spicerack.exports.survey import formats

    survey = formats(model)
    if as_json:
        _output.emit(survey.as_dict())
    elif survey.lines:
        _of_quantized(survey.lines, _output.console())
    else:
        _of_float(survey.choices, model, _output.console())


def _of_quantized(lines: Sequence[Line], console: Console) -> None:
    """A row for each engine and kind of file; below it the reasons, and what writes the exact ones."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("engine", "file", "", "bytes"):
        table.add_column(title, justify="right" if title == "bytes" else "left", no_wrap=True)
    for line in lines:
        verdict = line.verdict + (f": {', '.join(line.schemes)}" if len(line.schemes) == 1 else "")
        nbytes = "" if line.nbytes is None else f"{line.nbytes:,}"
        table.add_row(line.engine, line.to, f"[{_COLOURS[line.verdict]}]{escape(verdict)}[/]", nbytes)
    console.print(table)
    for verdict, title in (("exact", "exact"), ("another scheme", "in another scheme"), ("not at all", "not at all")):
        these = [line for line in lines if line.verdict == verdict]
        if these:
            console.print(f"\n[bold]{title}[/bold]")
        for reasons, who in _alike(these).items():
            console.print(f"{escape(', '.join(who))}", style=_COLOURS[verdict], soft_wrap=True)
            for reason in reasons:
                console.print(f"  {escape(reason)}", soft_wrap=True)
        if verdict == "another scheme" and (rounded := next((one for one in these if one.command), None)):
            console.print(f"to round again, which costs: {escape(rounded.command)}", soft_wrap=True)


def _alike(lines: Sequence[Line]) -> dict[tuple[str, ...], list[str]]:
    """Reasons -> engines and files that have just these; of exact ones what writes them, how that is known, too."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        told = line.reasons
        if line.verdict == "exact":
            how = "as it is, without an export" if line.as_is else line.command
            needs = f"; it needs {line.needs}" if line.needs else ""
            told = (how, f"{line.checked}: {line.version}{needs}", *told)
        groups.setdefault(told, []).append(f"{line.engine} ({line.to})")
    return groups


def _of_float(choices: Sequence[Choice], model: str, console: Console) -> None:
    """The schemes of each engine, those that are alike together."""
    from rich.markup import escape

    for choice in choices:
        later = "" if choice.written else ", which spicerack does not write yet"
        console.print(f"[bold]{escape(choice.engine)}[/bold] ({choice.to}{later})", soft_wrap=True)
        if choice.reason:
            console.print(f"  [red]no[/red]: {escape(choice.reason)}", soft_wrap=True)
        if choice.schemes:
            console.print(f"  {escape(short(choice.schemes))}", soft_wrap=True)
        if choice.partly:
            console.print(f"  {escape(short(choice.partly))}, with layers in float:", soft_wrap=True)
            for line in choice.floats:
                console.print(f"    {escape(line)}", soft_wrap=True)
    able = [choice for choice in choices if choice.written and choice.usual]
    if able:
        best = max(able, key=lambda choice: bool(choice.schemes))
        console.print(
            f"\nnext: spicerack quantize {escape(shlex.quote(model))} -o OUT --for {best.engine} --scheme {best.usual}",
            soft_wrap=True,
        )


def short(schemes: Sequence[str]) -> str:
    """Names of the grammar that are alike as one, as a shell would spell them out: `w{4,8}g{32,64}`."""
    widths: dict[tuple[str, str], list[str]] = {}
    others = []
    for name in schemes:
        match = re.fullmatch(r"w(\d)(g\d+)?(z?)", name)
        if match is None:
            others.append(name)
        else:
            widths.setdefault((match[2] or "", match[3]), []).append(match[1])
    alike: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for (group, zero), bits in widths.items():
        alike.setdefault((tuple(bits), ("g" if group else "") + zero), []).append(group[1:])
    named = [
        f"w{_braces(bits)}{'g' + _braces(groups) if kind.startswith('g') else ''}{kind.removeprefix('g')}"
        for (bits, kind), groups in alike.items()
    ]
    return ", ".join([*named, *others])


def _braces(values: Sequence[str]) -> str:
    """4, or {4,8}."""
    return values[0] if len(values) == 1 else f"{{{','.join(values)}}}"
