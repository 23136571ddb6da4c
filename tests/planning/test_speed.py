"""The constants are those that the benchmark fits, and as good as is said on what they were not fitted to."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.planning import speed as fitting
from spicerack.planning.speed import CONSTANTS

HALVES = fitting.halves(fitting.points())


@pytest.mark.parametrize("key", HALVES, ids=" ".join)
def test_constants_are_what_the_points_say(key: tuple[str, str]) -> None:
    fitted, judged = HALVES[key]
    known = CONSTANTS[key]
    told = fitting.judge(known.eta, known.tau, judged)
    assert (told.judged, told.within) == (known.judged, known.within)
    assert told.median == pytest.approx(known.median, abs=0.001)
    if len(fitted) <= 6:  # the others take a second each
        assert fitting.fit(fitted) == pytest.approx((known.eta, known.tau))


def test_half_of_the_points_judge_the_other() -> None:
    """The median error is at most 7 %, nine of ten are within 20 %, with two constants for each engine and kind."""
    errors = [
        abs(row.error(CONSTANTS[key])) for key, (_, judged) in HALVES.items() for row in judged
    ]  # fmt: skip
    assert len(errors) == 49
    assert statistics.median(errors) <= 0.07
    assert sum(error <= 0.2 for error in errors) >= 0.9 * len(errors)


def test_bytes_alone_are_worse() -> None:
    """What the time for each layer is good for: without it the same fit misses by more than twice as much."""
    errors = []
    for fitted, judged in HALVES.values():
        etas = [eta / 100 for eta in range(40, 100)]
        least = min(etas, key=lambda eta, rows=fitted: sum(abs(r.error(fitting.judge(eta, 0.0, rows))) for r in rows))
        errors += [abs(row.error(fitting.judge(least, 0.0, fitted))) for row in judged]
    with_layers = [abs(row.error(CONSTANTS[key])) for key, (_, judged) in HALVES.items() for row in judged]
    assert statistics.mean(errors) > 1.5 * statistics.mean(with_layers)
