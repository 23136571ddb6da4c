"""What training in few bits costs: a step of stdlib-lm beside the float step, time and memory; torchao's too.

Steps (forward, backward, AdamW) take turns in one process; a figure is the median over rounds of the ratio of
its processor time to that of the float step of the same round. Memory is how far a process that does nothing but two
such steps rises above what it had when everything was imported. Aims: 1.6 times the time, 1.3 times the memory. torchao
is left out where it is not installed.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from rich.console import Console
from rich.table import Table

import spicerack
from spicerack.machine.memory import peak_rss_bytes

MODEL = Path(__file__).parents[2] / "assets" / "stdlib-lm"
SCHEMES = ("w8", "w4g32", "w4g32z", "w2g32h", "ternary", "w4g32a8", "ternarya8")
TORCHAO = {"torchao int4 g32": False, "torchao int4 g32, int8 per token": True}


def float_model() -> torch.nn.Module:
    """Float32, in training mode."""
    return spicerack.load(MODEL, dtype=torch.float32).train()


def torchao_model(model: torch.nn.Module, activations: bool) -> torch.nn.Module:
    """Its linear layers but the head fake-quantized, scales from the range at each step."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    rounded = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
    config = QATConfig(
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), activation_config=rounded, step="prepare"
    )
    quantize_(model, config, lambda m, name: isinstance(m, torch.nn.Linear) and "lm_head" not in name)
    return model


def variant(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model called `name`, made of `model`. Raises ImportError."""
    if name == "float":
        return model
    if name in TORCHAO:
        return torchao_model(model, TORCHAO[name])
    return spicerack.prepare_qat(model, name)


def stepper(model: torch.nn.Module, batch: int, length: int, bf16: bool) -> Callable[[], None]:
    """One training step on the same random tokens each time. bf16: products in it, by autocast."""
    ids = torch.randint(1, 4096, (batch, length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    return step


def speed(names: list[str], batch: int, length: int, bf16: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, the first left out; variants that cannot be imported are left out."""
    base = float_model()
    steps = {}
    for name in names:
        try:
            steps[name] = stepper(variant(name, copy.deepcopy(base)), batch, length, bf16)
        except ImportError as error:
            click.echo(f"{name}: {error}", err=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def memory(name: str, batch: int, length: int, bf16: bool, threads: int) -> int:
    """Bytes that two steps take, in a process of their own."""
    options = ["--batch", batch, "--length", length, "--threads", threads, *(["--bf16"] if bf16 else [])]
    command = [sys.executable, "-m", "benchmarks.training.qat_speed", "--alone", name, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def alone(name: str, batch: int, length: int, bf16: bool) -> int:
    """What `memory` prints in its process."""
    if name in TORCHAO:
        import torchao.quantization.qat  # noqa: F401
    stepper(torch.nn.Embedding(1, 1), 1, 1, bf16)  # what optimizers import counts for nobody
    before = psutil.Process().memory_info().rss
    step = stepper(variant(name, float_model()), batch, length, bf16)
    step()
    step()
    return peak_rss_bytes() - before


@click.command(help=__doc__)
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--bf16", is_flag=True, help="Products in bfloat16, by autocast.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--alone", "only", hidden=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(batch: int, length: int, bf16: bool, rounds: int, threads: int, only: str | None, file: Path | None) -> None:
    torch.set_num_threads(threads)
    if only:
        click.echo(alone(only, batch, length, bf16))
        return
    seconds = speed(["float", *SCHEMES, *TORCHAO], batch, length, bf16, rounds)
    base = memory("float", batch, length, bf16, threads)
    rows: dict[str, dict[str, Any]] = {}
    for name, turns in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(turns, seconds["float"], strict=True)]
        used = base if name == "float" else memory(name, batch, length, bf16, threads)
        rows[name] = {
            "seconds": statistics.median(turns), "time": statistics.median(ratios), "least": min(ratios),
            "most": max(ratios), "bytes": used, "memory": used / base,
        }  # fmt: skip
    table = Table("step", "ms", "times float", "least", "most", "MB", "times float")
    for name, row in rows.items():
        table.add_row(
            name, f"{1e3 * row['seconds']:.0f}", f"{row['time']:.2f}", f"{row['least']:.2f}", f"{row['most']:.2f}",
            f"{row['bytes'] / 1e6:.0f}", f"{row['memory']:.2f}",
        )  # fmt: skip
    kind = "bfloat16 products" if bf16 else "float32"
    Console().print(f"stdlib-lm, {batch} x {length} tokens, {kind}, {threads} threads, torch {torch.__version__}")
    Console().print(table)
    if file:
        file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
