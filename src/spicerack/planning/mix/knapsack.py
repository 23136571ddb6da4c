"""One option for each unit: the least total loss whose total cost is within a budget. Exact.

How it works. Options that cost no less than another of their unit and lose no less are dropped: nothing is lost by
that. The lower hulls of all units, their steps taken in the order of what they gain for a unit of cost, solve the
relaxed problem, in which one unit may be between two options. That gives a price of cost and a bound below, and without
its last step a choice that is within the budget. From there on units are added one after another to a list of partial
choices, (cost, loss), of which those stay that no cheaper one is as good as, and that could still beat the best choice
that is known: with each of the units that are missing at the bound's price. What is left is the answer, and no rounding
of costs is in it.

Lists stay short because the bound is tight: few units are far from their hull. In the worst case they grow with the
number of units times options in the exponent, as for every exact solver; a thousand units of eight options take a
fraction of a second where losses fall as those of models do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SLACK = 1e-12
"""Of a loss: sums of the same numbers in another order differ by so much, and must not be taken for worse."""

Numbers = NDArray[np.float64]


class _Unit(NamedTuple):
    """The options of a unit that no other of its options makes useless, cheapest first: numbers, costs, losses."""

    options: NDArray[np.int64]
    cost: Numbers
    loss: Numbers


class _Step(NamedTuple):
    """From one option on a unit's lower hull to the next: what it gains for a unit of cost, whose, and to which."""

    gain: float
    unit: int
    cost: float
    option: int


def least(cost: Sequence[Sequence[float]]) -> float:
    """The least total cost that there is."""
    return math.fsum(min(options) for options in cost)


def choose(loss: Sequence[Sequence[float]], cost: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """For each unit the number of an option, with the least total loss of all choices whose cost is within `budget`.

    loss     of each unit's options, not negative
    cost     of the same, not negative: bytes, bits, seconds, anything that adds up
    budget   most that all may cost

    None where even the cheapest options cost more. Of equal losses the cheaper choice is taken.
    """
    units = [_undominated(lost, costs) for lost, costs in zip(loss, cost, strict=True)]
    if sum(unit.cost[0] for unit in units) > budget:
        return None
    price, start = _relaxed(units, budget)
    chosen = _exact(units, budget, price, start)
    return [int(unit.options[option]) for unit, option in zip(units, chosen, strict=True)]


def _undominated(loss: Sequence[float], cost: Sequence[float]) -> _Unit:
    """A unit's options, cheapest first, each of which loses less than all that are cheaper."""
    lost, costs = np.asarray(loss, np.float64), np.asarray(cost, np.float64)
    order = np.lexsort((lost, costs))
    best = np.minimum.accumulate(lost[order])
    kept = order[np.r_[True, lost[order][1:] < best[:-1]]]
    return _Unit(kept, costs[kept], lost[kept])


def _hull(unit: _Unit, number: int) -> list[_Step]:
    """Steps along the lower hull of a unit, from its cheapest option on: what they gain falls."""
    corners = [0]
    for option in range(1, len(unit.cost)):
        while len(corners) > 1 and _gain(unit, corners[-2], corners[-1]) <= _gain(unit, corners[-1], option):
            corners.pop()
        corners.append(option)
    return [
        _Step(_gain(unit, a, b), number, float(unit.cost[b] - unit.cost[a]), b) for a, b in itertools.pairwise(corners)
    ]


def _gain(unit: _Unit, before: int, behind: int) -> float:
    """Loss that is saved for a unit of cost."""
    return float((unit.loss[before] - unit.loss[behind]) / (unit.cost[behind] - unit.cost[before]))


def _relaxed(units: Sequence[_Unit], budget: float) -> tuple[float, list[int]]:
    """The price of cost where one unit may lie between two options, and the best choice found on the way.

    The price is what the first step gains that is not affordable; 0 where all are. Steps behind it that still fit are
    taken, so that the choice is a good one to begin with.
    """
    chosen, spent, price = [0] * len(units), float(sum(unit.cost[0] for unit in units)), 0.0
    stopped: set[int] = set()
    for step in sorted((step for i, unit in enumerate(units) for step in _hull(unit, i)), key=lambda s: -s.gain):
        if step.unit in stopped or spent + step.cost > budget:
            price = price or step.gain
            stopped.add(step.unit)
            continue
        chosen[step.unit], spent = step.option, spent + step.cost
    return price, chosen


def _exact(units: Sequence[_Unit], budget: float, price: float, start: Sequence[int]) -> list[int]:
    """The best choice: lists of partial ones, cut by what they cannot reach. start: one that is within the budget."""
    best = sum(float(unit.loss[option]) for unit, option in zip(units, start, strict=True))
    priced = [unit.loss + price * unit.cost for unit in units]
    # units whose choice is plain come last: the lists are short as long as few are open
    order = sorted(range(len(units)), key=lambda i: _second(priced[i]))[::-1]
    bound = np.r_[np.cumsum([priced[i].min() for i in order][::-1])[::-1], 0.0]
    floor = np.r_[np.cumsum([units[i].cost[0] for i in order][::-1])[::-1], 0.0]
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for place, i in enumerate(order, start=1):
        unit = units[i]
        costs, losses = (cost[:, None] + unit.cost).ravel(), (loss[:, None] + unit.loss).ravel()
        reach = losses + price * (costs - budget) + bound[place]
        open_ = (costs + floor[place] <= budget) & (reach <= best * (1 + _SLACK) + _SLACK * price * budget)
        kept = _pareto(costs, losses, np.flatnonzero(open_))
        if not len(kept):  # by rounding of sums alone: nothing beats what is there
            return list(start)
        cost, loss = costs[kept], losses[kept]
        steps.append((kept // len(unit.cost), kept % len(unit.cost)))
    chosen, last = [0] * len(units), int(loss.argmin())
    for i, (parent, option) in zip(reversed(order), reversed(steps), strict=True):
        chosen[i], last = int(option[last]), int(parent[last])
    return chosen


def _second(priced: Numbers) -> float:
    """How much a unit's second best option is behind its best, at the price; more than anything where there is one."""
    return float(np.partition(priced, 1)[1] - priced.min()) if len(priced) > 1 else math.inf


def _pareto(cost: Numbers, loss: Numbers, among: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the partial choices `among` that lose less than all that cost no more."""
    if not len(among):
        return among
    order = among[np.lexsort((loss[among], cost[among]))]
    best = np.minimum.accumulate(loss[order])
    return order[np.r_[True, loss[order][1:] < best[:-1]]]
