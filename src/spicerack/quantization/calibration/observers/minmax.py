"""The largest magnitude that came: T = max |x|. Nothing is clipped, and one outlier decides.

What all the others are compared with: it is exact, whatever the order, and needs one number.
"""

from __future__ import annotations

import torch

from spicerack.algorithms.stats import tokens
from spicerack.machine.ranks import Ranks
from spicerack.quantization.calibration.observer import scale_for


class MinMax:
    """T = max |x| over everything that was added, whatever the batches."""

    in_order = False

    def __init__(self) -> None:
        self.peak: float | None = None

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """See `Observer`."""
        rows = tokens(x, mask)
        if rows.numel():
            self.peak = max(self.peak or 0.0, float(rows.abs().max()))

    def share(self, ranks: Ranks) -> None:
        """The largest of all ranks; -1 stands for one that saw nothing."""
        peak = float(
            ranks.largest(torch.tensor(-1.0 if self.peak is None else self.peak, dtype=torch.float64, device="cpu"))
        )
        self.peak = None if peak < 0 else peak

    def scale(self) -> float:
        """See `Observer`."""
        return scale_for(self.peak)


OBSERVER = MinMax
