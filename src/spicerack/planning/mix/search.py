"""Rounds: solve for the budget, write the mix, measure what it loses, correct what was expected, and solve again.

A budget of bytes or bits buys the mix of the least expected loss. Where what the written folder loses is more than
1.3 times off, each unit is measured around the mix (`judge.swaps`), and it is solved again; after three rounds the best
that was written is taken. A bound on loss buys the fewest bytes that are expected to keep it: what is bounded is the
upper end of the interval, and what is expected is scaled by how the last round came out, until the bound holds with
little to spare.

Nothing here touches a model: what is written and measured is others' (`Hands`), so that the search is tried on made-up
models whose truth is known.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spicerack.errors import UsageError
from spicerack.planning.mix.judge import Measured
from spicerack.planning.mix.mixer import Chosen, Fixed, Mixer, Sizes, solved
from spicerack.planning.sensitivity import Budget, Point, Round, Sensitivity

OFF = 1.3
"""Times that a loss may be off what was expected before it is solved again: planning.md, Budgets."""
ROUNDS, BOUND_ROUNDS = 3, 6
"""At most, for a budget of bytes or bits, and for a bound on loss, which has to be met from the right side."""
_CLOSE = 0.95
"""Share of a bound that is near enough: at 3 to 4 bits the rest is worth a hundredth of the bytes."""
_SAFE = 0.98
"""Share of the bound that rounds aim at, so that the next one is likely to keep it."""
_MOST = 4.0
"""Times that a unit's own correction may be: beyond it is noise of what is measured."""
_LEAST_SHARE = 0.005
"""Of all that is expected to be lost, below which a unit is not measured for itself: its effect is within noise."""


@dataclass(frozen=True, slots=True)
class Hands:
    """Whoever writes and measures.

    size     mix -> what its folder would weigh
    write    mix -> its folder
    measure  folder -> what it loses
    drop     folder -> gone: a better one is there
    swaps    folder -> how much less it loses with each unit in float, and under "" what it loses on that text; None
             where that cannot be measured
    tell     sentences on how it goes
    """

    size: Callable[[Chosen], Sizes]
    write: Callable[[Chosen], Path]
    measure: Callable[[Path], Measured]
    drop: Callable[[Path], None]
    swaps: Callable[[Path], Mapping[str, float] | None]
    tell: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Written:
    """A mix that was written and measured."""

    chosen: Chosen
    folder: Path
    sizes: Sizes
    predicted: float
    measured: Measured


def search(known: Sensitivity, fixed: Fixed, budget: Budget, hands: Hands) -> tuple[Sensitivity, Written]:
    """The mix that a budget buys, written: all that is known then, and the folder.

    known: estimates. Raises UsageError for a budget that no mix keeps, naming the smallest that one does, and what the
    hands raise.
    """
    bound = budget.kind in ("max_kl", "max_loss")
    known, rounds, best = (_bounded if bound else _bought)(known, fixed, budget, hands)
    factor = best.measured.loss.mean / max(Mixer(known, fixed).loss(best.chosen), 1e-30)
    known = _scaled(known, factor if factor > 0 else 1.0)
    mixer = Mixer(known, fixed)
    curve = [p for p in mixer.curve() if p.nbytes != best.sizes.tensors]
    own = dataclasses.replace(_point(best), predicted=mixer.loss(best.chosen))  # corrected like all the others
    return dataclasses.replace(
        known,
        units=tuple(dataclasses.replace(unit, chosen=best.chosen[unit.name]) for unit in known.units),
        budget=budget,
        curve=tuple(sorted([*curve, own], key=lambda point: point.nbytes)),
        rounds=tuple(rounds),
    ), best


def _bought(known: Sensitivity, fixed: Fixed, budget: Budget, hands: Hands) -> tuple[Sensitivity, list[Round], Written]:
    """Rounds for a budget of bytes or bits: what is known then, the rounds, and the best that was written."""
    written: list[Written] = []
    for number in range(ROUNDS):
        mixer = Mixer(known, fixed)
        chosen = solved(mixer, budget, hands.size)
        if any(one.chosen == chosen for one in written):
            break
        last = _round(mixer, chosen, number, hands)
        written.append(last)
        if not _is_close(last) and number < ROUNDS - 1:
            known = corrected(known, last, hands.swaps(last.folder))
        _drop(written, min(written, key=_mean), hands)
        if _is_close(last):
            break
    best = min(written, key=_mean)
    return known, _rounds(written, best), best


def _bounded(
    known: Sensitivity, fixed: Fixed, budget: Budget, hands: Hands
) -> tuple[Sensitivity, list[Round], Written]:
    """The same for a bound on loss. Raises UsageError where none that was written keeps it."""
    rise = budget.kind == "max_loss" and known.metric == "kl"
    most = math.log1p(budget.value) if rise else budget.value
    ratio, written, best = 1.0, list[Written](), None
    for number in range(BOUND_ROUNDS):
        mixer = Mixer(known, fixed)
        chosen = mixer.losing(_SAFE * most / ratio) or mixer.dearest()
        if any(one.chosen == chosen for one in written):
            break
        last = _round(mixer, chosen, number, hands)
        written.append(last)
        upper = last.measured.bounded(rise)
        if upper <= most and (best is None or last.sizes.files < best.sizes.files):
            best = last
        if _CLOSE * most <= upper <= most or (upper > most and chosen == mixer.dearest()):
            break
        if not number and not _is_close(last):
            known = corrected(known, last, hands.swaps(last.folder))
        _drop(written, best, hands)
        ratio = max(upper / max(Mixer(known, fixed).loss(chosen), 1e-30), 1e-3)
    if best is None:
        nearest = min(written, key=lambda one: one.measured.bounded(rise))
        reached = nearest.measured.bounded(rise)
        reached = math.expm1(reached) if rise else reached
        raise UsageError(
            f"no mix keeps the bound {budget.value:.3g}: the nearest, {nearest.sizes.bits:.2f} bits a weight, has "
            f"{reached:.3g} at the upper end of its interval",
            f"use {_up(reached)} or more, or a longer text",
        )
    return known, _rounds(written, best), best


def _mean(written: Written) -> float:
    return written.measured.loss.mean


def _drop(written: Sequence[Written], best: Written | None, hands: Hands) -> None:
    """Let go of all folders but the best: there is one mix on the disk between rounds."""
    for one in written:
        if one is not best:
            hands.drop(one.folder)


def _round(mixer: Mixer, chosen: Chosen, number: int, hands: Hands) -> Written:
    """Write a mix and measure it."""
    sizes, predicted = hands.size(chosen), mixer.loss(chosen)
    hands.tell(f"round {number + 1}: {sizes.bits:.2f} bits a weight, expected loss {predicted:.4g}")
    folder = hands.write(chosen)
    measured = hands.measure(folder)
    lo, hi = measured.loss.lo, measured.loss.hi
    interval = "" if lo is None or hi is None else f" ({lo:.4g} to {hi:.4g})"
    hands.tell(f"round {number + 1}: measured loss {measured.loss.mean:.4g}{interval}, {measured.tokens:,} tokens")
    return Written(chosen, folder, sizes, predicted, measured)


def corrected(known: Sensitivity, last: Written, swaps: Mapping[str, float] | None) -> Sensitivity:
    """What is expected, put right by a mix that was measured.

    swaps: of its units, see `Hands`; None where there are none, and all losses get one factor. Units that were not
    measured, or lose hardly anything, get the mean factor of their kind. In the end the mix is expected to lose what
    it was measured to.
    """
    expected = {unit.name: unit.schemes[last.chosen[unit.name]].loss for unit in known.units}
    total = max(math.fsum(expected.values()), 1e-30)
    own: dict[str, float] = {}
    if swaps is not None:
        common = max(math.fsum(max(v, 0.0) for n, v in swaps.items() if n) / total, 1e-30)
        own = {
            name: min(max(swaps[name] / loss / common, 1 / _MOST), _MOST)
            for name, loss in expected.items()
            if name in swaps and loss > _LEAST_SHARE * total
        }
    factors = {name: own[name] if name in own else _of_kind(name, own) for name in expected}
    weighed = max(math.fsum(factors[name] * loss for name, loss in expected.items()), 1e-30)
    whole = max(last.measured.loss.mean, 1e-30) / weighed
    return _by_unit(known, {name: whole * factor for name, factor in factors.items()})


def kind(name: str) -> str:
    """A unit's name without the numbers of blocks: the same for all that do the same in theirs."""
    return re.sub(r"[0-9]+", "*", name)


def _of_kind(name: str, own: Mapping[str, float]) -> float:
    """The factor of a unit that has none of its own: the mean of those of its kind, 1 without any."""
    logs = [math.log(factor) for other, factor in own.items() if kind(other) == kind(name)]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0


def _up(value: float) -> str:
    """A number above 0 in two digits, rounded up: a bound that is named is kept by what it was named for."""
    digit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / digit) * digit:.2g}"


def _scaled(known: Sensitivity, factor: float) -> Sensitivity:
    """All losses times a factor."""
    return _by_unit(known, {unit.name: factor for unit in known.units})


def _by_unit(known: Sensitivity, factors: Mapping[str, float]) -> Sensitivity:
    """Losses times a factor for each unit."""
    return dataclasses.replace(known, units=tuple(
        dataclasses.replace(unit, schemes={
            name: dataclasses.replace(option, loss=option.loss * factors[unit.name])
            for name, option in unit.schemes.items()
        })
        for unit in known.units
    ))  # fmt: skip


def _is_close(written: Written) -> bool:
    """Whether a loss is what was expected, or so small that this does not matter."""
    ratio = written.measured.loss.mean / max(written.predicted, 1e-30)
    return 1 / OFF <= ratio <= OFF


def _rounds(written: Sequence[Written], best: Written) -> list[Round]:
    """In their order, but the best last."""
    return [_as_round(one) for one in (*(one for one in written if one is not best), best)]


def _as_round(written: Written) -> Round:
    rise = written.measured.rise
    shares = None if rise is None else tuple(math.expm1(rise.mean if end is None else end) for end in rise)
    loss = written.measured.loss
    interval = (loss.mean if loss.lo is None else loss.lo, loss.mean if loss.hi is None else loss.hi)
    return Round(
        written.sizes.tensors, written.sizes.bits, written.predicted, loss.mean, interval, written.measured.tokens,
        None if shares is None else (shares[0], shares[1], shares[2]),
    )  # fmt: skip


def _point(written: Written) -> Point:
    one = _as_round(written)
    return Point(one.nbytes, one.bits, one.predicted, one.measured, one.interval)
