"""`Target`: where models go. A plug-in in `targets/` declares one, and is found by what `--to` calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spicerack import plugins
from spicerack.errors import UsageError
from spicerack.exports.source import Source
from spicerack.storage.format import Contents

Check = Callable[[Path], None]
"""Reads back what lies there, still under another name. Raises where it is not what was to be written."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be written, beside the model.

    to           under which of its names the target was asked for
    output       the file or folder that will appear
    check        called with what was written before it gets its name; if it raises, nothing is left
    facts        for the ledger that travels with the model: who made it, from what, who read it back; of JSON's values
    shard_bytes  the largest file, where the target has several; None: the target's own
    """

    to: str
    output: Path
    check: Check
    facts: Mapping[str, Any]
    shard_bytes: int | None = None


class Target(Protocol):
    """A kind of file or folder that other engines read."""

    @property
    def names(self) -> Sequence[str]:
        """What `--to` calls it: one name for each thing that it writes."""

    @property
    def floats(self) -> bool:
        """Whether it is also what models are exported to in which nothing is quantized."""

    def prepared(self, to: str, contents: Contents, /) -> Contents:
        """The contents as this target lays them out: what it decides over all tensors at once."""

    def obstacles(self, to: str, contents: Contents, /) -> list[str]:
        """Why tensors cannot be held exactly in their schemes, a sentence each beginning with `MODULE: `; empty if all
        can.

        From headers alone: no weight is read. `storage.holding` asks it about schemes that would do, one tensor at a
        time. A rule about a tensor must not depend on the others, but for those that no scheme would help.
        """

    def refusals(self, to: str, source: Source, /) -> list[str]:
        """What else stands against the model, whatever its schemes: a family that the engine has not, a tokenizer that
        cannot be said there. Sentences; empty if nothing does. No packed tensor is read."""

    def inexact(self, to: str, source: Source, /) -> list[str]:
        """Tensors whose scales the target does not hold although it holds their schemes, a sentence each: those are
        read, where `prepared` has not given their types away."""

    def notes(self, to: str, source: Source, /) -> list[str]:
        """What a person should know of what will be written, in plain sentences."""

    def nbytes(self, source: Source, order: Order, /) -> int:
        """Bytes that `write` will put on the disk with the same order, to the byte; no tensor is read."""

    def write(self, source: Source, order: Order, /) -> None:
        """Write all of it, streaming, under another name; then `order.check`; then give it its name.

        Raises OutputError, CheckpointError and WeightError; then nothing stands under the name, and nothing is left
        beside it.
        """


@dataclass(frozen=True, slots=True)
class Asked:
    """A target under one of its names: what `storage.holding` asks."""

    target: Target
    to: str

    def prepared(self, contents: Contents, /) -> Contents:
        """See `Target.prepared`."""
        return self.target.prepared(self.to, contents)

    def obstacles(self, contents: Contents, /) -> list[str]:
        """See `Target.obstacles`."""
        return self.target.obstacles(self.to, contents)


def names() -> list[str]:
    """Everything that `--to` takes, sorted."""
    return sorted(name for target in _targets() for name in target.names)


def find(name: str) -> Target:
    """The target that is called `name`. Raises UsageError with all names for one that none is called."""
    for target in _targets():
        if name in target.names:
            return target
    raise UsageError(f"nothing is exported to {name!r}", f"one of {', '.join(names())}")


def _targets() -> list[Target]:
    """Every plug-in of `targets/`."""
    return [plugins.get("exports.targets", name, "TARGET") for name in plugins.names("exports.targets")]
