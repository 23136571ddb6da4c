"""A histogram of magnitudes that never loses a count, for observers that choose their range from all of it.

Bins are [k w, (k + 1) w), k < BINS, with w a power of two, chosen so that the peak falls in the upper half. When a
larger value comes, w doubles and neighbouring bins merge: floor(x / 2w) = floor(floor(x / w) / 2), so that the counts
are those of all values at once, whatever their order. A histogram whose range is set by its first batch, as many
calibrators have it, has to redistribute counts by guess when a larger value comes, and depends on the order.

It costs 512 KB, whatever the text, and tells magnitudes apart that differ by a 32768th of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from spicerack.algorithms.stats import CHUNK, tokens
from spicerack.machine.ranks import Ranks
from spicerack.quantization.calibration.observer import scale_for

BINS = 1 << 16
"""At least 32768 of them are in use: a code is 129 to 258 of them wide where the range is not clipped."""


class Histogram:
    """Counts of |x|: counts int64 [BINS]; width, of a bin; peak, the largest |x|; size, the number of values."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        self.width = 2.0**-200  # below what any float32 asks for
        self.peak = 0.0

    @property
    def size(self) -> int:
        """The number of values."""
        return int(self.counts.sum())

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take in x [..., K] of any float type; mask [...]: 0 where a token is padding. Raises ActivationError as
        `tokens` does."""
        rows = tokens(x, mask)
        if not rows.numel():
            return
        self._reach(float(rows.abs().max()))
        for chunk in rows.split(CHUNK):
            bins = (chunk.double().abs_() / self.width).long().flatten()
            self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def share(self, ranks: Ranks) -> None:
        """Take in the counts of the other ranks, once all have bins of one width."""
        peak = float(ranks.largest(torch.tensor(self.peak, dtype=torch.float64, device="cpu")))
        self._reach(peak)
        self.counts = ranks.total(self.counts)

    def _reach(self, peak: float) -> None:
        """Let bins be as wide as `peak` asks for: it then lies in the upper half of all bins."""
        if peak > self.peak:
            self._widen(math.ldexp(BINS**-1.0, math.frexp(peak)[1]))
            self.peak = peak

    def _widen(self, width: float) -> None:
        """Merge neighbouring bins until they are `width` wide, a power of two that is not less than now."""
        merged = min(round(math.log2(width / self.width)), BINS.bit_length() - 1)
        folded = self.counts.reshape(-1, 1 << merged).sum(1)
        self.counts = torch.nn.functional.pad(folded, (0, BINS - len(folded)))
        self.width = width


class FromHistogram:
    """The observer whose T is chosen by `criterion` from the histogram of all |x|, whatever the batches."""

    in_order = False

    def __init__(self, criterion: Callable[[Histogram], float]) -> None:
        """criterion: a histogram that has a value above 0 -> T; not asked where all values are 0."""
        self.criterion = criterion
        self.histogram = Histogram()

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """See `Observer`."""
        self.histogram.add(x, mask)

    def share(self, ranks: Ranks) -> None:
        """See `Observer`."""
        self.histogram.share(ranks)

    def scale(self) -> float:
        """See `Observer`."""
        if not self.histogram.size:
            return scale_for(None)
        return scale_for(self.criterion(self.histogram) if self.histogram.peak else 0.0)
