"""What was measured of a quantized folder, kept beside it: `eval.json`, `bench.json`, `energy.json`, and `lens.json`.

A record says which ledger it is of, by its hash, of all but its check: a folder that was written anew has none of its
predecessor's. It is no part of the model: it is neither hashed nor copied, and a folder without it is as good.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spicerack._version import __version__
from spicerack.errors import CheckpointError
from spicerack.machine import processor
from spicerack.storage import ledger
from spicerack.storage.durable import json_bytes, write_atomically
from spicerack.storage.files import LEDGER, read_json

_MAX_BYTES = 64 << 20
"""Of a record that is read: they have kilobytes."""


def keep(folder: Path, command: str, result: Mapping[str, Any], **told: Any) -> Path | None:
    """Write what `command` measured into a folder of ours -> the file; None where the folder is none of ours, or where
    nobody may write.

    folder    that was measured, local
    command   eval, bench or energy; lens, of the check behind quantize and of eval
    result    its JSON
    told      what else belongs to it: the folder it was compared with, options
    """
    if not (folder / LEDGER).is_file() or not os.access(folder, os.W_OK):
        return None
    path = folder / f"{command}.json"
    machine = {"platform": platform.platform(), "processor": processor.name(), "cpus": os.cpu_count()}
    write_atomically(path, json_bytes({
        "command": command,
        "spicerack": __version__,
        "ledger": _hash(folder),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine,
        **told,
        "result": result,
    }))  # fmt: skip
    return path


def read(folder: Path, command: str) -> dict[str, Any] | None:
    """The record that `command` left in the folder; None where there is none, or one of another ledger.

    Raises CheckpointError for a file that is no record.
    """
    path = folder / f"{command}.json"
    if not path.is_file():
        return None
    record = read_json(path, _MAX_BYTES)
    if record.get("command") != command or not isinstance(record.get("result"), dict):
        again = "eval" if command == "lens" else command
        raise CheckpointError(f"{path} is no record of spicerack {again}", f"remove it, and run {again} again")
    return record if record.get("ledger") == _hash(folder) else None


def _hash(folder: Path) -> str | None:
    """Of the folder's ledger; None where it has none."""
    written = ledger.read(folder)
    return None if written is None else written.sha256
