"""How fast each engine multiplies, in multiples of what float32 can reach on the same vectors.

One process, ours alone: for each engine (an instruction set; of those that this processor runs) layers take turns with
two peaks that touch registers only, float32 multiply-adds and integer dot products, and the best turn of each counts,
because others can only make it slower. A row of the table says how many times as fast as float32's peak a layer was,
and what share of the dot products' peak that is. Prints Markdown. A minute for each engine and two schemes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import click
import torch

from benchmarks.harness import machine
from spicerack.kernels import limits, panels
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import rounding
from spicerack.numerics.scheme import parse

SHAPES = ((384, 384), (1536, 384), (384, 1536), (1536, 4096))
"""[N, K]: a small encoder's, and one that leaves the second-level cache."""
ROWS = (1, 4, 16, 128, 512)
SCHEMES = ("w8", "w8a8", "w4g32", "w4g128", "w2g128")
_SECONDS = 0.02
"""Of a turn: long beside a clock's step, short beside what a neighbour does."""


def layer(scheme: str, n: int, k: int, engine: str, compute: str | None) -> QLinear:
    """A layer of Gaussian weights [n, k] on one engine."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * k**-0.5
    q = rounding.to_nearest(weight, parse(scheme), range_="absmax", threads=torch.get_num_threads())
    return QLinear(PackedWeight(q, torch.float32, "cpu", compute, engine))  # type: ignore[arg-type]  # click checked it


def speed(work: QLinear, x: torch.Tensor) -> float:
    """Operations per second of one turn."""
    calls, begin = 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < _SECONDS:
        work(x)
        calls += 1
    return 2 * work.in_features * work.out_features * x.shape[0] * calls / took


def measure(engine: str, scheme: str, rows: Sequence[int], turns: int, threads: int, compute: str | None) -> list[str]:
    """Cells of one line: for each shape and number of rows, times float32's peak and the share of dot products'."""
    index, cells = panels.engine_index(engine), []
    for n, k in SHAPES:
        work = layer(scheme, n, k, engine, compute)
        for m in rows:
            x = torch.randn(m, k)
            best = floats = dots = 0.0
            for _ in range(turns):
                best = max(best, speed(work, x))
                floats = max(floats, limits.float_peak(threads, engine=index, seconds=0))
                dots = max(dots, limits.dot_peak(threads, engine=index, seconds=0))
            cells.append(f"{best / floats:.2f} ({best / dots:.0%})")
    return cells


@click.command(help=__doc__)
@click.option("--engine", "engines", multiple=True, type=click.Choice(panels.NAMES), help="All without; repeatable.")
@click.option("--scheme", "schemes", multiple=True, default=SCHEMES, show_default=True, help="Repeatable.")
@click.option("-m", "rows", multiple=True, type=int, default=ROWS, show_default=True, help="Rows of x; repeatable.")
@click.option("--compute", type=click.Choice(["int8", "float"]), help="As in load.")
@click.option("--turns", default=15, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    engines: tuple[str, ...], schemes: tuple[str, ...], rows: tuple[int, ...], compute: str | None, turns: int,
    threads: int,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    click.echo(
        f"{machine.describe(threads)['cpu']}, {threads} thread(s), times float32's peak (of the dot products')\n"
    )
    heads = [f"{n} x {k}, M = {m}" for n, k in SHAPES for m in rows]
    for engine in engines or panels.NAMES:
        click.echo(f"### {engine}\n\n| | {' | '.join(schemes)} |\n{'|---' * (len(schemes) + 1)}|")
        columns = [measure(engine, scheme, rows, turns, threads, compute) for scheme in schemes]
        for head, *cells in zip(heads, *columns, strict=True):
            click.echo(f"| {head} | {' | '.join(cells)} |")
        click.echo()


if __name__ == "__main__":
    main()
