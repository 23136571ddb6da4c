"""Ranges of static int8 activations: one scale for all inputs of a layer, found from calibration batches.

    scale = T / 127,  codes -127 ... 127,  code 0 is exactly 0

    minmax          T = max |x|
    moving_average  minimum and maximum follow those of each batch by a tenth: the order of the batches matters
    percentile      T = the 99.999th percentile of |x|. (99.9 ruins models with outliers.)
    mse             T with the least squared error, of 100 shrinks of max |x|
    kl              T where clipping changes the distribution of |x| least

All but the moving average see every value at once, whatever the batches. What they keep does not grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from spicerack.algorithms.stats import tokens
from spicerack.errors import ActivationError
from spicerack.machine.ranks import Ranks
from spicerack.numerics.scales import SMALLEST
from spicerack.quantization.calibration.histogram import LARGEST_CODE, Histogram, entropy, least_squares, percentile
from spicerack.quantization.recipe import ObserverName

PERCENT = 99.999
MOMENTUM = 0.9


class Observer(Protocol):
    """Sees a layer's inputs, then tells their scale.

    in_order: it has to see all of them, and in their order; of others, several ranks may each see some.
    """

    @property
    def in_order(self) -> bool: ...

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take in x [..., K]; mask [...]: 0 where a token is padding.

        Raises ActivationError for a value that is not finite, with its token and column.
        """

    def share(self, ranks: Ranks) -> None:
        """Take in what the other ranks saw, unless it sees all in order."""

    def scale(self) -> float:
        """What a code counts for; 1 if all was zero. Raises ActivationError if there was no token."""


class MinMax:
    """T = max |x|."""

    in_order = False

    def __init__(self) -> None:
        self.peak: float | None = None

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """See `Observer`."""
        rows = tokens(x, mask)
        if rows.numel():
            self.peak = max(self.peak or 0.0, float(rows.abs().max()))

    def share(self, ranks: Ranks) -> None:
        """See `Observer`."""
        peak = float(ranks.largest(torch.tensor(-1.0 if self.peak is None else self.peak, dtype=torch.float64)))
        self.peak = None if peak < 0 else peak

    def scale(self) -> float:
        """See `Observer`."""
        return _scale(self.peak)


class MovingAverage:
    """T = max(-lo, hi); lo <- 0.9 lo + 0.1 min(x, 0), hi <- 0.9 hi + 0.1 max(x, 0), from those of the first batch."""

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
        """See `Observer`."""

    def scale(self) -> float:
        """See `Observer`."""
        return _scale(None if self.bounds is None else max(-self.bounds[0], self.bounds[1]))


class FromHistogram:
    """T chosen by `criterion` from the histogram of all |x|."""

    in_order = False

    def __init__(self, criterion: Callable[[Histogram], float]) -> None:
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
            return _scale(None)
        return _scale(self.criterion(self.histogram) if self.histogram.peak else 0.0)


OBSERVERS: dict[ObserverName, Callable[[], Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": lambda: FromHistogram(lambda histogram: percentile(histogram, PERCENT)),
    "mse": lambda: FromHistogram(least_squares),
    "kl": lambda: FromHistogram(entropy),
}


def _scale(largest: float | None) -> float:
    if largest is None:
        raise ActivationError("the layer has seen no token", "calibrate with more text, or use dynamic activations")
    return max(largest / LARGEST_CODE, SMALLEST) if largest else 1.0
