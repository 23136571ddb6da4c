"""What a planner asks of an engine: `Engine`, data and a few functions, declared by the plug-ins in `engines/`.

    terms    what an engine adds to weights and cache on each device, each with how it is known
    split    whether several devices hold layers one after the other, or a share of each layer
    flags    the command line that does what was planned
    dry_run  its own count of memory, of engines that can count without a weight

Figures that were measured by others are in the plug-in that uses them, with where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spicerack import plugins
from spicerack.errors import UsageError
from spicerack.machine.catalogue import Device
from spicerack.planning.cache import Rule
from spicerack.planning.model import Model, Purpose
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision
from spicerack.storage import engine as stored

Split = Literal["layers", "tensor", "none"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to fit.

    context     tokens of each sequence
    users       sequences at once
    cache_bits  of keys and values: 16, 8 or 4
    utilization share of a card's memory that vLLM may have; None for its default
    """

    context: int
    users: int = 1
    cache_bits: int = 16
    utilization: float | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """What an engine says that a device would hold, in bytes: of weights, of the cache, and of what it computes in."""

    device: str
    weights: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.buffers


@dataclass(frozen=True, slots=True)
class DryRun:
    """What an engine counted itself, nothing computed and no weight read.

    program  that was asked
    counted  of each device
    step     bytes that its figures are rounded down to
    planned  bytes of buffers by our formula for what the program counts
    note     what it counts otherwise than the engine does that people run; empty where nothing
    """

    program: str
    counted: tuple[Counted, ...]
    step: int
    planned: int
    note: str


@dataclass(frozen=True)
class Engine:
    """A program that runs models.

    name          as people type it
    summary       what it is, in a line
    kinds         of accelerators that it computes on (`speed.kind_of`)
    families      that it cannot run -> why, as the end of a sentence; `only` the ones it can, None for all
    does          what models must be for that it runs; None: anything
    precisions    the numbers that it computes with, for a model; those of the best quality first
    rule          of its cache
    cache_bytes   bits of a cache -> bytes of an element
    split         how several devices share a model
    terms         what a device that is used holds besides weights and cache
    budget        bytes of a device that all of this must fit in
    flags         lines to paste: program and options
    dry_run       of a file, as it would be placed, or with everything in the processor's memory where no placement is
                  given; raises UsageError where the engine is not installed or refuses. None: it has none
    table_in_ram  a card's processor keeps the table of tokens
    towers        whether towers for pictures are loaded with the model
    offload       layers may stay in the memory of the processor
    opening       times the weights that are held while it opens a model
    speed_of      whose measured speeds are taken, and what is said where they are another's
    most_users    sequences at once that it has room for, whatever the memory; None: any number
    whole_parts   whether it computes with a precision where rows of inputs are cut into so many parts; None: always
    """

    name: str
    summary: str
    kinds: frozenset[str]
    precisions: Callable[[Model], list[Precision]]
    rule: Rule
    cache_bytes: Mapping[int, float]
    split: Split
    terms: Callable[[Model, Request], tuple[Term, ...]]
    budget: Callable[[Device, Request], int]
    flags: Callable[[Model, Precision, Request, Placement], list[str]]
    families: Mapping[str, str] = field(default_factory=dict)
    only: frozenset[str] | None = None
    does: frozenset[Purpose] | None = None
    table_in_ram: bool = False
    towers: bool = True
    offload: bool = False
    opening: float = 1.0
    speed_of: str | None = None
    most_users: int | None = None
    whole_parts: Callable[[Model, Precision, int], bool] | None = None
    dry_run: Callable[[Path, Model, Request, Placement | None], DryRun] | None = None

    def obstacle(self, model: Model, devices: Sequence[Device], kinds: Sequence[str]) -> str | None:
        """Why it cannot run the model there at all, as a sentence without its end; None if nothing speaks against it.

        kinds: of `devices`, one after the other.
        """
        if (reason := self.families.get(model.family)) is not None:
            return f"{self.name} {reason}"
        if self.does is not None and model.does not in self.does:
            return f"{self.name} does not run models for {model.does}, as {model.family} is one"
        if self.only is not None and model.family not in self.only:
            return f"{self.name} does not run models of the family {model.family}"
        for device, kind in zip(devices, kinds, strict=True):
            if kind not in self.kinds and kind != "memory":
                return f"{self.name} does not compute on {device.name} ({kind})"
        return None


def names() -> tuple[str, ...]:
    """Names of all engines, as people type them."""
    return tuple(engine.name for engine in all_engines())


def all_engines() -> tuple[Engine, ...]:
    """All of them, by their files' names."""
    return tuple(plugins.get("planning.engines", name, "ENGINE") for name in plugins.names("planning.engines"))


def get(name: str) -> Engine:
    """The engine that people call `name`, by `storage.engine.plain`. Raises UsageError with all names."""
    wanted = stored.plain(name)
    for engine in all_engines():
        if stored.plain(engine.name) == wanted:
            return engine
    known = any(stored.plain(other) == wanted for other in stored.names())
    raise UsageError(
        f"nothing is planned for {name} yet" if known else f"no engine {name!r}", f"one of {', '.join(names())}"
    )
