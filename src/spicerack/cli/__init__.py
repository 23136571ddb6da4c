"""The command line: parses, calls, prints. The only place that reads the environment.

Each command is one file here, imported when it is asked for, so that `--help` stays instant.
"""

from __future__ import annotations

import importlib
import sys

import click

from spicerack._version import __version__
from spicerack.cli import _output

COMMANDS = {
    "inspect": "What is in a model folder, and what it would weigh.",
    "quantize": "Turn a model folder into a smaller one that runs.",
    "train": "Train a model in few bits, or from scratch.",
    "eval": "What the smaller model lost.",
    "bench": "What the smaller model gained: size, memory, speed.",
    "generate": "Let a model continue a text.",
    "kernels": "What can multiply on this machine, and what a folder's layers get.",
    "demo": "Two real models through the whole way, in one table.",
}


class _Lazy(click.Group):
    """A group whose help needs no command's module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = vars(importlib.import_module(f"spicerack.cli.{cmd_name}"))["command"]
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="spicerack")
def cli() -> None:
    """Make AI models smaller and faster by using fewer bits, and prove what that cost."""


def main() -> None:
    """Entry point of the `spicerack` command. Exit codes: 0 done, 2 wrong usage, 1 other failures, 130 after Ctrl+C."""
    sys.exit(_output.run(cli, sys.argv[1:]))
