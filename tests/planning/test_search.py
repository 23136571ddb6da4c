"""Rounds on made-up models whose truth is known: what is bought, what keeps a bound, and what is corrected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from spicerack.errors import UsageError
from spicerack.evaluation.intervals import Interval
from spicerack.planning.mix.judge import Measured
from spicerack.planning.mix.mixer import Chosen, Fixed, Mixer, Sizes, solved
from spicerack.planning.mix.search import Hands, corrected, kind, search
from spicerack.planning.sensitivity import Budget, Option, Sensitivity, Unit

BITS = (2, 3, 4, 5, 6, 8)
FIXED, HEADER = 5000, 777


def model(units: int = 12) -> Sensitivity:
    """Units of several sizes that mind errors to several degrees."""
    found = []
    for number in range(units):
        weights = 1024 * (1 + number % 3)
        minds = 0.3 * 1.7 ** ((7 * number) % 12 - 6)
        options = {
            f"w{bits}": Option(weights * bits // 8, weights * bits, minds * 4.0**-bits, minds * 4.0**-bits)
            for bits in BITS
        }
        found.append(Unit(f"layers.{number}.x", (f"layers.{number}.x.weight",), weights, options))
    return Sensitivity("kl", {}, FIXED, tuple(found))


class Truth:
    """A model that loses `factor` times what is expected, each unit its own times that."""

    def __init__(self, known: Sensitivity, factor: float, own: Mapping[str, float] = {}, wide: float = 0.05) -> None:
        self.written: list[Chosen] = []
        self.dropped: list[Path] = []

        def parts(chosen: Chosen) -> dict[str, float]:
            return {u.name: factor * own.get(u.name, 1) * u.schemes[chosen[u.name]].estimate for u in known.units}

        def size(chosen: Chosen) -> Sizes:
            units = sum(u.schemes[chosen[u.name]].nbytes for u in known.units)
            header = HEADER + 8 * sum(name == "w2" for name in chosen.values())  # depends on the mix, as headers do
            bits = sum(u.schemes[chosen[u.name]].bits for u in known.units) / known.weights
            return Sizes(FIXED + units + header, FIXED + units, bits)

        def write(chosen: Chosen) -> Path:
            self.written.append(chosen)
            return Path(str(len(self.written) - 1))

        def measure(folder: Path) -> Measured:
            loss = sum(parts(self.written[int(str(folder))]).values())
            interval = Interval(loss, loss * (1 - wide), loss * (1 + wide))
            return Measured(interval, 1000, Interval(*(0.9 * end for end in interval)))

        def swaps(folder: Path) -> Mapping[str, float]:
            losses = parts(self.written[int(str(folder))])
            return {**losses, "": sum(losses.values())}

        self.size, self.hands = size, Hands(size, write, measure, self.dropped.append, swaps, lambda _: None)


@pytest.mark.parametrize("size", [12_200, 13_333, 16_000, 25_000])
def test_a_size_is_never_exceeded_and_hardly_wasted(size: int) -> None:
    known = model()
    hands = Truth(known, 1.1)
    found, best = search(known, Fixed(), Budget("size", size), hands.hands)
    assert size - 130 < best.sizes.files <= size
    assert len(found.rounds) == 1 and {u.name: u.chosen for u in found.units} == best.chosen
    assert found.rounds[-1].measured == pytest.approx(1.1 * found.rounds[-1].predicted)
    here = next(point for point in found.curve if point.measured is not None)
    assert here.nbytes == best.sizes.tensors
    assert [p.nbytes for p in found.curve] == sorted(p.nbytes for p in found.curve)
    # of one curve, corrected all over, on which more bytes never lose more: a page draws it
    assert here.predicted == pytest.approx(here.measured) and here.measured == found.rounds[-1].measured
    losses = [p.predicted for p in found.curve]
    assert losses == sorted(losses, reverse=True)


def test_bits_count_what_rules_quantize() -> None:
    known, fixed = model(), Fixed(bits=8 * 6000, weights=6000)
    chosen = solved(Mixer(known, fixed), Budget("bits", 5), Truth(known, 1).size)
    assert 4.9 < Mixer(known, fixed).bits(chosen) <= 5


@pytest.mark.parametrize("budget", [Budget("size", 8000), Budget("bits", 1.99)])
def test_below_the_smallest_that_is_named(budget: Budget) -> None:
    known = model()
    with pytest.raises(UsageError) as error:
        search(known, Fixed(largest=("embed", 4000)), budget, Truth(known, 1).hands)
    least = {"size": 5000 + 24 * 1024 // 4 + 777 + 12 * 8, "bits": 2}[budget.kind]
    assert f"{least} is the smallest" in error.value.hint
    assert ("--set 'embed=w8'" in error.value.hint) == (budget.kind == "size")
    search(known, Fixed(), dataclasses.replace(budget, value=least), Truth(known, 1).hands)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.2, 5.0])
@pytest.mark.parametrize("kind_", ["max_kl", "max_loss"])
def test_a_bound_holds_at_the_upper_end_and_with_hardly_a_byte_too_many(factor: float, kind_: str) -> None:
    known = model()
    bound = Budget(kind_, 0.01)  # type: ignore[arg-type]
    found, best = search(known, Fixed(), bound, Truth(known, factor).hands)
    upper = best.measured.bounded(kind_ == "max_loss")
    most = 0.01 if kind_ == "max_kl" else math.log(1.01)
    assert 0.85 * most < upper <= most
    # by a sweep over all sizes: the smallest whose truth keeps the bound
    truth, mixer, share = Truth(known, factor), Mixer(known, Fixed()), 0.9 if kind_ == "max_loss" else 1
    smallest = min(
        truth.size(chosen).files
        for step in range(120)
        if (chosen := mixer.within("nbytes", 6200 + 100 * step)) and 1.05 * share * factor * mixer.loss(chosen) <= most
    )
    assert best.sizes.files <= 1.03 * smallest
    assert found.rounds[-1].measured == best.measured.loss.mean and len(found.rounds) <= 6


@pytest.mark.parametrize("kind_", ["max_kl", "max_loss"])
@pytest.mark.parametrize("factor", [1.0, 1.37, 2.22])
def test_a_bound_that_nothing_keeps_is_refused_with_one_that_is_kept(kind_: str, factor: float) -> None:
    known = model()
    bound = Budget(kind_, 1e-7)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no mix keeps the bound 1e-07") as error:
        search(known, Fixed(), bound, Truth(known, factor).hands)
    named = float(error.value.hint.split()[1])
    least = 1.05 * factor * sum(u.schemes["w8"].estimate for u in known.units)  # the upper end of the finest mix
    least = least if kind_ == "max_kl" else math.expm1(0.9 * least)
    assert least <= named <= 1.1 * least
    search(known, Fixed(), dataclasses.replace(bound, value=named), Truth(known, factor).hands)


def test_what_was_expected_wrongly_is_measured_around_the_mix() -> None:
    known = model()
    own = {"layers.3.x": 6.0, "layers.5.x": 0.2}
    hands = Truth(known, 1.5, own)
    found, best = search(known, Fixed(), Budget("bits", 3.5), hands.hands)
    assert 2 <= len(found.rounds) <= 3 and best.folder not in hands.dropped
    assert {str(path) for path in hands.dropped} == {str(i) for i in range(len(hands.written))} - {str(best.folder)}
    last = found.rounds[-1]
    assert 1 / 1.3 <= last.measured / last.predicted <= 1.3
    # as good as when the truth had been known from the beginning
    truth = dataclasses.replace(known, units=tuple(
        dataclasses.replace(u, schemes={
            n: dataclasses.replace(o, loss=1.5 * own.get(u.name, 1) * o.loss) for n, o in u.schemes.items()
        }) for u in known.units
    ))  # fmt: skip
    ideal = solved(Mixer(truth, Fixed()), Budget("bits", 3.5), hands.size)
    assert best.measured.loss.mean == pytest.approx(Mixer(truth, Fixed()).loss(ideal), rel=0.02)


def test_units_that_were_not_measured_follow_their_kind() -> None:
    known = model(6)
    hands = Truth(known, 2.0)
    chosen = solved(Mixer(known, Fixed()), Budget("bits", 4), hands.size)
    _, written = search(known, Fixed(), Budget("bits", 4), hands.hands)
    assert chosen == written.chosen or len(hands.written) > 1
    some = {"": 1.0, "layers.0.x": 1.0, "layers.1.x": 1.0}
    after = corrected(known, written, some)
    assert Mixer(after, Fixed()).loss(written.chosen) == pytest.approx(written.measured.loss.mean)
    assert kind("layers.12.x") == kind("layers.3.x") != kind("layers.3.y")
