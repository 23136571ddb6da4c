"""What one native call for an encoder gains: all-MiniLM-L6-v2 w8 as a whole, by its modules, and in torch's float32.

All in one process, taking turns: batches without padding, and `SentenceTransformer.encode` of 1,000 sentences of
unequal length, where that package is installed. Prints medians in milliseconds and times torch's float32, then what of
one sentence of 16 tokens is neither product nor attention, on one thread: the model's call less a plan of these alone.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import torch
from transformers import AutoModel

import spicerack
from spicerack.evaluation.sentences import SENTENCES
from spicerack.evaluation.turns import take_turns
from spicerack.kernels.plan import Inputs, Plan
from spicerack.models.bundled import encoder
from spicerack.nn.encoder import parts as encoder_parts
from spicerack.nn.encoder import plan as encoder_plan

BATCHES = ((1, 16), (1, 128), (32, 128))
FLOAT, MODULES, WHOLE = "torch float32", "modules", "one call"
ENOUGH = 0.05
"""Seconds that a turn takes at least: shorter calls are repeated within it."""


def models(folder: Path, scheme: str, engine: str | None) -> dict[str, Any]:
    """The three that are compared, by name."""
    spicerack.quantize(encoder(), scheme, output=folder)
    by_modules = spicerack.load(folder, engine=engine)
    del vars(by_modules)["forward"]
    whole = spicerack.load(folder, engine=engine)
    return {FLOAT: AutoModel.from_pretrained(encoder()).eval(), MODULES: by_modules, WHOLE: whole}


def batch(rows: int, columns: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (rows, columns), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def turn(work: Callable[[], Any]) -> Callable[[], float]:
    """Milliseconds of one call of `work`."""

    def timed() -> float:
        count, begin = 0, perf_counter()
        while count == 0 or perf_counter() - begin < ENOUGH:
            work()
            count += 1
        return (perf_counter() - begin) / count * 1e3

    return timed


def report(case: str, works: dict[str, Callable[[], Any]], rounds: int) -> None:
    samples = take_turns({name: turn(work) for name, work in works.items()}, rounds, lambda _: None)
    times = {name: median(taken) for name, taken in samples.items()}
    cells = [f"{times[name]:9.2f} ms {times[FLOAT] / times[name]:5.2f} x" for name in times]
    click.echo(f"{case:>16}  " + "  ".join(cells))


def texts(count: int) -> list[str]:
    """One to eight of the built-in sentences each."""
    chosen = random.Random(0)
    return [" ".join(chosen.choices(SENTENCES, k=chosen.randint(1, 8))) for _ in range(count)]


def sentence_encoders(made: dict[str, Any]) -> dict[str, Any]:
    try:
        library = importlib.import_module("sentence_transformers")
    except ModuleNotFoundError:
        return {}
    encoders = {name: library.SentenceTransformer(str(encoder()), device="cpu") for name in made}
    for name, model in made.items():
        encoders[name][0].model = model
    return encoders


@contextmanager
def without_norms() -> Iterator[None]:
    """Plans are made without their norms and the sums in them."""
    norm = Plan.norm
    Plan.norm = lambda *_: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Plan.norm = norm  # type: ignore[method-assign]


def outside(model: Any, rounds: int) -> None:
    family = encoder_parts.family_of(model)
    assert family is not None
    with without_norms():
        bare = encoder_plan.build(model, family, None)
    asked = batch(1, 16)
    given = Inputs(asked["input_ids"], asked["attention_mask"])
    samples = take_turns(
        {
            "whole": turn(lambda: model(**asked)),
            "products and attention": turn(lambda: bare.plan.run(given, bare.result)),
        },
        rounds,
        lambda _: None,
    )
    times = {name: median(taken) for name, taken in samples.items()}
    rest = times["whole"] - times["products and attention"]
    click.echo(f"1 x 16, one thread: {times['whole']:.2f} ms, of which outside of products and attention {rest:.2f}")


@click.command(help=__doc__)
@click.option("--scheme", default="w8", show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--engine", help="As in load; torch is held to an instruction set by variables of its own.")
@torch.no_grad()
def main(scheme: str, rounds: int, threads: int, engine: str | None) -> None:
    torch.set_num_threads(threads)
    with TemporaryDirectory() as folder:
        made = models(Path(folder) / "out", scheme, engine)
    click.echo(f"{'':>16}  " + "  ".join(f"{name:>20}" for name in made))
    for rows, columns in BATCHES:
        asked = batch(rows, columns)
        works = {name: partial(model, **asked) for name, model in made.items()}
        report(f"{rows} x {columns}", works, rounds)
    sentences = texts(1000)
    encoders = {
        name: partial(one.encode, sentences, show_progress_bar=False) for name, one in sentence_encoders(made).items()
    }
    if encoders:
        report("1000 sentences", encoders, max(rounds // 5, 3))
    torch.set_num_threads(1)
    outside(made[WHOLE], rounds)


if __name__ == "__main__":
    main()
