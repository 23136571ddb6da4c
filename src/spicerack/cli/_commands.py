"""The commands, found by their files: their names, order and summaries, without importing any of them.

A file here without an underscore is a command. It declares `command`, which click calls, and `ABOUT`, which is read
from the syntax tree, so that `--help` needs no command's imports.

What is given up. ABOUT must be written in literals, and its last bracket must end a line: it is found by a regular
expression and evaluated as literals, never executed.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from spicerack import plugins


@dataclass(frozen=True, slots=True)
class About:
    """What a command's file says about it, in literals.

    place     where it stands in the list, the lowest number first; of equal ones by name
    summary   what it does, in one line
    resumes   whether the same command continues what was interrupted
    """

    place: int
    summary: str
    resumes: bool = False


_ABOUT = re.compile(r"^ABOUT = (About\(.*?\))$", re.MULTILINE | re.DOTALL)
"""The declaration, to the first line that ends with a bracket: all that is parsed of a file. To parse the files whole
took 18 ms of processor time, in a `--help` of 60."""


def about(name: str) -> About:
    """What the file of command `name` says of itself; the file is read as text and not imported.

    name: of a file in this folder, without `.py`. Raises LookupError where the file declares no ABOUT, ValueError where
    its arguments are not literals.
    """
    spec = importlib.util.find_spec(f"spicerack.cli.{name}")
    assert spec is not None and spec.origin is not None
    declared = _ABOUT.search(Path(spec.origin).read_text(encoding="utf-8"))
    if declared is None:
        raise LookupError(f"{spec.origin} declares no ABOUT = About(place=..., summary=...)")
    call = ast.parse(declared[1], mode="eval").body
    assert isinstance(call, ast.Call)
    return About(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})


def _file(name: str) -> str:
    """The file of a command, without `.py`: a command that is a word of Python's has an underscore behind it."""
    return f"{name}_" if keyword.iskeyword(name) else name


class Commands(click.Group):
    """The group of all commands: it lists them by what their files say, and imports the one that is called.

    click asks a group for its commands in these three methods; everything else (parsing, help of a command) is click's.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in the order of their places."""
        return list(self._abouts())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, its file imported now; None if there is none, which click turns into a usage
        error."""
        if cmd_name not in self._abouts():
            return None
        command = plugins.get("cli", _file(cmd_name), "command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click has it, with the nearest name where there is no such command, as it does for options itself."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.6)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the group's own help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about.summary) for name, about in self._abouts().items()])

    def resumes(self, args: Sequence[str]) -> bool:
        """Whether the command line `args` continues what it began, when it is given again; False for one without a
        command.

        args: as in sys.argv, without the program. It decides what the hint behind Ctrl+C promises.
        """
        return bool(args) and _file(args[0]) in plugins.names("cli") and about(_file(args[0])).resumes

    @staticmethod
    def _abouts() -> dict[str, About]:
        """Name -> what its file says, in the order of their places. Asked anew each time: it is called once a run."""
        abouts = {name.removesuffix("_"): about(name) for name in plugins.names("cli")}
        return dict(sorted(abouts.items(), key=lambda item: (item[1].place, item[0])))
