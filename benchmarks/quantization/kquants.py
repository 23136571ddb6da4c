"""llama.cpp's types, rounded by llama.cpp and by us, at equal bytes: KL, errors of weights, and speed.

Prints the tables of docs/quantization/quality.md. KL is of the project's language model on text held out, in float32,
with what codes decode to in place of its layers; `imatrix` is the mean square of each layer's inputs in the float
model, the same for both. `gptq` is `spicerack quantize --method gptq` with the same text. The layers have 256 and 768
inputs: no type falls back to another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spicerack
from benchmarks.harness import texts
from benchmarks.harness.ggml import Ggml
from spicerack.algorithms.stats import Accumulator
from spicerack.evaluation.language import Comparison, compare
from spicerack.models.bundled import language_model
from spicerack.numerics import codec, rounding
from spicerack.numerics.scheme import parse
from spicerack.runtime.load import load
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES
from spicerack.text.calibration import Calibration
from spicerack.text.windows import windows

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
_WINDOW, _BATCH = 512, 8
_SPEED = 256, 4096


def importances(model: torch.nn.Module, text: Calibration, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Mean square of each layer's inputs, float32 [K] by the name of its weight."""
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    totals = {name: Accumulator(["second_moment"], layer.weight.shape[1]) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, inputs, name=name: totals[name].add(inputs[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in text.ids.split(_BATCH):
            model(batch)
    for hook in hooks:
        hook.remove()
    means = {name: total.result().second_moment for name, total in totals.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


Rounding = Callable[[str, torch.Tensor, torch.Tensor | None], torch.Tensor]


def theirs(ggml: Ggml) -> Rounding:
    return lambda name, w, a: codec.decode(blocks.decode(TYPES[name], ggml.quantize(name, w, a)))


def ours(name: str, w: torch.Tensor, a: torch.Tensor | None) -> torch.Tensor:
    return codec.decode(rounding.to_nearest(w, parse(name), importance=a, threads=torch.get_num_threads()))


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, the least of three."""
    times = []
    for _ in range(3):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def errors_and_speed(ggml: Ggml, only: Sequence[str]) -> None:
    w = torch.randn(_SPEED, generator=torch.Generator().manual_seed(0))
    a = torch.rand(_SPEED[1], generator=torch.Generator().manual_seed(1))
    click.echo("| type | RMSE llama.cpp | RMSE ours | million weights/s llama.cpp | ours | ours / llama.cpp |")
    click.echo("|---|---|---|---|---|---|")
    for name in only:
        rmse = [float((r(name, w, None) - w).norm() / w.norm()) for r in (theirs(ggml), ours)]
        scheme = parse(name)
        took = [
            seconds(lambda name=name: ggml.quantize(name, w, a)),
            seconds(lambda scheme=scheme: rounding.to_nearest(w, scheme, importance=a)),
        ]
        speed = [w.numel() / one / 1e6 for one in took]
        figures = [*(f"{one:.4f}" for one in rmse), *(f"{one:.1f}" for one in speed), f"{speed[1] / speed[0]:.1f}"]
        click.echo(f"| {name} | {' | '.join(figures)} |")


@click.command(help=__doc__)
@click.option("--ggml", "folder", type=click.Path(path_type=Path), required=True, help="Where ggml is built.")
@click.option("--sdist", type=click.Path(path_type=Path), help="Of llama-cpp-python; default: downloaded.")
@click.option("--only", multiple=True, default=NAMES, show_default=True)
@click.option("--max-tokens", type=int, default=12_288, show_default=True, help="Of the held-out text.")
@click.option("--samples", type=int, default=128, show_default=True)
@click.option("--length", type=int, default=512, show_default=True)
def main(folder: Path, sdist: Path | None, only: Sequence[str], max_tokens: int, samples: int, length: int) -> None:
    ggml = Ggml(folder, sdist)
    errors_and_speed(ggml, only)
    source = language_model()
    model, reference = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(source)
    with TemporaryDirectory() as temporary:
        text, heldout = texts.of_decoder(source, Path(temporary), samples, length)
        names = [name for name, _ in model.named_parameters() if ".layers." in name and name.endswith("_proj.weight")]
        known = importances(model, text, names)
        read = list(windows(heldout, tokenizer, _WINDOW, max_tokens))

        def judged(rounded: Rounding, name: str) -> Comparison:
            for path in names:
                w = reference.get_parameter(path).data
                model.get_parameter(path).data = rounded(name, w, known[path])
            return compare(reference, model, read)

        titles = (
            "KL llama.cpp, imatrix",
            "KL imatrix",
            "KL gptq",
            "same top token, llama.cpp",
            "same top token, gptq",
        )
        click.echo("\n| type | bits | " + " | ".join(titles) + " |")
        click.echo("|---" * (len(titles) + 2) + "|")
        for name in only:
            output = Path(temporary) / name
            spicerack.quantize(source, name, output=output, calibration=text, method="gptq")
            last = compare(reference, load(output, dtype=torch.float32), read)
            all_ = [judged(theirs(ggml), name), judged(ours, name), last]
            cells = [f"{one.kl_interval.mean:.5f}" for one in all_]
            cells += [f"{one.top1_agreement:.1%}" for one in (all_[0], last)]
            click.echo(f"| {name} | {TYPES[name].nbytes * 8 / TYPES[name].block:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
