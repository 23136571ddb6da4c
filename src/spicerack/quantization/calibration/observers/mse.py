"""Least squares: T with the least mean squared error of what is rounded, of 100 shrinks of max |x|.

A smaller T has finer steps for all values, and clips those beyond it: the sum over the histogram weighs the one against
the other. It asks how far inputs are off, and not how much the layer makes of each of them.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from spicerack.quantization.calibration.histogram import FromHistogram, Histogram
from spicerack.quantization.calibration.observer import LARGEST_CODE

Array = npt.NDArray[np.float64]

SHRINKS = 100
"""Candidates: near the best T the error is flat, and a hundredth of the peak is fine enough."""


def least_squares(histogram: Histogram) -> float:
    """The T of peak * i / 100, i = 1 ... 100, whose codes have the least squared error, values taken as their bins'
    middles.
    """
    used = histogram.counts.numpy().nonzero()[0]
    counts = histogram.counts.numpy()[used].astype(np.float64)
    x = (used.astype(np.float64) + 0.5) * histogram.width
    candidates = [histogram.peak * i / SHRINKS for i in range(1, SHRINKS + 1)]
    return min(candidates, key=lambda t: _squared_error(x, counts, t / LARGEST_CODE))


def _squared_error(x: Array, counts: Array, scale: float) -> float:
    """Sum of (decoded - x)^2 over magnitudes x [B], each as often as counts [B] says."""
    decoded = np.minimum(np.rint(x / scale), LARGEST_CODE) * scale
    return float(counts @ np.square(decoded - x))


OBSERVER = partial(FromHistogram, least_squares)
