"""4-bit NormalFloat: 16 quantiles of the normal distribution (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

from statistics import NormalDist

from spicerack.numerics.levels import TableLevels
from spicerack.numerics.scheme import Scheme

OUTERMOST = 1 - (1 / 30 + 1 / 32) / 2
"""Probability of the largest: the mean of the middles of the last of 15 and of 16 equal shares."""


def _quantiles(count: int) -> list[float]:
    """`count` quantiles of N(0, 1), evenly spaced in probability from OUTERMOST down to, and without, 1/2."""
    step = (OUTERMOST - 0.5) / count
    return [NormalDist().inv_cdf(OUTERMOST - i * step) for i in range(count)]


def _levels() -> TableLevels:
    """Seven negative values, 0, eight positive ones; the outermost are -1 and 1."""
    values = [-q for q in _quantiles(7)] + [0.0] + _quantiles(8)[::-1]
    return TableLevels(tuple(value / values[-1] for value in values))


SCHEME = Scheme(name="nf4", levels=_levels(), group=(1, 64))
