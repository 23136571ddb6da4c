"""Averages of minimum and maximum that follow those of each batch by a tenth: the order of the batches matters.

    T = max(-lo, hi),    lo <- 0.9 lo + 0.1 min(x, 0),    hi <- 0.9 hi + 0.1 max(x, 0)

They begin with those of the first batch that has a token. A batch is a sequence, so that outliers of a single one count
for little, and the last sequences for most.
"""

from __future__ import annotations

import torch

from spicerack.algorithms.stats import tokens
from spicerack.machine.ranks import Ranks
from spicerack.quantization.calibration.observer import scale_for

MOMENTUM = 0.9
"""What an average keeps of itself in a batch: torch's observers keep 0.99, of many more batches than there are here."""


class MovingAverage:
    """lo and hi of the equations above; every rank goes through all of the text."""

    in_order = True

    def __init__(self) -> None:
        self.bounds: tuple[float, float] | None = None

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """See `Observer`."""
        rows = tokens(x, mask)
        if not rows.numel():
            return
        lo, hi = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
        if self.bounds is not None:
            before = self.bounds
            lo, hi = (MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(before, (lo, hi), strict=True))
        self.bounds = lo, hi

    def share(self, _ranks: Ranks) -> None:
        """Nothing: each rank saw all."""

    def scale(self) -> float:
        """See `Observer`."""
        return scale_for(None if self.bounds is None else max(-self.bounds[0], self.bounds[1]))


OBSERVER = MovingAverage
