"""How fast one quantized linear layer is: spicerack, torch, onnxruntime, OpenVINO and torchao, taking turns.

Each runtime works in a process of its own. The machine's limits, read bandwidth and int8 dot products, are measured in
the same rounds, since memory's speed changes with time; the best of a case's rounds counts. Ours are also put beside
the best peer of their width. With few tokens (M up to 8), large layers cycle through several weights that together
exceed the last-level cache four times, as the layers of a model do; other cases use one weight. Inputs and outputs are
float32 (bfloat16 for torch bfloat16 and int4); quantizing the input is part of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.harness import machine, report
from benchmarks.harness.peers.layer import Layer
from benchmarks.harness.rows import LAYERS, LIMITS, Result, Row, chosen, compared, spreads, timed
from benchmarks.harness.turns import Sample, Workers

LARGE, SMALL = ((4096, 4096), (11008, 4096)), ((384, 384), (1536, 384), (384, 1536))
"""[N, K]: a language model's layers and a small encoder's."""
TOKENS = (1, 8, 32, 128, 512)
_FEW = 8
"""Largest M at which large weights come from memory."""
_BEYOND = 4
"""Their bytes over the last-level cache."""


def copies(row: Row, shape: tuple[int, int], m: int) -> int:
    """Weights to cycle through."""
    if m > _FEW or shape in SMALL:
        return 1
    bits = 2 if row.width == "ternary" else int(row.width)
    return -(-_BEYOND * machine.last_level_cache() * 8 // (shape[0] * shape[1] * bits))


def measure(
    rows: Sequence[Row], shape: tuple[int, int], ms: Sequence[int], rounds: int, threads: int, notes: dict[str, str]
) -> tuple[list[Result], list[Sample]]:
    """All rows at one shape [N, K] -> a case for each M, and all turns of the limits. Failures go to `notes`."""
    cases: list[Result] = []
    seen: list[Sample] = []
    with Workers(threads) as workers:
        workers.prepare(dict.fromkeys(LIMITS, threads), notes)
        for m in ms:
            click.echo(f"{shape[0]} x {shape[1]}, M = {m}", err=True)
            work = {row: Layer(*shape, m, copies(row, shape, m), threads) for row in rows}
            facts = workers.prepare(work, notes)
            samples = workers.take_turns([*LIMITS, *facts], rounds, notes)
            limits = [a | b for a, b in zip(*(samples.pop(limit) for limit in LIMITS), strict=True)]
            found = compared([timed(row, facts[row], taken) for row, taken in samples.items()], ("seconds",))
            cases.append(with_limits({"n": shape[0], "k": shape[1], "m": m, "rows": found}, spreads(limits)))
            seen += limits
            workers.drop(facts)
    return cases, seen


def with_limits(case: Result, limits: Result) -> Result:
    """The case with each row's of_limit: the least time that the limits allow, over its median time.

    Weights from memory take bytes / bandwidth, multiplying takes 2 N K M / peak; the longer of the two counts. Weights
    in the cache with few tokens have no limit here, nor have floats.
    """
    rows = []
    for row in case["rows"]:
        if row["width"] not in ("32", "16") and (row["copies"] > 1 or case["m"] > _FEW):
            least = 2 * case["n"] * case["k"] * case["m"] / limits["dot_peak"]["max"]
            if row["copies"] > 1:
                least = max(least, row["bytes"] / limits["read_bandwidth"]["max"])
            row = row | {"of_limit": least / row["seconds"]["median"]}
        rows.append(row)
    return case | {"limits": limits, "rows": rows}


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="Rows whose name matches, such as 'spicerack*' or '*int4*'; repeatable.")
@click.option("--layer", "layers", multiple=True, type=(int, int), default=LARGE + SMALL, help="N K; repeatable.")
@click.option("-m", "ms", multiple=True, type=int, default=TOKENS, show_default=True, help="Tokens; repeatable.")
@click.option("--rounds", default=5, show_default=True, help="Turns of each row; medians are reported.")
@click.option("--threads", default=2, show_default=True)
@click.option("--output", default=report.RESULTS, show_default="results", type=click.Path(path_type=Path))
def main(
    only: tuple[str, ...], layers: tuple[tuple[int, int], ...], ms: tuple[int, ...], rounds: int, threads: int,
    output: Path,
) -> None:  # fmt: skip
    notes: dict[str, str] = {}
    cases: list[Result] = []
    seen: list[Sample] = []
    for shape in layers:
        more, samples = measure(chosen(LAYERS, only), shape, ms, rounds, threads, notes)
        cases, seen = cases + more, seen + samples
    result = {
        "machine": machine.describe(threads), "rounds": rounds, "notes": notes, "limits": spreads(seen), "cases": cases,
    }  # fmt: skip
    report.write(output, "kernels", result, report.kernels(result), report.kernel_plot)


if __name__ == "__main__":
    main()
