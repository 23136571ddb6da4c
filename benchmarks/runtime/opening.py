"""How long a model takes to open: from `load` to its first result of 16 tokens, beside transformers and the original.

Each opening is a process of its own, and they take turns; printed are medians, and the least to most of the last.
`import` is what comes before the call: spicerack and torch, or transformers and torch. `load` is the call, `first` the
call and one result behind it, `all` everything, `MB` the peak of memory, mapped files included. Warm: the files are in
the page cache; cold: they were dropped from it. Models are made in a temporary folder, or in --folder, where they are
kept for the next time (1.3 GB, 4.3 GB with the model of 1.1 B).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

FIGURES = ("import", "load", "first", "all")
SMALL = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
"""A Llama of 336 M parameters; the one of 1.1 B is `benchmarks.harness.peers.decoder`'s."""
TOKENS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """A model, opened one way. name: of the model. scheme: "" for the original, which transformers opens."""

    name: str
    scheme: str
    folder: Path


def folders(place: Path, models: tuple[str, ...], schemes: tuple[str, ...]) -> Iterator[Row]:
    """The original of each model and its quantized folders, made where they are not there yet."""
    import spicerack
    from benchmarks.harness.peers.decoder import SHAPE, Shape, make
    from spicerack.models.bundled import encoder

    shapes = {"336M": Shape(**SMALL), "1.1B": SHAPE}
    for name in models:
        work = place / name
        work.mkdir(parents=True, exist_ok=True)
        original = make(work, shapes[name]) if name in shapes else encoder()
        yield Row(name, "", original)
        for scheme in schemes if name in shapes else ("w8",):
            folder = work / scheme
            if not (folder / "config.json").is_file():
                spicerack.quantize(original, scheme, output=folder, range_="absmax")
            yield Row(name, scheme, folder)


def open_once(folder: str, scheme: str) -> dict[str, float]:
    """Seconds of this very process: the import, the load, and the load with a first result; and its peak of memory."""
    begin = time.perf_counter()
    if scheme:
        import spicerack

        load: Callable[[str], Any] = spicerack.load
    else:
        import transformers
        import transformers.modeling_utils  # which the first model of a process would import

        config = json.loads((Path(folder) / "config.json").read_text())
        causal = "CausalLM" in config["architectures"][0]
        load = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_pretrained
    import torch

    ready = time.perf_counter()
    model = load(folder)
    loaded = time.perf_counter()
    ids = torch.arange(TOKENS)[None] + 1000
    with torch.no_grad():
        model(input_ids=ids)
    done = time.perf_counter()
    return {
        "import": ready - begin,
        "load": loaded - ready,
        "first": done - ready,
        "all": done - begin,
        "peak": _peak(),
    }


def _peak() -> float:
    """Megabytes that were resident at most, mapped files included, since this program began (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def timed(row: Row, cold: bool, threads: int) -> dict[str, float]:
    """One opening in a process of its own. cold: the folder's files are dropped from the page cache before."""
    if cold:
        drop(row.folder)
    command = [sys.executable, "-m", "benchmarks.runtime.opening", "--open", str(row.folder), row.scheme]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, capture_output=True, env=environment, cwd=Path(__file__).parents[2])
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def drop(folder: Path) -> None:
    """Drop the files of a folder from the page cache, as far as nobody maps them."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(rows: list[Row], samples: dict[Row, list[dict[str, float]]]) -> None:
    """A line for each way: medians in seconds, least to most of the last, and the last beside the original's."""
    click.echo(
        f"{'model':7}{'as':9}{'import':>8}{'load':>8}{'first':>8}{'all':>8}   {'least to most':16}{'times':>6}{'MB':>7}"
    )
    base: dict[str, float] = {}
    for row in rows:
        figures = {name: [sample[name] for sample in samples[row]] for name in samples[row][0]}
        first = figures["first"]
        base.setdefault(row.name, median(first))
        times = "".join(f"{median(figures[name]):8.3f}" for name in FIGURES)
        spread = f"{min(first):.3f} to {max(first):.3f}"
        beside = median(first) / base[row.name]
        click.echo(
            f"{row.name:7}{row.scheme or 'original':9}{times}   {spread:16}{beside:6.2f}{median(figures['peak']):7.0f}"
        )


@click.command(help=__doc__)
@click.option("--open", "opened", nargs=2, hidden=True, help="Folder and scheme: open it here, print JSON.")
@click.option("--model", "models", multiple=True, default=("MiniLM", "336M"), show_default=True, help="Or 1.1B.")
@click.option("--scheme", "schemes", multiple=True, default=("w8", "w4g128"), show_default=True, help="Of the Llamas.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--cold", is_flag=True, help="Drop the files from the page cache before each opening.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the models here; default: a temporary folder.")
def main(
    opened: tuple[str, str] | None, models: tuple[str, ...], schemes: tuple[str, ...], rounds: int, threads: int,
    cold: bool, folder: Path | None,
) -> None:  # fmt: skip
    if opened:
        click.echo(json.dumps(open_once(*opened)))
        return
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        rows = list(folders(Path(place), models, schemes))
        samples: dict[Row, list[dict[str, float]]] = {row: [] for row in rows}
        for number in range(rounds + 1):  # the first fills the page cache
            for row in rows:
                figures = timed(row, cold, threads)
                if number:
                    samples[row].append(figures)
        show(rows, samples)


if __name__ == "__main__":
    main()
