"""How fast whole models are: all-MiniLM-L6-v2, and a random 1.1 B Llama (TinyLlama's shape) against llama.cpp.

Each runtime works in a process of its own, and they take turns. The encoder is timed on batches without padding, and
its embeddings of the built-in sentences are compared with torch's float32. The decoder reads a prompt and then writes
tokens one by one behind it; for spicerack the linear layers are also timed alone, without the rest of the model.
Models are made in a temporary folder, or in --folder, where they are kept for the next time (7 GB).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import machine, report
from benchmarks.harness.peers.decoder import Decoder, make
from benchmarks.harness.peers.encoder import Encoder
from benchmarks.harness.rows import BASE, DECODERS, ENCODERS, LIMITS, Result, Row, chosen, compared, spreads, timed
from benchmarks.harness.turns import Sample, Workers
from spicerack.models.bundled import encoder as minilm


def measure(
    rows: Sequence[Row], what: Encoder | Decoder, rounds: int, notes: dict[str, str]
) -> tuple[list[Result], list[Sample]]:
    """All rows with one model: their figures in seconds, and what the limits were. Failures go to `notes`."""
    with Workers(what.threads) as workers:
        workers.prepare(dict.fromkeys(LIMITS, what.threads), notes)
        facts = with_cosines(workers.prepare(dict.fromkeys(rows, what), notes))
        samples = workers.take_turns([*LIMITS, *facts], rounds, notes)
    limits = [a | b for a, b in zip(*(samples.pop(limit) for limit in LIMITS), strict=True)]
    return compared([timed(row, facts[row], taken) for row, taken in samples.items()], what.figures), limits


def with_cosines(facts: dict[Row, dict[str, Any]]) -> dict[Row, dict[str, Any]]:
    """Embeddings [sentences, H] replaced by their mean and least cosine to torch's float32, where there are any."""
    vectors = {row: known.pop("embeddings") for row, known in facts.items() if "embeddings" in known}
    base = [v for row, v in vectors.items() if row.name == BASE]
    for row, v in vectors.items() if base else ():
        cosine = (base[0] * v).sum(1) / np.linalg.norm(base[0], axis=1) / np.linalg.norm(v, axis=1)
        facts[row] |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
    return facts


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="Rows whose name matches, such as 'llama.cpp*'; repeatable.")
@click.option("--part", type=click.Choice(["encoder", "decoder"]), help="One of the two models only.")
@click.option("--rounds", default=5, show_default=True, help="Turns of each row; medians are reported.")
@click.option("--threads", default=2, show_default=True)
@click.option("--engine", help="Of spicerack's encoder, as in load; others are held by variables (docs/kernels.md).")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the models here; default: a temporary folder.")
@click.option("--output", default=report.RESULTS, show_default="results", type=click.Path(path_type=Path))
def main(
    only: tuple[str, ...], part: str | None, rounds: int, threads: int, engine: str | None, folder: Path | None,
    output: Path,
) -> None:  # fmt: skip
    notes: dict[str, str] = {}
    result: Result = {"machine": machine.describe(threads), "rounds": rounds, "notes": notes}
    seen: list[Sample] = []
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        scratch = {name: Path(place) / name for name in ("encoder", "decoder") if part in (None, name)}
        for name, work in scratch.items():
            work.mkdir(parents=True, exist_ok=True)
            what = Encoder(minilm(), work, threads, engine) if name == "encoder" else Decoder(make(work), work, threads)
            rows = chosen(ENCODERS if name == "encoder" else DECODERS, only)
            result[name], samples = measure(rows, what, rounds, notes)
            seen += samples
    result["limits"] = spreads(seen)
    report.write(output, "models", result, report.models(result), report.model_plot)


if __name__ == "__main__":
    main()
