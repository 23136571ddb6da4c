"""Mixes by what is expected of units: the best within bytes or bits, the smallest within a loss, the curve of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spicerack.errors import UsageError
from spicerack.planning.mix.knapsack import choose
from spicerack.planning.sensitivity import Budget, Point, Sensitivity

_POINTS = 24
"""Of the curve."""

Chosen = dict[str, str]
"""Unit's name -> scheme's name."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a mix weighs, to the byte.

    files    of all files of weights, headers counted
    tensors  of all tensors
    bits     of a quantized weight
    """

    files: int
    tensors: int
    bits: float


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is quantized by rules, beside the units: it counts in bits of a weight.

    bits, weights   of these tensors
    largest         the largest tensor that stays in float and a rule could shrink: module, bytes; None without one
    """

    bits: int = 0
    weights: int = 0
    largest: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Mixer:
    """Solves for mixes by what is expected of units."""

    known: Sensitivity
    fixed: Fixed

    def loss(self, chosen: Mapping[str, str]) -> float:
        """Expected, of a mix."""
        return math.fsum(unit.schemes[chosen[unit.name]].loss for unit in self.known.units)

    def cheapest(self) -> Chosen:
        """The mix of the fewest bytes."""
        return {u.name: min(u.schemes, key=lambda name: u.schemes[name].nbytes) for u in self.known.units}

    def dearest(self) -> Chosen:
        """The mix that loses least, whatever its bytes."""
        return {u.name: min(u.schemes, key=lambda name: u.schemes[name].loss) for u in self.known.units}

    def within(self, cost: Literal["nbytes", "bits"], most: float) -> Chosen | None:
        """The mix of the least loss whose units take `most` bytes, or bits, together; None where none does."""
        return self._picked(choose(self._table("loss"), self._table(cost), most))

    def losing(self, most: float) -> Chosen | None:
        """The mix of the fewest bytes that is expected to lose no more; None where each loses more."""
        return self._picked(choose(self._table("nbytes"), self._table("loss"), most))

    def nbytes(self, chosen: Mapping[str, str]) -> int:
        """Of a mix's units."""
        return sum(unit.schemes[chosen[unit.name]].nbytes for unit in self.known.units)

    def bits(self, chosen: Mapping[str, str]) -> float:
        """Of a quantized weight."""
        own = sum(unit.schemes[chosen[unit.name]].bits for unit in self.known.units)
        return (own + self.fixed.bits) / (self.known.weights + self.fixed.weights)

    def curve(self) -> tuple[Point, ...]:
        """The best mixes from the fewest bytes to the most."""
        sizes = [[option.nbytes for option in unit.schemes.values()] for unit in self.known.units]
        low, high = sum(map(min, sizes)), sum(map(max, sizes))
        points: dict[int, Point] = {}
        for step in range(_POINTS + 1):
            chosen = self.within("nbytes", low * (high / low) ** (step / _POINTS) * (1 + 1e-12))
            assert chosen is not None, "the fewest bytes are within each"
            nbytes = self.known.fixed_bytes + self.nbytes(chosen)
            points[nbytes] = Point(nbytes, self.bits(chosen), self.loss(chosen))
        return tuple(points[nbytes] for nbytes in sorted(points))

    def _table(self, field: Literal["loss", "nbytes", "bits"]) -> list[list[float]]:
        fields = [[(o.loss, float(o.nbytes), float(o.bits)) for o in u.schemes.values()] for u in self.known.units]
        place = ("loss", "nbytes", "bits").index(field)
        return [[values[place] for values in options] for options in fields]

    def _picked(self, options: Sequence[int] | None) -> Chosen | None:
        if options is None:
            return None
        return {u.name: list(u.schemes)[option] for u, option in zip(self.known.units, options, strict=True)}


def solved(mixer: Mixer, budget: Budget, size: Callable[[Chosen], Sizes]) -> Chosen:
    """The mix that a budget of bytes or bits buys, by what is expected. Raises UsageError where none keeps it."""
    if budget.kind == "bits":
        fixed, weights = mixer.fixed, mixer.known.weights + mixer.fixed.weights
        chosen = mixer.within("bits", budget.value * weights - fixed.bits)
        if chosen is None:
            raise _too_small(mixer, budget, size)
        return chosen
    best, last = None, mixer.cheapest()
    beside = size(last).files - mixer.nbytes(last)  # floats and headers, which depend a little on the mix
    while (chosen := mixer.within("nbytes", budget.value - beside)) is not None:
        sizes = size(chosen)
        if sizes.files <= budget.value:
            if best is None or mixer.loss(chosen) < mixer.loss(best):
                best = chosen
            if chosen == last or sizes.files - mixer.nbytes(chosen) >= beside:
                break
            beside, last = sizes.files - mixer.nbytes(chosen), chosen
        else:
            beside = max(sizes.files - mixer.nbytes(chosen), beside + 1)
            if best is not None:
                break
    if best is None:
        raise _too_small(mixer, budget, size)
    return best


def _too_small(mixer: Mixer, budget: Budget, size: Callable[[Chosen], Sizes]) -> UsageError:
    """For a budget below the smallest mix: which that is, and what is in the way."""
    sizes = size(mixer.cheapest())
    least = f"{math.ceil(sizes.bits * 100) / 100:g}" if budget.kind == "bits" else str(sizes.files)
    option = f"--{budget.kind} {least}"
    asked = f"{budget.value:g} bits" if budget.kind == "bits" else f"{budget.value:,.0f} bytes"
    hint = f"{option} is the smallest that works"
    if mixer.fixed.largest is not None and budget.kind == "size":
        module, nbytes = mixer.fixed.largest
        hint += f"; {module} has {nbytes:,} of these bytes in float: --set '{module}=w8' makes it smaller"
    return UsageError(
        f"{asked} are below the smallest mix, {least} {'bits' if budget.kind == 'bits' else 'bytes'}", hint
    )
