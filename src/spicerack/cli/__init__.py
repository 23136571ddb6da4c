"""The command line: parses, calls, prints. It and `machine` are the only rooms that read the environment.

Each command is one file here, imported when it is asked for, so that `--help` stays instant. Files with an underscore
are what several commands share, or what one command does that needs torch.

How a command is made. Its options become one frozen object of the room that does the work (`BenchOptions`,
`TrainOptions` ...), by their names: click's parameters and the object's fields are called alike, so that nothing is
handed on one by one. What contradicts itself is refused before torch is imported; what needs the model is refused by
the room. Then the result, a frozen object too, is printed for people or emitted as the one JSON object.

What is given up. Options are declared twice, here with their help and there with their meaning in Python: the two speak
to different readers.
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
    """Entry point of the `spicerack` command: it ends the process.

    Exit codes: 0 done; 2 wrong in a way that is knowable before weights are read; 1 other failures; 130 after Ctrl+C.
    """
    sys.exit(_output.run(cli, sys.argv[1:]))
