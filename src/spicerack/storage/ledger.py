"""The ledger of a quantized folder, `spicerack.json`: what became of every tensor, and what it was made from.

It is written once, when a folder is finished, and read by whoever tells people of that folder: `inspect`, `eval`, the
table behind `quantize`, the demo. `Entry` is one tensor, `Ledger` the file; nobody else knows its keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spicerack.errors import CheckpointError
from spicerack.storage.durable import json_bytes, write_atomically
from spicerack.storage.files import LEDGER, read_json

_MOST = 1 << 62
"""Of bytes, rows and columns: nothing has more."""
_LARGEST = 1e100
"""Of a relative error."""
Fate = Literal["quantize", "copy", "drop"]
"""What became of a tensor: quantized, copied as it was, or dropped, because it is there under another name."""
_MAX_BYTES = 256 << 20
"""Of a ledger that is read: a model of a million tensors has 250 MB of it."""
NOT_FINITE = "it has numbers that are not finite, and was copied as it is"
"""Event of a tensor that stays in float, and that a model is of no use with."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the source: what was done with it, why, and what that took.

    tensor         its name in the source
    action         quantized, copied or dropped
    why            the rule that decided, for people
    layer_type     what all layers of its kind are called
    scheme         the scheme's name; None for what is not quantized
    dtype, shape   the source's, dtype as safetensors calls it
    bytes_before   of the source's tensor
    bytes_after    of all tensors that it became; 0 for what was dropped
    error          ||decoded - w|| / ||w||; None where nobody measured it
    events         what a person should know of how it came about
    """

    tensor: str
    action: Fate
    why: str
    layer_type: str
    scheme: str | None
    dtype: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    error: float | None = None
    events: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """How many numbers the source's tensor holds."""
        return math.prod(self.shape)

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Entry:
        """The inverse of `as_dict`. Raises KeyError, TypeError, ValueError or OverflowError for anything else."""
        scheme, error = record["scheme"], record["error"]
        if record["action"] not in ("quantize", "copy", "drop"):
            raise ValueError(f"unknown action {record['action']!r}")
        return cls(
            tensor=str(record["tensor"]),
            action=record["action"],
            why=str(record["why"]),
            layer_type=str(record["layer_type"]),
            scheme=None if scheme is None else str(scheme),
            dtype=str(record["dtype"]),
            shape=tuple(map(_count, record["shape"])),
            bytes_before=_count(record["bytes_before"]),
            bytes_after=_count(record["bytes_after"]),
            error=None if error is None else _error(error),
            events=tuple(map(str, record["events"])),
        )


def _count(value: Any) -> int:
    """A number of bytes, rows or columns. Raises ValueError for what no tensor has."""
    count = int(value)
    if not 0 <= count < _MOST:
        raise ValueError(f"{count:.3g} is no number of bytes, rows or columns")
    return count


def _error(value: Any) -> float:
    """A relative error. Raises ValueError for what is none, or too large to be squared."""
    error = float(value)
    if not 0 <= error < _LARGEST:
        raise ValueError(f"{error:g} is no relative error")
    return error


@dataclass(frozen=True, slots=True)
class Ledger:
    """The whole file.

    identity   facts of origin (recipe, source, format, versions, calibration), in which a continued run must agree
    entries    one for each tensor of the source, in the order of its files
    budget     what a mix was chosen for, and what came of it (`planning.mix.run`); None where a scheme was named
    check      what the model lost, as the run that wrote it measured in its end; None where it did not

    Times, paths and the machine are not in it (they are in run.json): two runs of the same write the same bytes, but
    for the check, which reads as much as there is time for.
    """

    identity: Mapping[str, Any]
    entries: tuple[Entry, ...]
    budget: Mapping[str, Any] | None = None
    check: Mapping[str, Any] | None = None

    def content(self) -> bytes:
        """The file's bytes."""
        more = {"budget": self.budget, "check": self.check}
        known = {name: value for name, value in more.items() if value is not None}
        return json_bytes({"identity": self.identity, **known, "tensors": [entry.as_dict() for entry in self.entries]})

    @property
    def sha256(self) -> str:
        """By which records of the folder know that they are of it, in hexadecimal digits; the check does not count."""
        return hashlib.sha256(dataclasses.replace(self, check=None).content()).hexdigest()

    @property
    def recipe(self) -> str:
        """The recipe on one line; "" for a folder that was saved from memory."""
        recipe = self.identity.get("recipe")
        if recipe is None:
            return ""
        rules = [f"{pattern}={scheme}" for rule in recipe["rules"] for pattern, scheme in rule.items()]
        return " ".join([str(recipe["scheme"]), f"range={recipe['range']}", *rules])

    @property
    def calibration_text(self) -> str | None:
        """sha256 of the text that the folder was calibrated with; None for none."""
        facts = self.identity.get("calibration")
        text = facts.get("text") if isinstance(facts, Mapping) else None
        return text if isinstance(text, str) else None


@dataclass(frozen=True, slots=True)
class LayerType:
    """All tensors of one type and scheme, added up: a row of the table that people get.

    layers    what they are called, with `*` for numbers
    numbers   the scheme, or what the numbers are that were not quantized
    count     how many tensors
    bytes_before, bytes_after   of all of them
    error     root mean square of the tensors' relative errors; None where there are none
    """

    layers: str
    numbers: str
    count: int
    bytes_before: int
    bytes_after: int
    error: float | None


def read(folder: Path) -> Ledger | None:
    """The ledger of a finished folder; None if it has none.

    Raises CheckpointError for a file that is no ledger: too large, no JSON, or without a key that every ledger has.
    Keys that are not known are ignored, so that a newer one can be read as far as it is understood.
    """
    path = folder / LEDGER
    if not path.is_file():
        return None
    record = read_json(path, _MAX_BYTES)
    try:
        identity = record["identity"]
        if not isinstance(identity, Mapping):
            raise TypeError("identity is no object")
        budget, check = record.get("budget"), record.get("check")
        if not all(value is None or isinstance(value, Mapping) for value in (budget, check)):
            raise TypeError("budget or check is no object")
        json.dumps((identity, budget, check), allow_nan=False)  # of all of which a hash is made
        ledger = Ledger(identity, tuple(Entry.of(entry) for entry in record["tensors"]), budget, check)
        str(ledger.recipe)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a ledger that spicerack wrote: {error!r}", "quantize the model again"
        ) from error
    return ledger


def keep_check(folder: Path, check: Mapping[str, Any]) -> None:
    """Write what a folder of ours lost into its ledger, in place of an earlier check."""
    ledger = read(folder)
    assert ledger is not None, "it was written just now"
    write_atomically(folder / LEDGER, dataclasses.replace(ledger, check=check).content())


def by_layer_type(entries: Iterable[Entry]) -> list[LayerType]:
    """A row for each type of quantized layer and its scheme, then for the rest by what its numbers are.

    entries: of one folder, in any order; rows keep the order in which their first tensor came.
    """
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.action != "quantize"):
        if entry.action == "quantize":
            key = entry.layer_type, str(entry.scheme)
        else:
            key = ("everything else", entry.dtype.lower()) if entry.action == "copy" else ("tied copies", "dropped")
        groups.setdefault(key, []).append(entry)
    return [
        LayerType(
            layers, numbers, len(group), sum(e.bytes_before for e in group), sum(e.bytes_after for e in group),
            _root_mean_square([e.error or 0.0 for e in group]),
        )
        for (layers, numbers), group in groups.items()
    ]  # fmt: skip


def _root_mean_square(errors: list[float]) -> float | None:
    """sqrt(mean e^2) of relative errors; None where all are 0, as of tensors that were copied."""
    squares = sum(error**2 for error in errors)
    return math.sqrt(squares / len(errors)) if squares else None
