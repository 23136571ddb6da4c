"""`Solved`: what a solver returns."""

from __future__ import annotations

from dataclasses import dataclass

from spicerack.numerics.qtensor import QTensor


@dataclass(frozen=True, slots=True)
class Solved:
    """q: the quantized tensor. events: what a person should know of how it came about, for the ledger."""

    q: QTensor
    events: tuple[str, ...] = ()
