"""The constants of `spicerack.planning.speed`, fitted on one half of published measurements and judged on the other.

    python -m benchmarks.planning.speed

`benchmarks/results/speed_points.json` holds the measurements with their sources. Of each engine and kind of device
every other row is fitted to, from the first on, in the file's order: the sum of |log(predicted / measured)| is least
over all eta in hundredths and tau in microseconds. The rows between are judged. Prompts are fitted the same way, with
one share of a peak.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spicerack.planning.speed import MIXTURE, PROMPT, Constants, seconds

POINTS = Path(__file__).parents[1] / "results" / "speed_points.json"
NEAR = 0.2
"""The error within which an estimate is called right."""


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement of decoding.

    key        engine and kind of device
    name       device and model, for people
    nbytes     read for one token
    bandwidth  bytes a second
    layers     of the model, those with experts counted as so many more
    rate       tokens a second
    """

    key: tuple[str, str]
    name: str
    nbytes: float
    bandwidth: float
    layers: float
    rate: float

    def error(self, known: Constants) -> float:
        """Of the model, relative: .1 is a tenth too fast."""
        return 1 / seconds(self.nbytes, self.bandwidth, self.layers, known) / self.rate - 1


def points() -> list[Point]:
    """Those of decoding, in the file's order."""
    rows = json.loads(POINTS.read_text())["decode"]
    return [
        Point(
            _key(row), f"{row['device']} {row['model']}", row["gb_read_per_token"] * 1e9, row["bandwidth"] * 1e9,
            row["layers"] * (MIXTURE if row["moe"] else 1), row["tg"],
        )
        for row in rows
    ]  # fmt: skip


def halves(rows: Iterable[Point]) -> dict[tuple[str, str], tuple[list[Point], list[Point]]]:
    """Engine and kind of device -> rows that are fitted to, and rows that are judged."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return {key: (members[::2], members[1::2]) for key, members in groups.items()}


def fit(rows: Sequence[Point]) -> tuple[float, float]:
    """The eta and tau that fit best."""
    grid = ((eta / 100, tau * 1e-6) for eta in range(40, 100) for tau in range(300))
    return min(grid, key=lambda pair: sum(abs(math.log1p(row.error(Constants(*pair, 0, 0, 0.0)))) for row in rows))


def judge(eta: float, tau: float, rows: Sequence[Point]) -> Constants:
    """The constants with what they are worth."""
    errors = [abs(row.error(Constants(eta, tau, 0, 0, 0.0))) for row in rows]
    return Constants(eta, tau, len(rows), sum(error <= NEAR for error in errors), statistics.median(errors))


def _key(row: dict[str, Any]) -> tuple[str, str]:
    """Engine and kind, as planning calls them."""
    if "MLX" in row["model"]:
        return "mlx", "metal"
    kind = {"metal23": "metal-2023", "rocm": "rocm-rdna"}.get(row["backend"], row["backend"])
    return "llama.cpp", kind


def _prompts() -> None:
    """The same of prompts: the median share of the peak that half of the rows reach, and the error of the others."""
    peaks = {"int8_tops": "int8_dense", "fp32_tflops": "fp32", "fp16_tflops": "fp16_dense"}
    groups: dict[str, list[float]] = {}
    for row in json.loads(POINTS.read_text())["prefill"]:
        kind = "rocm-rdna" if row["backend"] == "rocm" else row["backend"]
        if kind not in PROMPT:  # two old cards, one with tensor cores and one without
            continue
        reached = row["pp512"] * 2 * 6.607e9  # numbers that Llama-2-7B reads for a token
        groups.setdefault(kind, []).append(reached / (row[peaks[PROMPT[kind][0]]] * 1e12))
    print("| prompt | peak | phi | judged | median error | worst |\n|---|---|---|---|---|---|")
    for kind, shares in groups.items():
        phi = statistics.median(shares[::2])
        errors = [abs(phi / share - 1) for share in shares[1::2]]
        print(
            f"| {kind} | {PROMPT[kind][0]} | {phi:.3f} | {len(errors)} | {statistics.median(errors):.1%} "
            f"| {max(errors):.0%} |"
        )


def main() -> None:
    """Print both tables, and all errors above 20 %."""
    every: list[float] = []
    print(
        "| engine, kind | fitted | eta | tau, us | judged | within 20 % | median error |\n|---|---|---|---|---|---|---|"
    )
    far = []
    for key, (fitted, judged) in halves(points()).items():
        known = judge(*fit(fitted), judged)
        every += [abs(row.error(known)) for row in judged]
        far += [
            f"{', '.join(key)}: {row.name} {row.error(known):+.0%}" for row in judged if abs(row.error(known)) > NEAR
        ]
        print(
            f"| {', '.join(key)} | {len(fitted)} | {known.eta:.2f} | {known.tau * 1e6:.0f} | {known.judged} "
            f"| {known.within} | {known.median:.1%} |"
        )
    right = sum(error <= NEAR for error in every)
    print(f"\nall judged: median {statistics.median(every):.1%}, {right} of {len(every)} within 20 %")
    print("\n".join(["", *far, ""]))
    _prompts()


if __name__ == "__main__":
    main()
