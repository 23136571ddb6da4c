"""Where a run lives until its model is whole: `OUT.training`, with packed text, checkpoints and logs.

A run that is killed and started again with the same command continues from its last whole checkpoint; another command
is refused by what differs, and a second run while one is at work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spicerack.errors import OutputError
from spicerack.storage.durable import json_bytes, locked, read_json, refuse_other, write_atomically

COMPLETE = "complete"
"""In a checkpoint: all of it is on the disk."""
_IDENTITY = "run.json"
_FILES = (".json", ".bin")
"""What a run has beside checkpoints and curves: packed text, and what was measured."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def folder_of(output: Path) -> Path:
    """Where the run that will make `output` lives."""
    return output.with_name(output.name + ".training")


@contextmanager
def entered(output: Path, identity: Mapping[str, Any], *, first: bool) -> Iterator[Path]:
    """The folder of the run, this process's own within. first: of several ranks; the others must come later.

    Before there is a checkpoint another run may take it over, which then begins anew.

    Raises OutputError: `output` exists, the folder is another run's, or is at work.
    """
    folder = folder_of(output)
    if output.exists():
        raise OutputError(f"{output} exists", "choose another output folder, or remove it")
    if not first:
        yield folder
        return
    if not (folder / _IDENTITY).exists() and any(folder.glob("checkpoint-*")):
        raise OutputError(f"{folder} exists and is not a run of training", "choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder)
    try:
        for _, found in _checkpoints(folder):
            if not (found / COMPLETE).exists():
                shutil.rmtree(found)
        before = read_json(folder / _IDENTITY)
        if before is not None and before != json.loads(json_bytes(dict(identity))):
            if last_checkpoint(folder) is not None:
                refuse_other(folder, before, identity)
            for made in folder.iterdir():
                if made.suffix in _FILES:
                    made.unlink()
        write_atomically(folder / _IDENTITY, json_bytes(dict(identity)))
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
