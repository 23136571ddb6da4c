"""The command line: parses, calls, prints; the only room that may read the environment, beside what started the
process.

Each command is one file here, imported when it is asked for, so that `--help` stays instant.
"""

from __future__ import annotations

import sys

import click

from spicerack._version import __version__
from spicerack.cli import _output
from spicerack.cli._commands import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="spicerack")
def cli() -> None:
    """Make AI models smaller and faster by using fewer bits, and prove what that cost."""


def main() -> None:
    """Entry point of the `spicerack` command. Exit codes: 0 done, 2 wrong usage, 1 other failures, 130 after Ctrl+C."""
    sys.exit(_output.run(cli, sys.argv[1:]))
