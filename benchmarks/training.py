"""What training in few bits gains on the project's language model, beside rounding, beside a float model trained as long.

    python benchmarks/training.py --out training            # all; an hour on two cores
    python benchmarks/training.py --out training --only bytes

Each run is the command `spicerack train` on the standard library's text, several at once, one thread each. Losses are
cross-entropies over all of heldout.txt in windows of 512 tokens, which no run has seen, of the folders as they are
loaded, in float32; KL is from the float model's predictions. A run that is there already is not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import click
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel

import spicerack

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "stdlib-lm"
WINDOW = 512
STEPS = 200
"""Of 8,192 tokens: a tenth of what the float model was trained on."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """A folder to be made by a command. after: those that it reads. parameters: of its options that are reported."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    group: str = field(default="", kw_only=True)


def train(name: str, *words: object, after: Sequence[str] = (), group: str = "", seed: int = 0) -> Run:
    common = (
        "--batch",
        "16",
        "--micro-batch",
        "4",
        "--bf16",
        "--seed",
        seed,
        "--save-every",
        "100",
        "--dtype",
        "float16",
    )
    given = (*words, *common, "--data", "{out}/corpus.jsonl", "--eval", MODEL / "heldout.txt", "--eval-every", "100")
    return Run(name, ("train", *map(str, given)), tuple(after), group=group)


def rounded(name: str, scheme: str, *words: str) -> Run:
    text = ("--calib", str(MODEL / "calibration.txt"), "--samples", "800", "--threads", "1")
    return Run(name, ("quantize", str(MODEL), "--scheme", scheme, *(text if not words else words)))


def quantized(name: str, scheme: str, rate: float, seeds: Sequence[int], start: str) -> Iterable[Run]:
    """Trained from where calibrated rounding ended, taught by the float model."""
    for seed in seeds:
        yield train(
            f"{name}-{seed}", MODEL, "--scheme", scheme, "--start", f"{{out}}/{start}", "--quantizer", "lsq", "--lr", rate,
            "--steps", STEPS, "--teacher", MODEL, "--predictions", "{out}/predictions", after=(start,), group=name, seed=seed,
        )  # fmt: skip


RUNS = [
    train("float", MODEL, "--lr", 3e-4, "--steps", STEPS),
    *(rounded(f"rtn-{s}", s, "--method", "rtn") for s in ("w4g64", "w3g64", "w2g32h", "ternary")),
    *(rounded(f"ptq-{s}", s) for s in ("w4g64", "w3g64", "w2g32h", "ternary")),
    *quantized("qat-w4g64", "w4g64", 3e-4, SEEDS[:1], "ptq-w4g64"),
    *quantized("qat-w3g64", "w3g64", 3e-4, SEEDS[:1], "ptq-w3g64"),
    *quantized("qat-w2g32h", "w2g32h", 1e-3, SEEDS, "ptq-w2g32h"),
    *quantized("qat-ternary", "ternary", 1e-3, SEEDS, "ptq-ternary"),
]


def main() -> None: ...
