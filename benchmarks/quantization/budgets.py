"""Mixes of schemes for a budget, beside uniform schemes and llama.cpp's mixtures at equal bytes, and a bound on KL.

Prints the tables of docs/quantization/budgets.md. Mixes are what `spicerack quantize --bits` and `--max-kl` write, with
gptq; uniform schemes are quantized with the same calibration text and method. KL is of the project's language model on
text held out, windows of it that neither calibration nor search has seen, computed in float32; differences are paired
over them. llama.cpp's mixtures are its own types by its own rules, rounded by its own code with an importance matrix of
the same text; its table of tokens, in Q6_K there, stays in float on both sides. All bits are of the layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spicerack
from benchmarks.harness import texts
from benchmarks.harness.ggml import Ggml
from benchmarks.quantization.kquants import importances, theirs
from spicerack.errors import UsageError
from spicerack.evaluation.language import Comparison, compare, paired_difference
from spicerack.models.bundled import language_model
from spicerack.planning import gguf, sensitivity
from spicerack.planning.mix import judge, units
from spicerack.planning.model import open_model
from spicerack.runtime.load import load
from spicerack.storage.gguf.ggml import TYPES
from spicerack.text.calibration import Calibration
from spicerack.text.windows import Window, windows

BUDGETS = (2.5, 3.0, 3.25, 3.5, 4.25)
UNIFORM = (
    ("w2g32h", 2.5), ("w2g32", 2.5), ("q2_k", 2.625), ("w3", 3.04), ("w3g64", 3.25), ("q3_k", 3.4375), ("w3g32", 3.5),
    ("w4g64", 4.25), ("q4_k", 4.5),
)  # fmt: skip
"""Schemes, and their bits."""
_MORE = 1.015
"""Times the bits of a mix that a uniform scheme beside it may have: at 3.0 there is none but w3, with a few more."""
WIDE = (
    "w2g128h", "w2g64h", "w2g32h", "q2_k", "w3g128", "w3g64", "q3_k", "w3g32z", "w4g128", "w4g64", "q4_k", "iq4_nl",
    "w4g32z", "w5g128", "w5g64", "q5_k", "w6g128", "q6_k", "w8g128",
)  # fmt: skip
"""Schemes that the ladder was chosen from."""
RECIPES = ("Q2_K", "Q3_K_M", "Q4_K_M")
_WINDOW = 512
_STEP = 0.99
"""Of bytes, from one budget of the sweep to the next."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """The model, its texts, and folders that are made of it, in `work`."""

    source: Path
    work: Path
    text: Calibration
    read: list[Window]
    reference: PreTrainedModel

    def judged(self, folder: Path) -> Comparison:
        return compare(self.reference, load(folder, dtype=torch.float32, compute="float"), self.read)

    def mix(self, name: str, **budget: float) -> tuple[Path, sensitivity.Sensitivity]:
        folder = self.work / name
        spicerack.quantize(self.source, output=folder, calibration=self.text, threads=torch.get_num_threads(), **budget)
        found = sensitivity.read(folder)
        assert found is not None
        return folder, found

    def uniform(self, scheme: str) -> Path:
        folder = self.work / scheme
        spicerack.quantize(
            self.source, scheme, output=folder, calibration=self.text, threads=torch.get_num_threads(), method="gptq"
        )
        return folder


def kl(one: Comparison) -> str:
    interval = one.kl_interval
    return f"{interval.mean:.5f} ({interval.lo:.5f} to {interval.hi:.5f})"


def row(*cells: object) -> None:
    click.echo("| " + " | ".join(map(str, cells)) + " |")


def title(*cells: str) -> None:
    click.echo()
    row(*cells)
    click.echo("|---" * len(cells) + "|")


def ladder(bench: Bench) -> None:
    title("scheme", "bits", "expected KL, all layers in it", "in the ladder")
    with patch.object(units, "LADDER", WIDE):
        _, found = bench.mix("ladder", bits=4.0)
    for scheme in WIDE:
        options = [unit.schemes[scheme] for unit in found.units]
        bits = sum(option.bits for option in options) / found.weights
        row(scheme, f"{bits:.3f}", f"{sum(o.estimate for o in options):.5f}", "yes" if scheme in units.LADDER else "")


def mixes(bench: Bench, budgets: Sequence[float]) -> None:
    title("bits", "mix, KL", "expected", "measured by the search", "rounds", "uniform", "its KL", "mix - uniform, 95 %")
    uniform = {name: bench.judged(bench.uniform(name)) for name, bits in UNIFORM if bits <= _MORE * max(budgets)}
    for bits in budgets:
        folder, found = bench.mix(f"bits-{bits}", bits=bits)
        mine = bench.judged(folder)
        last = found.rounds[-1]
        best = min((name for name, b in UNIFORM if b <= _MORE * bits), key=lambda name: uniform[name].mean)
        gap = paired_difference(mine, uniform[best])
        row(
            f"{last.bits:.3f}", kl(mine), f"{last.predicted:.5f} ({last.predicted / last.measured:.2f})",
            f"{last.measured:.5f}", len(found.rounds), f"{best}, {dict(UNIFORM)[best]}", kl(uniform[best]),
            f"{gap.mean:+.5f} ({gap.lo:+.5f} to {gap.hi:+.5f})",
        )  # fmt: skip


def recipes(bench: Bench, ggml: Ggml) -> None:
    title("recipe", "bits", "KL llama.cpp, imatrix", "mix, bits", "mix, KL", "mix - llama.cpp, 95 %")
    planned = open_model(bench.source)
    model = AutoModelForCausalLM.from_pretrained(bench.source, dtype=torch.float32)
    weights = {w.entry.info.name: w for w in planned.weights}
    names = [name for name, _ in model.named_parameters() if ".layers." in name and name.endswith("_proj.weight")]
    known = importances(bench.reference, bench.text, names)
    rounded = theirs(ggml)
    for recipe in RECIPES:
        bits = numbers = 0
        for name in names:
            type_ = TYPES[gguf.type_of(planned, weights[name], gguf.MIXTURES[recipe])]
            w = bench.reference.get_parameter(name).data
            model.get_parameter(name).data = rounded(type_.name, w, known[name])
            bits, numbers = bits + w.numel() // type_.block * type_.nbytes * 8, numbers + w.numel()
        them = compare(bench.reference, model, bench.read)
        folder, found = bench.mix(f"like-{recipe}", bits=bits / numbers)
        mine = bench.judged(folder)
        gap = paired_difference(mine, them)
        row(
            recipe, f"{bits / numbers:.3f}", kl(them), f"{found.rounds[-1].bits:.3f}", kl(mine),
            f"{gap.mean:+.5f} ({gap.lo:+.5f} to {gap.hi:+.5f})",
        )  # fmt: skip


def bounded(bench: Bench, bound: float, steps: int) -> None:
    folder, found = bench.mix(f"kl-{bound}", max_kl=bound)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    mine = compare(bench.reference, load(folder), bench.read)  # as it ships, as `spicerack eval` has it
    last = found.rounds[-1]
    title("--max-kl", "bytes", "bits", "KL on the search's text", "KL on text held out, as it ships", "rounds")
    searched = f"{last.measured:.5f} ({last.interval[0]:.5f} to {last.interval[1]:.5f})"
    row(bound, f"{size:,}", f"{last.bits:.3f}", searched, kl(mine), len(found.rounds))
    title("sweep: bytes", "of the search's", "KL on the search's text", "holds there", "KL on text held out")
    # smaller and smaller mixes of the same curve, until the bound has failed for all of a few sizes
    for step in itertools.count(1):
        asked = int(size * _STEP**step)
        try:
            other, there = bench.mix(f"kl-{bound}-{step}", size=asked)
        except UsageError:
            break
        one = there.rounds[-1]
        end = compare(bench.reference, load(other), bench.read)
        row(
            f"{sum(file.stat().st_size for file in other.glob('*.safetensors')):,}", f"{_STEP**step:.3f}",
            f"{one.measured:.5f} ({one.interval[0]:.5f} to {one.interval[1]:.5f})",
            "yes" if one.interval[1] <= bound else "no", kl(end),
        )  # fmt: skip
        if step == steps:
            break


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folders are kept and taken again here.")
@click.option("--ggml", "folder", type=click.Path(path_type=Path), help="Where ggml is built; none: no llama.cpp.")
@click.option("--sdist", type=click.Path(path_type=Path), help="Of llama-cpp-python; default: downloaded.")
@click.option("--samples", type=int, default=64, show_default=True, help="Sequences of calibration text.")
@click.option("--length", type=int, default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--max-tokens", type=int, default=16_384, show_default=True, help="Of the held-out text.")
@click.option("--bits", type=float, multiple=True, default=BUDGETS, show_default=True)
@click.option("--max-kl", type=float, default=0.01, show_default=True)
@click.option("--steps", type=int, default=3, show_default=True, help="Of the sweep, a hundredth of the bytes each.")
@click.option("--only", type=click.Choice(["mixes", "recipes", "bound", "ladder"]), multiple=True, help="Default: all.")
def main(
    work: Path, folder: Path | None, sdist: Path | None, samples: int, length: int, max_tokens: int,
    bits: tuple[float, ...], max_kl: float, steps: int, only: tuple[str, ...],
) -> None:  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    source = language_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    text, heldout = texts.of_decoder(source, work, samples, length)
    judged = judge.beside(source, tokenizer, _WINDOW)
    assert judged is not None
    seen = {tuple(ids.tolist()) for ids in judged.ids}
    unseen = [one for one in windows(heldout, tokenizer, _WINDOW) if tuple(one.ids.tolist()) not in seen]
    step = max(len(unseen) * _WINDOW // max_tokens, 1)
    bench = Bench(source, work, text, unseen[::step], load(source, dtype=torch.float32))
    if not only or "ladder" in only:
        ladder(bench)
    if not only or "mixes" in only:
        mixes(bench, bits)
    if folder is not None and (not only or "recipes" in only):
        recipes(bench, Ggml(folder, sdist))
    if not only or "bound" in only:
        bounded(bench, max_kl, steps)


if __name__ == "__main__":
    main()
