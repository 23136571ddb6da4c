"""A percentile of magnitudes: T = the 99.999th of |x|. The best measured (docs/quantization/quality.md).

99.9 ruins models with outliers: a few channels are far larger than the rest, and the model needs them.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from spicerack.quantization.calibration.histogram import FromHistogram, Histogram

PERCENT = 99.999
"""One magnitude in a hundred thousand is clipped: 99.9 loses what the model needs, 100 is the peak of a single
outlier."""


def percentile(histogram: Histogram, percent: float) -> float:
    """That percentile of |x| over everything that was added, within half a bin; 100 is the peak.

    As `numpy.quantile` defines it: position p (n - 1) of the n sorted magnitudes, linear between neighbours.
    """
    position = percent / 100 * (histogram.size - 1)
    below = math.floor(position)
    low, high = (_ranked(histogram, rank) for rank in (below, math.ceil(position)))
    return low + (high - low) * (position - below)


def _ranked(histogram: Histogram, rank: int) -> float:
    """The magnitude in place `rank` of all sorted ones: the middle of its bin; of the last place, the peak itself."""
    cumulative = histogram.counts.cumsum(0)
    if rank >= int(cumulative[-1]) - 1:
        return histogram.peak
    place = int(torch.searchsorted(cumulative, torch.tensor(rank, dtype=torch.int64, device="cpu"), right=True))
    return min((place + 0.5) * histogram.width, histogram.peak)


OBSERVER = partial(FromHistogram, lambda histogram: percentile(histogram, PERCENT))
