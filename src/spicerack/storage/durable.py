"""Files that survive a crash: written whole or not at all, by one process at a time, for one purpose.

A file counts once it has its name: it is written beside it, brought to the disk (fsync), and renamed, which file
systems do whole or not at all; `sync` of the folder then brings the name to the disk too. Who may write in a folder is
settled by a lock that the system drops with its process, however that ends, so nobody has to clear away one that was
left behind.

What is given up. Locks of this kind are POSIX's: they hold between processes of one machine and, as far as its file
system passes them on, of several; there is no Windows. An fsync for each file costs milliseconds, which files of this
size do not notice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spicerack.errors import OutputError

CONTINUES = "the same command continues once there is room"
NOTHING_LEFT = "nothing is left of it; the same command begins anew once there is room"
"""What helps where the system did not write, which is mostly a full disk."""
LOCK = ".lock"
"""Name of the file that is locked by the process that writes in a folder; its number stands in it, for errors."""


def refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OutputError naming the first fact in which a folder's origin differs from the present run; return if none
    does.

    folder   for the message
    before   facts that stand in the folder, by name, of values that JSON has
    now      those of the present run; a fact that only one of both has differs too

    Compared are values and not hashes, so that a person is told what differs.
    """
    for key in [*before, *(k for k in now if k not in before)]:
        if before.get(key) != now.get(key):
            raise OutputError(
                f"{folder} was begun with another {key}: {_short(before.get(key))}, now {_short(now.get(key))}",
                "choose another output folder, or remove that one",
            )


def locked(folder: Path) -> int:
    """Descriptor of the lock of `folder`, which exists; held until it is closed or the process ends, however it does.

    The process itself may begin again, as after Ctrl+C in a notebook: such locks belong to processes. Raises
    OutputError, with the number of the process that holds it, while another one does; nobody waits.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise OutputError(f"{folder} is being written by process {owner}", "wait for it, or stop it") from None
    with contextlib.suppress(OSError):  # of a full disk, which what is written next will tell of
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _short(value: Any) -> str:
    """A fact in an error, cut to what a line holds."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def disk_error(error: OSError, partial: Path, *, stays: bool = True) -> OutputError:
    """What is raised for an error of the system while `partial` was written; the remedy is that of a full disk.

    error    of the system, whose own words are kept
    partial  what is in the making
    stays    it stays as it is, for the same command to continue; else nothing is left of it
    """
    return OutputError(f"writing {partial} failed: {error.strerror}", CONTINUES if stays else NOTHING_LEFT)


def json_bytes(value: Any) -> bytes:
    """A value as it is stored: JSON in UTF-8, indented by two, with a line's end.

    Keys keep their order, so that the same value has the same bytes. Raises ValueError for NaN and infinities, which
    JSON has not, TypeError for what is no value of JSON.
    """
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The value in a JSON file of our own; None where there is no file, or no JSON in it.

    Half a file is none at all: it was not renamed, or somebody else wrote it. Errors of the system pass through.
    `files.read_json` is for those of strangers.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: the whole file appears at once, in place of one that was there, and is on the disk.

    Its name may be lost in a crash until the folder is brought to the disk, by `sync`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # a full disk, or a folder of that name: nothing is left of what nobody can use
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Bring what is in a file, or the names in a folder, to the disk; returns when it is there.

    Errors of the system pass through: data that could not be written must not be taken for written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
