"""What every command shares: the JSON contract, the consoles, progress, errors and exit codes.

With --json exactly one JSON object goes to standard output; everything else (progress, warnings) to standard error.
Errors are such an object, too: `{"error": class, "message": text, "hint": text}`, the class by its name in
`spicerack.errors`, so that a program can tell what to do without reading prose.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from spicerack.errors import SpicerackError

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.cli._commands import Commands

_WIDE = 10_000
"""Columns of a line in a pipe or a file, which has no edge."""
INTERRUPTED = 130
"""Exit code behind Ctrl+C: 128 and the number of its signal, as shells have it."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to standard output.")
"""Declared once for all commands: --json means the same everywhere."""
cache_option = click.option(
    "--cache", type=int, metavar="8|4", help="Bits that keys and values of attention are kept in. Default: as computed."
)
"""--cache, an int under that name; which widths there are is the cache's to say, not click's."""
engine_option = click.option(
    "--engine",
    metavar="NAME",
    help="Instruction set that quantized layers compute with: avx2, scalar ... Default: the fastest of this processor.",
)
"""--engine, a name that `kernels.kernel.check_engine` knows or refuses, since only it knows this processor."""
model_argument = click.argument("model", metavar="MODEL")
"""MODEL: a folder, or a hub id, of which `storage.files.locate` fetches a snapshot into the hub's own cache."""


def console(as_json: bool = False) -> Console:
    """Where people read: standard output, or standard error when standard output belongs to the JSON object.

    Numbers and paths are not coloured: rich would colour parts of tensor names as if they were code. Where nobody looks
    on, in a pipe or a file, lines are as long as what they say, unless COLUMNS says otherwise: names that are cut or
    wrapped cannot be searched for.
    """
    from rich.console import Console

    stream = sys.stderr if as_json else sys.stdout
    looked_at = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=as_json, highlight=False, width=None if looked_at else _WIDE)


def emit(result: Mapping[str, Any]) -> None:
    """Write the command's one JSON object to standard output, indented by two.

    result: keys as the contract has them, values of JSON's own types. NaN and infinities, which JSON has not, raise
    ValueError: a reader would stumble over them later, and with less to go by.
    """
    click.echo(json.dumps(result, indent=2, allow_nan=False))


@contextmanager
def measuring() -> Iterator[Callable[[str, float], None]]:
    """Within, a bar on standard error that shows what is being done and the share of it, 0 to 1; gone at the end.

    What is given is called with both, as evaluation and bench call their `progress`. Where standard error is no
    terminal nothing is shown.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    place = console(as_json=True)
    with Progress(*columns, console=place, transient=True, disable=not place.is_terminal) as bar:
        task = bar.add_task("loading", total=1.0)
        yield lambda doing, share: bar.update(task, description=doing, completed=share)


def run(commands: Commands, args: list[str]) -> int:
    """Run the command line -> its exit code. Deliberate errors become a message (and JSON), never a traceback.

    commands: the group to run. args: as in sys.argv, without the program; that --json is among them is looked up here,
    because a line that click cannot parse must be answered in JSON as well. Errors that nobody raised on purpose pass
    through: they are faults of this program, and their traceback is what helps to mend it.
    """
    warnings.showwarning = _show_warning  # of the whole process, which is ours here
    as_json = "--json" in args
    try:
        result = commands.main(args=args, standalone_mode=False)
    except SpicerackError as error:
        return _fail(as_json, type(error).__name__, error.message, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:  # nothing was asked for: this is no fault to be shown in red
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        return _fail(as_json, "UsageError", error.format_message(), _usage_hint(error), 2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        hint = "the same command continues where it stopped" if commands.resumes(args) else "nothing was changed"
        return _fail(as_json, "Interrupted", "interrupted", hint, INTERRUPTED)
    return result if isinstance(result, int) else 0


def _usage_hint(error: click.UsageError) -> str:
    """Where to read on: the help of the command that was meant."""
    return f"see {error.ctx.command_path} --help" if error.ctx else ""


def _fail(as_json: bool, kind: str, message: str, hint: str, code: int) -> int:
    """Say what is wrong and what helps, on standard error, and as the JSON object if one was asked for -> `code`."""
    if as_json:
        emit({"error": kind, "message": message, "hint": hint})
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)
    if hint:
        click.echo(click.style("hint:  ", fg="cyan") + hint, err=True)
    return code


def _show_warning(message: Warning | str, *_args: object, **_kwargs: object) -> None:
    """In place of Python's own, which shows a line of source as well."""
    click.echo(click.style("warning: ", fg="yellow") + str(message), err=True)


@contextmanager
def interruptible(console: Console, end_of: str | None) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl+C only asks to stop behind `end_of`, the second raises KeyboardInterrupt at once.

    console: where the first one is answered. end_of: what is finished first, as in "this block"; None where there is no
    such place, and the first Ctrl+C interrupts as ever. What is given tells whether it was asked: the loop that runs
    within calls it where it can stop. The handler of before comes back at the end. Only the main thread may set a
    handler, which is where commands run.
    """
    asked: list[bool] = []

    def ask(_signal: int, _frame: object) -> None:
        """Python calls this between two instructions of the main thread, as soon as it has one."""
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        console.print(f"stopping behind {end_of}; once more: at once")

    before = signal.signal(signal.SIGINT, ask) if end_of is not None else None
    try:
        yield lambda: bool(asked)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


_UNITS = {"": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {
    f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)
}  # fmt: skip
"""What may stand behind a number of bytes: decimal units, as `size` prints them, or binary ones."""


class Number(click.FloatRange):
    """A finite number in a range: "nan" lies in every one for click, "inf" in those without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Raises BadParameter."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


def nbytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """What an option for a size means in bytes: "1.5GB" -> 1,500,000,000; "1GiB", or a plain number.

    value: as typed, at most twelve digits before the point; None where it was not given, and stays None. Raises
    BadParameter.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([kmgt]i?b)?", value.lower())
    size = 0 if match is None else int(Decimal(match[1]) * _UNITS[match[2] or ""])
    if not size:
        raise click.BadParameter(f"{value!r} is not a size such as 500MB or 2GB", ctx, param)
    return size


def rate(tokens: float) -> str:
    """Tokens a second in three digits, as people write them: `18.5`, `5,030`."""
    return f"{float(f'{tokens:.3g}'):,.0f}" if tokens >= 1000 else f"{tokens:.3g}"


def size(nbytes: float) -> str:
    """Bytes for people: `91.4 MB`, in decimal units, as disks are sold; whole bytes below 1 kB, two digits from 1 TB
    on."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
