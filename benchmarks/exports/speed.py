"""How long an export takes, reading back counted in, beside a plain copy of what it wrote.

A model of some 340 M random weights is made in a temporary folder, or in --folder, and quantized. Each export is a
process of its own, whose peak of memory counts; the copy of its files, brought to the disk as an export brings its own,
follows behind it, and all take turns. Printed are medians, and processor time, which other programs do not change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import click

SMALL = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 512,
}  # fmt: skip
ROWS = (
    ("w4g128", "gguf"), ("q4_k", "gguf"), ("w8g32", "gguf"), ("w4g32z", "gguf"), ("w4g128", "gptq"),
    ("w4g128", "compressed-tensors"), ("w4g128", "mlx"),
)  # fmt: skip
"""Scheme, and what it is exported to."""


def quantized(work: Path, scheme: str) -> Path:
    """The folder in a scheme, made where it is not there yet."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import spicerack
    from spicerack.models.bundled import language_model

    source, folder = work / "model", work / scheme
    if not source.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(AutoTokenizer.from_pretrained(language_model())), **SMALL)
        LlamaForCausalLM(config).bfloat16().save_pretrained(source)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(language_model() / name, source / name)
    if not folder.is_dir():
        spicerack.quantize(source, scheme, output=folder, range_="absmax")
    return folder


def once(folder: str, to: str, output: str) -> dict[str, float]:
    """Seconds, seconds of the processor, and the peak of memory of an export by this very process."""
    from spicerack import export
    from spicerack.machine.memory import peak_rss_bytes

    begin, worked = time.perf_counter(), time.process_time()
    export(folder, to=to, output=output)
    return {
        "export": time.perf_counter() - begin, "cpu": time.process_time() - worked, "peak": float(peak_rss_bytes()),
    }  # fmt: skip


def copied(source: Path, target: Path) -> float:
    """Seconds that a plain copy of a file or folder takes, until it is on the disk."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    begin = time.perf_counter()
    for path in files:
        place = target / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begin


def turn(folder: Path, to: str, place: Path) -> dict[str, float]:
    """An export in a process of its own, and a copy of what it wrote."""
    output = place / ("out.gguf" if to == "gguf" else "out")
    command = [sys.executable, "-m", "benchmarks.exports.speed", "--once", str(folder), to, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    figures["bytes"] = float(sum(path.stat().st_size for path in files))
    figures["copy"] = copied(output, place / "copy")
    shutil.rmtree(place / "copy")
    output.unlink() if output.is_file() else shutil.rmtree(output)
    return figures


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where models are made, and kept.")
@click.option("--turns", type=int, default=5, show_default=True)
@click.option("--once", "single", nargs=3, hidden=True)
def main(folder: Path | None, turns: int, single: tuple[str, str, str] | None) -> None:
    if single:
        print(json.dumps(once(*single)))
        return
    from benchmarks.harness import machine

    print(machine.describe(1))
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        work = Path(place)
        work.mkdir(parents=True, exist_ok=True)
        sources = {scheme: quantized(work, scheme) for scheme, _ in ROWS}
        seen: dict[tuple[str, str], list[dict[str, float]]] = {row: [] for row in ROWS}
        with tempfile.TemporaryDirectory(dir=work) as outputs:
            for _ in range(turns):
                for scheme, to in ROWS:
                    seen[scheme, to].append(turn(sources[scheme], to, Path(outputs)))
    print("\n| from, to | MB | export | processor | copy | copies | peak, GB |\n|---|---|---|---|---|---|---|")
    for (scheme, to), rows in seen.items():
        of = {name: median(row[name] for row in rows) for name in rows[0]}
        print(
            f"| `{scheme}`, {to} | {of['bytes'] / 1e6:.0f} | {of['export']:.2f} s | {of['cpu']:.2f} s | "
            f"{of['copy']:.2f} s | {of['export'] / of['copy']:.1f} | {of['peak'] / 1e9:.3f} |"
        )


if __name__ == "__main__":
    main()
