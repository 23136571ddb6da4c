"""Where a model's parts lie once they are placed: what each device holds, and what the processor's memory does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spicerack.machine.catalogue import Device

How = Literal["exact", "formula", "estimate"]
"""How a figure is known: to the byte; by a formula that was checked; or a guess with its spread."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part of what a device holds.

    spread   how far an estimate may be off, in bytes, up or down
    """

    name: str
    nbytes: int
    how: How
    spread: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What one device holds.

    layers   numbers of blocks, in their order; of a part of each layer all of them
    terms    everything, each with its name
    read     bytes of weights that it reads for one token
    cached   bytes of cache that it reads for one token of a full context
    budget   bytes that it may hold
    """

    device: Device
    layers: tuple[int, ...]
    terms: tuple[Term, ...]
    read: int
    cached: int
    budget: int

    @property
    def total(self) -> int:
        """Bytes of all terms."""
        return sum(term.nbytes for term in self.terms)

    @property
    def spare(self) -> int:
        """What is left of the budget; negative where it is too little."""
        return self.budget - self.total

    @property
    def spread(self) -> int:
        """How far the total may be off."""
        return sum(term.spread for term in self.terms)


@dataclass(frozen=True, slots=True)
class Placement:
    """All devices, and what does not lie on them.

    shares           of the devices that are used
    host             what lies in the processor's memory beside them; None where nothing does
    disk             bytes that are read from the disk, again for each token
    missing          bytes that fit nowhere; 0 where all fit
    tensor, pipeline parts that each layer is cut into, and groups of devices that follow each other
    experts_in_ram   layers, from the first on, whose routed experts lie in the processor's memory
    experts_layers   layers that have such
    """

    shares: tuple[Share, ...]
    host: Share | None = None
    disk: int = 0
    missing: int = 0
    tensor: int = 1
    pipeline: int = 1
    experts_in_ram: int = 0
    experts_layers: int = 0

    @property
    def fits(self) -> bool:
        """Whether everything has its place, the disk not counted."""
        return not self.missing and not self.disk

    @property
    def total(self) -> int:
        """Bytes on devices."""
        return sum(share.total for share in self.shares)

    @property
    def budget(self) -> int:
        """Bytes that those devices may hold."""
        return sum(share.budget for share in self.shares)

    @property
    def spare(self) -> int:
        """What is left on all devices together; negative by what is missing."""
        return self.budget - self.total if self.fits else -(self.missing + self.disk)
