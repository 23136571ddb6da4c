"""Where a run lives until its model is whole: `OUT.training`, with packed text, checkpoints and logs.

A run that is killed and started again with the same command continues from its last whole checkpoint; another command
is refused by what differs, and a second run while one is at work.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spicerack.checkpoint.durable import json_bytes, locked, read_json, refuse_other, write_atomically
from spicerack.errors import OutputError

COMPLETE = "complete"
"""In a checkpoint: all of it is on the disk."""
_IDENTITY = "run.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def folder_of(output: Path) -> Path:
    """Where the run that will make `output` lives."""
    return output.with_name(output.name + ".training")


@contextmanager
def entered(output: Path, identity: Mapping[str, Any], *, first: bool) -> Iterator[Path]:
    """The folder of the run, this process's own within. first: of several ranks; the others must come later.

    Raises OutputError: `output` exists, the folder is another run's, or is at work.
    """
    folder = folder_of(output)
    if output.exists():
        raise OutputError(f"{output} exists", "choose another output folder, or remove it")
    if not first:
        yield folder
        return
    if folder.exists():
        before = read_json(folder / _IDENTITY)
        if before is None and any(folder.glob("checkpoint-*")):
            raise OutputError(f"{folder} exists and is not a run of training", "choose another output folder")
        if before is not None:
            refuse_other(folder, before, identity)
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder)
    try:
        write_atomically(folder / _IDENTITY, json_bytes(dict(identity)))
        for number, found in _checkpoints(folder):
            if not (found / COMPLETE).exists():
                shutil.rmtree(folder / f"checkpoint-{number}")
        yield folder
    finally:
        os.close(lock)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one that is whole."""
    whole = [(number, found) for number, found in _checkpoints(folder) if (found / COMPLETE).exists()]
    return max(whole)[1] if whole else None


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    for found in sorted(folder.glob("checkpoint-*")):
        if (match := _CHECKPOINT.fullmatch(found.name)) and found.is_dir():
            yield int(match[1]), found
