"""Intervals and rank correlation, so that running an evaluation needs no statistics package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

_SMALL = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
"""Student's t at 97.5 %, for 1 to 9 degrees of freedom."""
_Z = 1.959963984540054
"""The same for infinitely many: the normal distribution's."""


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval.

    mean     of the observations
    lo, hi   the ends; None for a single observation, which has no spread
    """

    mean: float
    lo: float | None
    hi: float | None

    @property
    def ends(self) -> list[float] | None:
        """Both ends as JSON has them; None for none."""
        return None if self.lo is None or self.hi is None else [self.lo, self.hi]

    def map(self, f: Callable[[float], float]) -> Interval:
        """The interval of f of the mean; f rises."""
        return Interval(f(self.mean), *(None if end is None else f(end) for end in (self.lo, self.hi)))

    def within(self, low: float, high: float) -> Interval:
        """The same, its ends cut to what is possible."""
        return self.map(lambda value: min(max(value, low), high))


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to 1e-5: a table up to 9 degrees of freedom, then four terms of the
    Cornish-Fisher expansion in 1/degrees (Abramowitz and Stegun 26.7.5), whose error falls with the fifth power."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom; an interval needs at least 1")
    if degrees <= len(_SMALL):
        return _SMALL[degrees - 1]
    z, z3, z5, z7, z9 = (math.pow(_Z, power) for power in (1, 3, 5, 7, 9))
    terms = (
        (z3 + z) / 4,
        (5 * z5 + 16 * z3 + 3 * z) / 96,
        (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / 384,
        (79 * z9 + 776 * z7 + 1482 * z5 - 1920 * z3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, start=1))


def mean_interval(values: torch.Tensor) -> Interval:
    """mean +- t * sd / sqrt(n) of independent observations `values` [n], in float64: the 95 % interval of their
    mean."""
    values = values.double()
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, None, None)
    half = t_quantile(n - 1) * float(values.std(correction=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """1-based ranks of `values` [n], float64 [n]; equal values share the average of their ranks."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    average: torch.Tensor = count.cumsum(0) - (count.double() - 1) / 2
    return average[place]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Rank correlation of `a` [n] and `b` [n]: Pearson's correlation of their ranks; None if one is constant."""
    centred = [ranks(values) - (len(values) + 1) / 2 for values in (a, b)]
    norms = [float(values.norm()) for values in centred]
    if 0.0 in norms:
        return None
    return float(centred[0] @ centred[1]) / (norms[0] * norms[1])
