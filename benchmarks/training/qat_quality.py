"""Which quantizer and which first scales: stdlib-lm, taught by itself for some steps in few bits.

Each run starts from the float model, sees the same batches of its calibration text, and minimises the KL divergence
to the float model's predictions (AdamW without weight decay, ten steps of warm-up, then down to 0). Reported is the
mean KL over 12,288 tokens of the held-out text before and after, in float32. One seed: differences of a few percent
mean nothing. With --folder, a folder that stdlib-lm was quantized to, it is that whose scales alone train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

import spicerack
from spicerack import QATConfig
from spicerack.training.qat.fake_layers import Quantizer
from spicerack.training.qat.start import Init

MODEL = Path(__file__).parents[2] / "assets" / "stdlib-lm"
LENGTH, BATCH, WARM_UP = 128, 4, 10
WINDOW, HELD_OUT = 256, 12_288
SCALES_RATE = 1e-4


class Run(NamedTuple):
    """rate: the highest learning rate, of weights and scales."""

    scheme: str
    quantizer: Quantizer
    init: Init | None
    rate: float


RUNS = (
    Run("w4g64", "lsq", "opt", 1e-4),
    Run("w4g64", "absmax", None, 1e-4),
    Run("w3g64", "lsq", "opt", 2e-4),
    Run("w3g64", "absmax", None, 2e-4),
    Run("w2g32h", "lsq", "opt", 3e-4),
    Run("w2g32h", "seq", "opt", 3e-4),
    Run("w2g32h", "seq", "absmax", 3e-4),
    Run("w2g32h", "lsq", "lsq", 3e-4),
    Run("w2g32h", "absmax", None, 3e-4),
    Run("ternary", "lsq", "opt", 3e-4),
    Run("ternary", "absmean", None, 3e-4),
)


def tokens(name: str) -> torch.Tensor:
    """Ids of a text beside the model."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return torch.tensor(tokenizer.backend_tokenizer.encode((MODEL / name).read_text()).ids)


def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model(input_ids=ids).logits, -1)


@torch.no_grad()
def divergence(model: PreTrainedModel, teacher: PreTrainedModel, held: torch.Tensor) -> float:
    """Mean KL, nats a token."""
    total = 0.0
    for ids in held.split(8):
        wanted = log_probabilities(teacher, ids)
        total += float((wanted.exp() * (wanted - log_probabilities(model.eval(), ids))).sum())
    return total / held.numel()


def batches(text: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (BATCH,), generator=generator)]


def train(model: PreTrainedModel, teacher: PreTrainedModel, text: torch.Tensor, rate: float, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    model.train()
    for step, ids in enumerate(batches(text, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        with torch.no_grad():
            wanted = log_probabilities(teacher, ids).flatten(0, 1)
        optimizer.zero_grad()
        found = log_probabilities(model, ids).flatten(0, 1)
        F.kl_div(found, wanted, reduction="batchmean", log_target=True).backward()
        optimizer.step()


def compare(
    model: torch.nn.Module, teacher: PreTrainedModel, text: torch.Tensor, held: torch.Tensor, rate: float, steps: int
) -> str:
    assert isinstance(model, PreTrainedModel)
    before = divergence(model, teacher, held)
    train(model, teacher, text, rate, steps)
    return f"KL {before:.4f} -> {divergence(model, teacher, held):.4f}"


@click.command(help=__doc__)
@click.option("--steps", default=100, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--only", multiple=True, help="A scheme; several times for several.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Train the scales of this one instead.")
def main(steps: int, threads: int, only: tuple[str, ...], folder: Path | None) -> None:
    torch.set_num_threads(threads)
    teacher = spicerack.load(MODEL, dtype=torch.float32)
    text, held = tokens("calibration.txt"), tokens("heldout.txt")[:HELD_OUT].view(-1, WINDOW)
    if folder is not None:
        packed = spicerack.prepare_qat(spicerack.load(folder, dtype=torch.float32))
        click.echo(f"{folder.name}  {compare(packed, teacher, text, held, SCALES_RATE, steps)}")
        return
    for run in RUNS:
        if only and run.scheme not in only:
            continue
        config = QATConfig(run.quantizer, run.init)
        model = spicerack.prepare_qat(copy.deepcopy(teacher), run.scheme, config=config)
        line = f"{run.scheme:8s} {run.quantizer:8s} {run.init or '':7s} rate {run.rate:g}"
        click.echo(f"{line}  {compare(model, teacher, text, held, run.rate, steps)}")


if __name__ == "__main__":
    main()
