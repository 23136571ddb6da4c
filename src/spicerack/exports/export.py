"""`spicerack.export`: a quantized folder -> the file or folder that another engine reads, with the same codes.

    Folder.open -> holding (every tensor exactly, or refused) -> target.write -> verify -> the name

All that can be refused is refused before a byte is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spicerack._version import __version__
from spicerack.errors import OutputError, SchemeError, listed
from spicerack.exports import target as targets
from spicerack.exports import verify
from spicerack.exports.source import Source
from spicerack.exports.target import Order
from spicerack.machine.memory import peak_rss_bytes
from spicerack.runtime.folder import Folder
from spicerack.storage.files import local


@dataclass(frozen=True, slots=True)
class Written:
    """What was exported.

    output          the file or folder
    to              as what
    nbytes          on the disk
    packed, floats  how many tensors of each
    seconds         of the call
    peak_rss_bytes  the most memory that the process had
    verified_by     who read every tensor back and found it equal
    foreign         whether that was the engine's own code
    notes           what a person should know
    """

    output: Path
    to: str
    nbytes: int
    packed: int
    floats: int
    seconds: float
    peak_rss_bytes: int
    verified_by: str
    foreign: bool
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """By the names of the command line's contract."""
        return {
            "output": str(self.output),
            "to": self.to,
            "bytes": self.nbytes,
            "packed": self.packed,
            "floats": self.floats,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "verified_by": self.verified_by,
            "foreign": self.foreign,
            "notes": list(self.notes),
        }


def export(model: str | Path, *, to: str, output: str | Path, shard_bytes: int | None = None) -> Written:
    """Write a quantized folder for another engine, with the codes that it has.

    model        a folder or hub id, quantized
    to           what for: one of `exports.target.names()`
    output       the file or folder to write, which must not exist
    shard_bytes  the largest file, where there are several; None: the target's own

    Raises UsageError of all kinds before a byte is written: what the target cannot hold is named by layer and rule.
    Raises OutputError where what was written is not read back as it was meant; then nothing is left.
    """
    begin, place, target = time.time(), local(output), targets.find(to)
    if place.exists():
        raise OutputError(f"{place} exists", "choose another name, or remove it")
    folder = Folder.open(model)
    source = Source(folder, target.prepared(to, folder.contents))
    refused = target.obstacles(to, source.contents) + target.refusals(to, source)
    if refused:
        raise SchemeError(listed(refused, 3, "reasons", between="; "), "export it in another scheme")
    reader = verify.choose(to, source)
    if reader is None:
        raise OutputError(f"nobody here reads {to}: what is written could not be verified", "install its reader")
    facts = {"to": to, "spicerack": __version__, **verify.facts(reader)}

    def check(written: Path) -> None:
        verify.verify(reader, written, source)

    target.write(source, Order(to, place, check, facts, shard_bytes))
    return Written(
        place, to, _nbytes(place), len(source.contents), len(source.floats()), round(time.time() - begin, 3),
        peak_rss_bytes(), reader.name, reader.foreign, tuple(target.notes(to, source)),
    )  # fmt: skip


def _nbytes(place: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(path.stat().st_size for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file())
