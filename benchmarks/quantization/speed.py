"""How fast a model folder is quantized, beside a plain copy of the same folder in the same run.

Makes a sharded bfloat16 checkpoint of Llama-7B's layer shapes (random normal weights, 4 GB by default) and reports GB/s
of source bytes. Copy and quantization take turns; figures are medians. The source is read through the page cache by
both, and both end in fsync, so what is compared is the work in between. Aims: `absmax` at half the copy's speed or
better, `opt` within 5 times of `absmax`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import spicerack
from spicerack.numerics import rounding
from spicerack.numerics.scheme import parse
from spicerack.numerics.search import Range

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
FOLDER_SCHEMES = ("w8", "w4g128")
SOLVER_SCHEMES = ("w8", "w4", "w4g128", "w4g32", "w4g32z", "w3g64", "w2g32", "w2g32z", "w2g32h", "w4t")
RANGES: tuple[Range, ...] = ("absmax", "opt")


def make_checkpoint(folder: Path, size: int) -> int:
    """Write a Llama folder of about `size` bytes, one shard per layer -> the bytes of its tensors."""
    layer_bytes = 2 * sum(n * k for n, k in PROJECTIONS.values())
    layers = max(1, round((size - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for i, shapes in enumerate(shard_shapes(layers)):
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        generator = torch.Generator().manual_seed(i)
        shard = {name: torch.randn(s, generator=generator).mul_(0.02).bfloat16() for name, s in shapes.items()}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(w.nbytes for w in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def shard_shapes(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensor names and shapes of each shard: a layer each, then embedding, head and final norm."""
    for i in range(layers):
        norms = {f"model.layers.{i}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        yield {f"model.layers.{i}.{name}.weight": shape for name, shape in PROJECTIONS.items()} | norms
    table = (VOCABULARY, HIDDEN)
    yield {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (HIDDEN,)}


def copy(source: Path, target: Path) -> None:
    """The plain copy: every file, then fsync."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def folder_speed(folder: Path, size: int, rounds: int, threads: int, console: Console) -> None:
    """Copy and quantize the folder in turns, and print GB/s."""
    table = Table(
        "what", "GB/s of source", "spread", "of the copy", title=f"{size / 1e9:.1f} GB folder, {threads} threads"
    )
    output = folder.with_name("output")
    runs: dict[str, Callable[[], object]] = {"copy": lambda: copy(folder, output)}
    for scheme in FOLDER_SCHEMES:
        for range_ in RANGES:
            runs[f"{scheme} {range_}"] = lambda scheme=scheme, range_=range_: spicerack.quantize(
                folder, scheme, output=output, range_=range_, threads=threads
            )
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            times[name].append(seconds(work))
            shutil.rmtree(output)
    base = statistics.median(times["copy"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        spread = f"{size / max(taken) / 1e9:.2f} - {size / min(taken) / 1e9:.2f}"
        table.add_row(name, f"{size / middle / 1e9:.2f}", spread, f"{base / middle:.0%}")
    console.print(table)


def solve_seconds(w: torch.Tensor, scheme: str, range_: Range, threads: int, rounds: int) -> float:
    """Median time of one range search and rounding, after one to warm up."""
    times = [
        seconds(lambda: rounding.to_nearest(w, parse(scheme), range_=range_, threads=threads))
        for _ in range(rounds + 1)
    ]
    return statistics.median(times[1:])


def solver_speed(rounds: int, console: Console) -> None:
    """Weights per second of range search and rounding alone, in memory."""
    w = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    columns = [f"{range_}, {n} thread{'s' * (n > 1)}" for range_ in RANGES for n in (1, 2)]
    table = Table("scheme", *columns, title="range search alone, millions of weights per second")
    for scheme in SOLVER_SCHEMES:
        times = [solve_seconds(w, scheme, range_, threads, rounds) for range_ in RANGES for threads in (1, 2)]
        table.add_row(scheme, *(f"{w.numel() / t / 1e6:.0f}" for t in times))
    console.print(table)


@click.command(help=__doc__)
@click.option("--gigabytes", default=4.0, show_default=True, help="Size of the checkpoint.")
@click.option("--rounds", default=3, show_default=True, help="Turns; medians are reported.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; the disk that is measured.")
def main(gigabytes: float, rounds: int, threads: int, folder: Path | None) -> None:
    console = Console(width=100)
    solver_speed(rounds, console)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        model = Path(work) / "model"
        model.mkdir()
        size = make_checkpoint(model, int(gigabytes * 1e9))
        folder_speed(model, size, rounds, threads, console)


if __name__ == "__main__":
    main()
