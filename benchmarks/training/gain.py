"""What training in few bits gains on the project's language model, beside rounding and beside training on in float.

    python -m benchmarks.training.gain --out training    # an hour and a half on two cores

bits: the float model, rounded (data-free, and as `--calib` does it), trained in few bits from the calibrated folder
with the float model as its teacher, and, as controls, trained on in float with the same text, loss and number of steps.
The text is new to the model: sources of Python packages that this project installs, but for files that quote the
held-out text. bytes: the ternary model, its embeddings in int8, and a float16 model that takes as much room on disk,
from random weights with as many tokens as the float model and its training in few bits took together.

Each run is a spicerack command with one thread, several at once; a folder that is there already is not made again.
Losses are cross-entropies in nats a token over all of the held-out text in windows of 512 tokens, of the folders as
they are loaded, in float32.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import click
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

import spicerack

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "stdlib-lm"
WINDOW = 512
STEPS, BATCH = 400, 8
"""Of 512 tokens each: a tenth of what the float model was trained on."""
SEEDS = (0, 1, 2)
SCHEMES = {
    "w2g32h": (2e-3, 0.8, SEEDS),
    "ternary": (2e-3, 0.8, SEEDS),
    "w3g64": (5e-4, 1.0, SEEDS[:1]),
    "w4g64": (2e-4, 1.0, SEEDS[:1]),
}
"""Scheme -> learning rate, the divergence's share of the loss (the rest is cross-entropy), seeds."""
EMBEDDING_RATE, SCALE_RATE = 3e-4, 1e-4
"""At most."""
CONTROL_KL = 0.8
CONTROL_RATES = (3e-5, 1e-4, 3e-4)
SMALL_STEPS, SMALL_BATCH, SMALL_RATE = 2200, 16, 4e-3
"""As many tokens as the float model and the ternary one from it have seen together."""
SEEN, NEW = "seen.jsonl", "new.jsonl"
PACKAGES = ("torch", "transformers", "numpy", "scipy", "sklearn", "sympy", "networkx")
NEW_BYTES, LARGEST = 12_000_000, 200_000
TELLING, QUOTED = 30, 8
"""A document that has more than 8 lines of over 30 characters in common with the held-out text is left out: packages
carry copies of the standard library."""
SMALL = {"hidden_size": 96, "intermediate_size": 272, "num_hidden_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 24}  # fmt: skip
"""What is changed in the model's config for the float16 one."""


@dataclass(frozen=True)
class Run:
    """A folder made by a command. after: names of runs whose folders it reads."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()


def quantize(scheme: str, how: str) -> Run:
    words = (
        ("--method", "rtn")
        if how == "rtn"
        else ("--calib", MODEL / "calibration.txt", "--samples", 800, "--effort", "high")
    )
    rules = ("--set", "lm_head=w8") if scheme == "ternary" else ()
    given = ("quantize", MODEL, "--scheme", scheme, *rules, "--threads", 1, "--no-check", *words)
    return Run(f"{scheme}-{how}", tuple(map(str, given)))


def train(name: str, *words: object, steps: int = STEPS, batch: int = BATCH, after: Sequence[str] = ()) -> Run:
    given = (
        "train", *words, "--eval", MODEL / "heldout.txt", "--batch", batch, "--micro-batch", 4, "--bf16",
        "--steps", steps, "--eval-every", steps, "--save-every", 100,
    )  # fmt: skip
    return Run(name, tuple(map(str, given)), tuple(after))


def bits(out: Path) -> Iterator[Run]:
    text = ("--data", out / NEW, "--teacher", MODEL, "--predictions", out / "predictions")
    for scheme, (rate, kl, seeds) in SCHEMES.items():
        yield quantize(scheme, "rtn")
        yield quantize(scheme, "calib")
        for seed in seeds:
            yield train(
                f"{scheme}-trained-{seed}", out / f"{scheme}-calib", *text, "--kl", kl, "--lr", rate,
                "--embedding-lr", min(rate, EMBEDDING_RATE), "--scale-lr", min(rate, SCALE_RATE), "--seed", seed,
                after=[f"{scheme}-calib"],
            )  # fmt: skip
    for rate in CONTROL_RATES:
        yield train(f"float-{rate:g}", MODEL, *text, "--kl", CONTROL_KL, "--lr", rate)


def small(out: Path) -> Run:
    return train(
        "small-trained", "--from-scratch", out / "small" / "config.json", "--tokenizer", MODEL, "--data", out / SEEN,
        "--lr", SMALL_RATE, "--weight-decay", 0.1, "--dtype", "float16", steps=SMALL_STEPS, batch=SMALL_BATCH,
    )  # fmt: skip


# ---- running ---------------------------------------------------------------------------------------------------------


def prepare(out: Path) -> None:
    """The texts as JSON lines, a document each, and the config of the float16 model."""
    sys.path.insert(0, str(ROOT / "examples"))
    from stdlib_corpus import build_corpus, source_files

    out.mkdir(parents=True, exist_ok=True)
    if not all((out / name).exists() for name in (SEEN, NEW)):
        corpus = build_corpus()
        seen = [str(document) for document in (*corpus.library, *corpus.tests[::2])]
        held = frozenset().union(*(_lines(document.text) for document in corpus.heldout))
        found = [document for name in PACKAGES for document in source_files(_folder(name))]
        random.Random(0).shuffle(found)
        new, room = [], NEW_BYTES
        for document in found:
            size = len(document.text.encode())
            if size <= min(room, LARGEST) and len(held & _lines(document.text)) <= QUOTED:
                new.append(str(document))
                room -= size
        for name, documents in ((SEEN, seen), (NEW, new)):
            (out / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = json.loads((MODEL / "config.json").read_text())
    (out / "small").mkdir(exist_ok=True)
    (out / "small" / "config.json").write_text(json.dumps(config | SMALL))


def _folder(package: str) -> Path:
    found = find_spec(package)
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def _lines(text: str) -> frozenset[str]:
    """Those that say enough to be recognized."""
    return frozenset(line.strip() for line in text.splitlines() if len(line.strip()) > TELLING)


def make(out: Path, runs: Sequence[Run], jobs: int) -> None:
    """All folders that are not there, `jobs` at once. Raises RuntimeError with what a run printed if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    futures: dict[str, Future[None]] = {}

    def one(run: Run) -> None:
        for name in run.after:
            futures[name].result()
        if (out / run.name).exists():
            return
        words = [sys.executable, "-m", "spicerack", *run.words, "-o", str(out / run.name)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(run.words)}\n{done.stderr}")
        click.echo(f"{run.name} is there", err=True)

    with ThreadPoolExecutor(jobs) as pool:
        for run in runs:  # in order, so that what a run waits for is at work already
            futures[run.name] = pool.submit(one, run)
        for future in futures.values():
            future.result()


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Nats a token; bytes on disk."""

    loss: float
    kl: float
    bytes: int


@torch.no_grad()
def measure(folder: Path, teacher: PreTrainedModel) -> Measured:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer((MODEL / "heldout.txt").read_text(), verbose=False).input_ids)
    model = spicerack.load(folder, dtype=torch.float32)
    loss = far = 0.0
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    for some in windows.split(4):
        logs, wanted = (
            net(input_ids=some, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            for net in (model, teacher)
        )
        loss += F.nll_loss(logs, some[:, 1:].flatten(), reduction="sum").item()
        far += F.kl_div(logs, wanted, reduction="sum", log_target=True).item()
    count = windows.numel() - len(windows)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Measured(loss / count, far / count, size)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The mean, and of several the standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def report_bits(out: Path, teacher: PreTrainedModel) -> str:
    start = measure(MODEL, teacher)
    lines = [["float", "", f"{start.loss:.4f}", "", "", ""]]
    for rate in CONTROL_RATES:
        one = measure(out / f"float-{rate:g}", teacher)
        lines.append(
            ["", f"trained on, {rate:g}", f"{one.loss:.4f}", f"{one.loss - start.loss:+.4f}", f"{one.kl:.4f}", ""]
        )
    for scheme, (*_, seeds) in SCHEMES.items():
        rtn, ptq = (measure(out / f"{scheme}-{how}", teacher) for how in ("rtn", "calib"))
        trained = [measure(out / f"{scheme}-trained-{seed}", teacher) for seed in seeds]
        losses = [one.loss for one in trained]
        for name, one in (("rounded", rtn), ("calibrated", ptq)):
            lines.append([scheme, name, f"{one.loss:.4f}", f"{one.loss - start.loss:+.4f}", f"{one.kl:.4f}", ""])
        back = [f"{mean((one.loss - x) / (one.loss - start.loss) for x in losses):.0%}" for one in (rtn, ptq)]
        gap = [x - start.loss for x in losses]
        far = spread([one.kl for one in trained])
        lines.append([scheme, "trained", spread(losses), f"{mean(gap):+.4f}", far, f"{back[0]}, {back[1]}"])
    header = ["scheme", "", "held-out loss", "lost", "KL", "won back of rounded, of calibrated"]
    return table(header, lines)


def report_bytes(out: Path, teacher: PreTrainedModel) -> str:
    ternary = [measure(out / f"ternary-trained-{seed}", teacher) for seed in SCHEMES["ternary"][-1]]
    lines = []
    for name, made in (("ternary, trained", ternary), ("small, float16", [measure(out / small(out).name, teacher)])):
        lines.append([name, f"{made[0].bytes / 1e6:.2f} MB", spread([one.loss for one in made])])
    return table(["", "on disk", "held-out loss"], lines)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of all runs.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Runs at once.")
def main(out: Path, jobs: int) -> None:
    out = out.absolute()
    prepare(out)
    make(out, [small(out), *bits(out)], jobs)
    teacher = spicerack.load(MODEL, dtype=torch.float32)
    click.echo(f"{report_bits(out, teacher)}\n\n{report_bytes(out, teacher)}")


if __name__ == "__main__":
    main()
