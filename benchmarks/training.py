"""What training in few bits gains on the project's language model, beside rounding and beside training on in float.

    python benchmarks/training.py --out training              # all of it: an hour and a half on two cores
    python benchmarks/training.py --out training --only bits  # or bytes

bits: the float model, rounded (data-free, and as `--calib` does it), trained in few bits from the calibrated folder
with the float model as its teacher, and, as a control, trained on in float for as long. bytes: models from random
weights, a ternary one and a float16 one that takes the same room on disk, each with the best of three learning rates.

Each run is a spicerack command with one thread, several at once; a folder that is there already is not made again.
Losses are cross-entropies in nats a token over all of the held-out text in windows of 512 tokens, of the folders as
they are loaded, in float32.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import click
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

import spicerack

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "stdlib-lm"
WINDOW = 512
STEPS, BATCH = 400, 8
"""Of 512 tokens each: a tenth of what the float model was trained on."""
SCRATCH_STEPS, SHORT_STEPS = 200, 100
CONTROL_RATE = 1e-4
SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3, 4e-3)
SCHEMES = {"w2g32h": (1e-3, SEEDS), "ternary": (1e-3, SEEDS), "w3g64": (5e-4, SEEDS[:1]), "w4g64": (2e-4, SEEDS[:1])}
"""Scheme -> learning rate of its training, and seeds."""
SMALL = {"hidden_size": 96, "intermediate_size": 272, "num_hidden_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 24}  # fmt: skip
"""What is changed in the model's config for the float16 one."""


@dataclass(frozen=True)
class Run:
    """A folder made by a command. after: names of runs whose folders it reads."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()


def quantize(scheme: str, *words: str) -> Run:
    name = f"{scheme}-{words[1] if words else 'calib'}"
    text = ("--calib", str(MODEL / "calibration.txt"), "--samples", "800")
    return Run(name, ("quantize", str(MODEL), "--scheme", scheme, "--threads", "1", *(words or text)))


def train(out: Path, name: str, *words: object, after: Sequence[str] = (), seed: int = 0, steps: int = STEPS) -> Run:
    given = (
        *words, "--data", out / "corpus", "--eval", MODEL / "heldout.txt", "--batch", BATCH, "--micro-batch", 4,
        "--bf16", "--steps", steps, "--seed", seed, "--eval-every", steps, "--save-every", 100,
    )  # fmt: skip
    return Run(name, ("train", *map(str, given)), tuple(after))


def bits(out: Path) -> Iterator[Run]:
    for scheme, (rate, seeds) in SCHEMES.items():
        yield quantize(scheme, "--method", "rtn")
        yield quantize(scheme)
        for seed in seeds:
            yield train(
                out, f"{scheme}-trained-{seed}", out / f"{scheme}-calib", "--lr", rate, "--teacher", MODEL, "--kl", 1,
                "--predictions", out / "predictions", after=(f"{scheme}-calib",), seed=seed,
            )  # fmt: skip
    yield train(out, "float", MODEL, "--lr", CONTROL_RATE)


def scratch(out: Path, kind: str, rate: float, steps: int = SCRATCH_STEPS) -> Run:
    config = out / kind / "config.json"
    words = ("--from-scratch", config, "--tokenizer", MODEL, "--schedule", "two-stage", "--weight-decay", 0.1)
    ternary = ("--scheme", "ternary", "--set", "lm_head=w8", "--twin", "bitnet") if kind == "ternary" else ()
    name = f"scratch-{kind}-{rate:g}-{steps}"
    return train(out, name, *words, *ternary, "--lr", rate, "--dtype", "float16", steps=steps)


# ---- running ---------------------------------------------------------------------------------------------------------


def prepare(out: Path) -> None:
    """The standard library as JSON lines, a document each, and the configs of models from random weights."""
    sys.path.insert(0, str(ROOT / "examples"))
    from stdlib_corpus import build_corpus

    (out / "corpus").mkdir(parents=True, exist_ok=True)
    text = out / "corpus" / "stdlib.jsonl"
    if not text.exists():
        corpus = build_corpus()
        documents = [*corpus.library, *corpus.tests[::2]]
        text.write_text("".join(json.dumps({"text": str(document)}) + "\n" for document in documents))
    config = json.loads((MODEL / "config.json").read_text())
    for kind, changed in (("ternary", {}), ("float16", SMALL)):
        (out / kind).mkdir(exist_ok=True)
        (out / kind / "config.json").write_text(json.dumps(config | changed))


def make(out: Path, runs: Sequence[Run], jobs: int) -> None:
    """All folders that are not there, `jobs` at once; a run that diverges makes none.

    Raises RuntimeError with what a run printed if it fails otherwise.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    futures: dict[str, Future[None]] = {}

    def one(run: Run) -> None:
        for name in run.after:
            futures[name].result()
        if (out / run.name).exists():
            return
        words = [sys.executable, "-m", "spicerack", *run.words, "-o", str(out / run.name)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode and "error: step" not in done.stderr:
            raise RuntimeError(f"{' '.join(run.words)}\n{done.stderr}")
        click.echo(f"{run.name} {'diverged' if done.returncode else 'is there'}", err=True)

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
    start, control = measure(MODEL, teacher), measure(out / "float", teacher)
    lines = [
        ["float", "", f"{start.loss:.4f}", "", "", ""],
        ["float, trained on", "", f"{control.loss:.4f}", "", "", ""],
    ]
    for scheme, (_, seeds) in SCHEMES.items():
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


def report_bytes(out: Path, chosen: dict[str, float], teacher: PreTrainedModel) -> str:
    lines = []
    for kind, rate in chosen.items():
        made = measure(out / scratch(out, kind, rate).name, teacher)
        lines.append([kind, f"{made.bytes / 1e6:.2f} MB", f"{rate:g}", f"{made.loss:.4f}"])
    return table(["", "on disk", "learning rate", "held-out loss"], lines)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of all runs.")
@click.option("--only", type=click.Choice(["bits", "bytes"]))
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Runs at once.")
def main(out: Path, only: str | None, jobs: int) -> None:
    out = out.absolute()
    prepare(out)
    teacher = spicerack.load(MODEL, dtype=torch.float32)
    if only != "bytes":
        make(out, list(bits(out)), jobs)
        click.echo(report_bits(out, teacher))
    if only != "bits":
        kinds = ("ternary", "float16")
        tried = {(kind, rate): scratch(out, kind, rate, steps=SHORT_STEPS) for rate in RATES for kind in kinds}
        make(out, list(tried.values()), jobs)
        chosen: dict[str, float] = {}
        for kind in kinds:
            folders = {rate: out / tried[kind, rate].name for rate in RATES}
            losses = {r: measure(f, teacher).loss if f.exists() else math.inf for r, f in folders.items()}
            chosen[kind] = min(losses, key=lambda rate: losses[rate])
            click.echo(f"{kind}, {SHORT_STEPS} steps: " + ", ".join(f"{r:g} {x:.3f}" for r, x in losses.items()))
        make(out, [scratch(out, kind, rate) for kind, rate in chosen.items()], jobs)
        click.echo(report_bytes(out, chosen, teacher))


if __name__ == "__main__":
    main()
