"""A histogram of magnitudes that never loses a count, and three ways to choose the largest magnitude T from it.

Bins are [k w, (k + 1) w), k < BINS, with w a power of two, chosen so that the peak falls in the upper half. When a
larger value comes, w doubles and neighbouring bins merge: floor(x / 2w) = floor(floor(x / w) / 2), so that the counts
are those of all values at once, whatever their order. Codes are -127 ... 127, with the scale T / 127.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from spicerack.algorithms.stats import CHUNK, tokens
from spicerack.machine.ranks import Ranks

Array = npt.NDArray[np.float64]

LARGEST_CODE = 127
BINS = 1 << 16
"""At least 32768 of them are in use: a code is 129 to 258 of them wide where the range is not clipped."""
SHRINKS = 100
KL_BINS = 2048
KL_LEVELS = 128


class Histogram:
    """Counts of |x|: counts int64 [BINS]; width, of a bin; peak, the largest |x|; size, the number of values."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.width = 2.0**-200  # below what any float32 asks for
        self.peak = 0.0

    @property
    def size(self) -> int:
        """The number of values."""
        return int(self.counts.sum())

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take in x [..., K]; mask [...]: 0 where a token is padding. Raises ActivationError."""
        rows = tokens(x, mask)
        if not rows.numel():
            return
        self._reach(float(rows.abs().max()))
        for chunk in rows.split(CHUNK):
            bins = (chunk.double().abs_() / self.width).long().flatten()
            self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def share(self, ranks: Ranks) -> None:
        """Take in the counts of the other ranks."""
        peak = float(ranks.largest(torch.tensor(self.peak, dtype=torch.float64)))
        self._reach(peak)
        self.counts = ranks.total(self.counts)

    def _reach(self, peak: float) -> None:
        """Let bins be as wide as that peak asks for."""
        if peak > self.peak:
            self._widen(math.ldexp(BINS**-1.0, math.frexp(peak)[1]))
            self.peak = peak

    def _widen(self, width: float) -> None:
        """Merge bins until they are `width` wide, never less than now."""
        merged = min(round(math.log2(width / self.width)), BINS.bit_length() - 1)
        folded = self.counts.reshape(-1, 1 << merged).sum(1)
        self.counts = torch.nn.functional.pad(folded, (0, BINS - len(folded)))
        self.width = width


def percentile(histogram: Histogram, percent: float) -> float:
    """T = that percentile of |x| over everything that was added, within half a bin; 100 is the peak.

    As `numpy.quantile` defines it: position p (n - 1) of the n sorted magnitudes, linear between neighbours.
    """
    position = percent / 100 * (histogram.size - 1)
    below = math.floor(position)
    low, high = (_ranked(histogram, rank) for rank in (below, math.ceil(position)))
    return low + (high - low) * (position - below)


def _ranked(histogram: Histogram, rank: int) -> float:
    """The magnitude in place `rank` of the sorted ones: its bin's middle."""
    cumulative = histogram.counts.cumsum(0)
    if rank >= int(cumulative[-1]) - 1:
        return histogram.peak
    found = int(torch.searchsorted(cumulative, torch.tensor(rank), right=True))
    return min((found + 0.5) * histogram.width, histogram.peak)


def least_squares(histogram: Histogram) -> float:
    """T = the one of peak * i / 100, i = 1 ... 100, whose codes have the least mean squared error."""
    used = histogram.counts.numpy().nonzero()[0]
    counts = histogram.counts.numpy()[used].astype(np.float64)
    x = (used.astype(np.float64) + 0.5) * histogram.width
    candidates = [histogram.peak * i / SHRINKS for i in range(1, SHRINKS + 1)]
    return min(candidates, key=lambda t: _squared_error(x, counts, t / LARGEST_CODE))


def _squared_error(x: Array, counts: Array, scale: float) -> float:
    decoded = np.minimum(np.rint(x / scale), LARGEST_CODE) * scale
    return float(counts @ np.square(decoded - x))


def entropy(histogram: Histogram) -> float:
    """T = the edge of the bin where clipping changes the distribution least: see `least_divergence`."""
    fine = histogram.counts.numpy()
    used = int(fine.nonzero()[0][-1]) + 1
    merged = -(-used // KL_BINS)
    counts = np.add.reduceat(fine[:used], np.arange(0, used, merged))
    edge = least_divergence(counts, KL_LEVELS) * merged * histogram.width
    return min(edge, histogram.peak)


def least_divergence(counts: npt.NDArray[np.int64], levels: int) -> int:
    """The number of bins i in levels ... B that minimizes KL(P || Q), for counts [B] whose last bin is not empty.

    P: the first i bins, all that lies beyond added to the last of them. Q: the first i bins alone, merged into `levels`
    equal stretches (bin k to stretch floor(k levels / i)), each spread evenly over those of its bins that are not
    empty. Both are normalized. A cut that would leave P something where Q has nothing has an infinite KL and loses.
    Of equal ones the largest wins. (Migacz, "8-bit inference with TensorRT", GTC 2017.)
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
    return int(np.flatnonzero(divergences <= divergences.min() + 1e-12)[-1])
