"""What every command shares: the JSON contract, the consoles, errors and exit codes.

With --json exactly one JSON object goes to standard output; everything else (progress, warnings) to standard error.
"""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from spicerack.errors import SpicerackError

if TYPE_CHECKING:
    from rich.console import Console

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to standard output.")
cache_option = click.option(
    "--cache", type=int, metavar="8|4", help="Bits that keys and values of attention are kept in. Default: as computed."
)
engine_option = click.option(
    "--engine",
    metavar="NAME",
    help="Instruction set that quantized layers compute with: avx2, scalar ... Default: the fastest of this processor.",
)
model_argument = click.argument("model", metavar="MODEL")


def console(as_json: bool = False) -> Console:
    """Where people read: standard output, or standard error when standard output belongs to the JSON object."""
    from rich.console import Console

    return Console(stderr=as_json, highlight=False)


def emit(result: dict[str, Any]) -> None:
    """Write the command's one JSON object."""
    click.echo(json.dumps(result, indent=2, allow_nan=False))


def run(group: click.Group, args: list[str]) -> int:
    """Run the command line -> its exit code. Deliberate errors become a message (and JSON), never a traceback."""
    warnings.showwarning = _show_warning
    as_json = "--json" in args
    try:
        result = group.main(args=args, standalone_mode=False)
    except SpicerackError as error:
        return _fail(as_json, type(error).__name__, error.message, error.hint, error.exit_code)
    except click.UsageError as error:
        return _fail(as_json, "UsageError", error.format_message(), _usage_hint(error), 2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        resumes = args[:1] in (["quantize"], ["train"])
        hint = "the same command continues where it stopped" if resumes else "nothing was changed"
        return _fail(as_json, "Interrupted", "interrupted", hint, 130)
    return result if isinstance(result, int) else 0


def _usage_hint(error: click.UsageError) -> str:
    return f"see {error.ctx.command_path} --help" if error.ctx else ""


def _fail(as_json: bool, kind: str, message: str, hint: str, code: int) -> int:
    if as_json:
        emit({"error": kind, "message": message, "hint": hint})
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)
    if hint:
        click.echo(click.style("hint:  ", fg="cyan") + hint, err=True)
    return code


def _show_warning(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
    click.echo(click.style("warning: ", fg="yellow") + str(message), err=True)


@contextmanager
def interruptible(console: Console, end_of: str | None) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl+C only asks to stop behind `end_of`, the second interrupts; None: the first does.

    -> whether it was asked.
    """
    asked: list[bool] = []

    def ask(_signal: int, _frame: object) -> None:
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


def size(nbytes: float) -> str:
    """Bytes for people: `91.4 MB`, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
