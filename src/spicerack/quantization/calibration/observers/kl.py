"""Least divergence: T where clipping changes the distribution of |x| least, as TensorRT calibrates.

(Migacz, "8-bit inference with TensorRT", GTC 2017.) For each T the distribution of what lies within, all beyond added
at its end, is compared with what 128 codes can tell apart of it; how far off a clipped value is does not count.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from spicerack.quantization.calibration.histogram import FromHistogram, Histogram

BINS = 2048
"""Of the histogram that distributions are compared on, as in the talk; finer ones are merged."""
LEVELS = 128
"""Stretches of equal bins that a code's values are taken as, as in the talk: magnitudes that int8 has, with 0."""


def entropy(histogram: Histogram) -> float:
    """The T that is the edge of the bin where clipping changes the distribution least: see `least_divergence`."""
    fine = histogram.counts.numpy()
    used = int(fine.nonzero()[0][-1]) + 1
    merged = -(-used // BINS)
    counts = np.add.reduceat(fine[:used], np.arange(0, used, merged))
    edge = least_divergence(counts, LEVELS) * merged * histogram.width
    return min(edge, histogram.peak)


def least_divergence(counts: npt.NDArray[np.int64], levels: int) -> int:
    """The number of bins i in levels ... B that minimizes KL(P || Q), for counts [B] whose last bin is not empty.

    P: the first i bins, all that lies beyond added to the last of them. Q: the first i bins alone, merged into `levels`
    equal stretches (bin k to stretch floor(k levels / i)), each spread evenly over those of its bins that are not
    empty. Both are normalized. A cut that would leave P something where Q has nothing has an infinite KL and loses.
    Of equal ones the largest wins.
    """
    bins = len(counts)
    if bins <= levels:
        return bins
    c = counts.astype(np.float64)
    mass = np.concatenate([[0.0], np.cumsum(c)])
    filled = np.concatenate([[0.0], np.cumsum(c > 0)])
    clogc = np.concatenate([[0.0], np.cumsum(c * np.log(np.where(c > 0, c, 1.0)))])
    total = mass[-1]
    divergences = np.full(bins + 1, np.inf)
    for i in range(levels, bins + 1):
        last, tail = c[i - 1], total - mass[i]
        if last == 0:
            continue
        borders = -(-np.arange(levels + 1) * i // levels)
        q = np.diff(mass[borders])
        p = q.copy()
        p[-1] += tail
        each = q / np.maximum(np.diff(filled[borders]), 1.0)
        p_log_p = clogc[i] - last * np.log(last) + (last + tail) * np.log(last + tail)
        p_log_q = float(p @ np.log(np.where(q > 0, each, 1.0)))
        divergences[i] = (p_log_p - p_log_q) / total + np.log(mass[i] / total)
    return int(np.flatnonzero(divergences <= divergences.min() + 1e-12)[-1])  # equal, but for float64's rounding


OBSERVER = partial(FromHistogram, entropy)
