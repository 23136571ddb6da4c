"""Other people's programs, asked something: found in the PATH, given no input, and not waited for long."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from spicerack.errors import UsageError


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program wrote to standard output and to standard error, and how it ended."""

    code: int
    output: str
    complaints: str


def ask(name: str, arguments: Sequence[str], *, remedy: str, deaf_to: str, seconds: float) -> Answer:
    """The answer of the program that the PATH has under a name, whatever its exit status.

    remedy: what to do without it. deaf_to: how variables of the environment begin that it would take for arguments, and
    does not get. seconds: that are waited. Raises UsageError where there is no such program, where it does not start,
    and where it does not answer in time.
    """
    program = shutil.which(name)
    if program is None:
        raise UsageError(f"{name} is not in the PATH", remedy)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(deaf_to)}
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", env=environment, timeout=seconds,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{name} did not answer in {seconds:g} s", remedy) from error
    except OSError as error:
        raise UsageError(f"{program} does not start: {error.strerror}", remedy) from error
    return Answer(done.returncode, done.stdout, done.stderr)
