"""`Solved`: what a solver returns."""

from __future__ import annotations

from dataclasses import dataclass

from spicerack.numerics.qtensor import QTensor


@dataclass(frozen=True, slots=True)
class Solved:
    """A weight with its codes, and how they came about.

    q       the quantized weight, on the device where it was solved
    events  what a person should know of it (a scheme that the solver cannot do, columns that are always 0), for the
            ledger and the screen; most weights have none
    """

    q: QTensor
    events: tuple[str, ...] = ()
