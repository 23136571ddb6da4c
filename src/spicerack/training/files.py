"""Where a run lives until its model is whole: `OUT.training`, with packed text, checkpoints and logs.

A run that is killed and started again with the same command continues from its last whole checkpoint; another command
is refused by what differs, and a second run while one is at work. Whole is a checkpoint that has the file `complete`,
which is written behind everything else in it.

    OUT.training/run.json          what the run depends on
                 text.bin .json    packed rows (and held_out.bin), see text.py
                 before.json       losses of the float model, and rounded, before the first step
                 checkpoint-N/     a model folder, the optimizer's state, `complete`
                 logs/             curves for TensorBoard
                 shipped/          the folder that becomes OUT by one rename
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spicerack.errors import OutputError, UsageError
from spicerack.storage.durable import json_bytes, locked, read_json, refuse_other, write_atomically
from spicerack.storage.files import CONFIG
from spicerack.storage.writer import refuse_place

COMPLETE = "complete"
"""In a checkpoint: all of it is on the disk."""
BEFORE = "before.json"
"""Losses of the float model and of the rounded one, before the first step: a run that continues cannot take them
again."""
SHIPPED = "shipped"
"""The folder that becomes the output by one rename."""
REPORT = "training.json"
"""In the folder that comes out: losses, and what they depend on."""
_IDENTITY = "run.json"
"""What the run depends on, by which the same one is known again."""
_FILES = (".json", ".bin")
"""What a run has beside checkpoints and curves: packed text, and what was measured."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def folder_of(output: Path) -> Path:
    """Where the run that will make `output` lives: beside it, so that the last rename crosses no file system."""
    return output.with_name(output.name + ".training")


def report_of(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run with this identity reported of the folder `output`, which it finished; None where that is not so."""
    report = read_json(output / REPORT)
    same = report is not None and report.get("identity") == json.loads(json_bytes(dict(identity)))
    return report if same and (output / CONFIG).is_file() else None


@contextmanager
def entered(output: Path, identity: Mapping[str, Any], *, first: bool) -> Iterator[Path]:
    """The folder of the run, this process's own within: of several ranks the first one holds it for all of them.

    identity   what must be the same for a run to continue, as JSON; a key that differs is what a refusal names
    first      whether this is the first of the ranks, which must come before the others; they only read

    Before there is a checkpoint another run may take the folder over, which then begins anew: nothing is lost but
    packed text. Raises OutputError: `output` exists or cannot be made, the folder is another run's, or is at work.
    """
    refuse_place(output)
    folder = folder_of(output)
    if output.exists():
        raise OutputError(f"{output} exists", "choose another output folder, or remove it")
    if not first:
        yield folder
        return
    if not (folder / _IDENTITY).exists() and any(folder.glob("checkpoint-*")):
        raise OutputError(f"{folder} exists and is not a run of training", "choose another output folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder)
    try:
        _take_over(folder, identity)
        yield folder
    except UsageError:  # refused before it began: nothing in it is worth to be kept
        if folder in made and last_checkpoint(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made[1:]:
                with suppress(OSError):  # somebody else's files are in it by now
                    parent.rmdir()
        raise
    finally:
        os.close(lock)


def _take_over(folder: Path, identity: Mapping[str, Any]) -> None:
    """Remove what was not completed, and what belongs to another run that has no checkpoint yet; refuse one that has.

    The identities are compared as they are stored: JSON makes lists of tuples.
    """
    for _, checkpoint in _checkpoints(folder):
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)
    before = read_json(folder / _IDENTITY)
    if before is not None and before != json.loads(json_bytes(dict(identity))):
        if last_checkpoint(folder) is not None:
            refuse_other(folder, before, identity)
        for file in folder.iterdir():
            if file.suffix in _FILES:
                file.unlink()
    write_atomically(folder / _IDENTITY, json_bytes(dict(identity)))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder that is whole; None where there is none.

    folder: `OUT.training`. Of several processes all see the same one, if nobody writes meanwhile.
    """
    whole = [(step, checkpoint) for step, checkpoint in _checkpoints(folder) if (checkpoint / COMPLETE).exists()]
    return max(whole)[1] if whole else None


def step_of(checkpoint: Path | None) -> int:
    """The step behind which a checkpoint was written, from its name; 0 for none, which is where a run begins."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of all checkpoints, whole or not, in no order that counts: 10 comes before 9 by name."""
    for path in sorted(folder.glob("checkpoint-*")):
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir():
            yield int(match[1]), path
