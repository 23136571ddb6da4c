"""`spicerack report OUT`: one HTML file that says what was traded for what, from what lies in the folder alone."""

from __future__ import annotations

from pathlib import Path

import click

from spicerack.cli import _output
from spicerack.cli._commands import About

ABOUT = About(place=57, summary="A page about a quantized folder, for everyone and for experts.")


@click.command()
@click.argument("out", metavar="OUT")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: OUT/report.html.")
@_output.json_option
def command(out: str, output: Path | None, as_json: bool) -> None:
    """Write a page about the quantized folder OUT: one HTML file that needs no network.

    It is made of what quantize, eval, bench and energy left in the folder; what was not measured is said to be missing.
    --json prints the same numbers.

    \b
    spicerack report out
    """
    from spicerack.errors import OutputError
    from spicerack.evaluation.report.facts import collect
    from spicerack.evaluation.report.page import page
    from spicerack.planning.written import shown
    from spicerack.storage.durable import write_atomically
    from spicerack.storage.files import locate

    folder = locate(out)
    facts = collect(folder, shown(folder))
    path = output or folder / "report.html"
    try:
        write_atomically(path, page(facts).encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "give another place with -o FILE") from error
    if as_json:
        _output.emit({"page": str(path), **facts})
        return
    console = _output.console()
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if facts["missing"]:
        console.print(f"missing, and said so on the page: {', '.join(facts['missing'])}", markup=False, soft_wrap=True)
