"""What calibration gains: KL of a decoder at each scheme and method, on text held out from both.

Plain rounding (absmax), the least squared weight error (opt), and any chains of methods. The shipped folders are
computed in float32, so that bfloat16's own noise stays out. Prints Markdown tables as in docs/quantization/quality.md.
About fifteen minutes on two cores with --method rtn --method gptq. A --model without texts of its own is calibrated
with what it writes itself, and judged on what it writes with another seed. With --encoder it is all-MiniLM-L6-v2:
cosines of its embeddings of the built-in sentences, mean and least, calibrated with the lines of the language model's
text.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

import spicerack
from benchmarks.harness import texts
from spicerack.evaluation.encoder import EncoderComparison
from spicerack.evaluation.evaluate import EvaluationOptions, measure
from spicerack.evaluation.language import Comparison
from spicerack.models.bundled import encoder as minilm
from spicerack.models.bundled import language_model
from spicerack.quantization.recipe import skip

SCHEMES = ("w8", "w8a8", "w4g128", "w4g64", "w4g32z", "w3g64", "w2g32", "w2g32z", "w2g32h", "ternary")
DATA_FREE: dict[str, dict[str, Any]] = {
    "absmax": {"range_": "absmax"},
    "opt": {"range_": "opt"},
    "hqq": {"method": "hqq"},
    "hadamard": {"method": "hadamard"},
}


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="Schemes; default: all.")
@click.option(
    "--method", "methods", multiple=True, default=("absmax", "opt", "rtn", "gptq"), show_default=True,
    help="absmax and opt: the range methods of plain rounding; else a chain, with calibration text.",
)  # fmt: skip
@click.option(
    "--observer", "observers", multiple=True, help="Of static activations (a8s): each chain with each of these."
)
@click.option("--model", type=click.Path(path_type=Path), help="A decoder's folder; default: the project's own.")
@click.option("--encoder", is_flag=True, help="all-MiniLM-L6-v2 instead.")
@click.option("--skip", "skipped", multiple=True, help="Layers that stay in float, as for `spicerack quantize`.")
@click.option("--max-tokens", type=int, default=24_576, show_default=True, help="Of the held-out text.")
@click.option("--samples", type=int, default=128, show_default=True)
@click.option("--length", type=int, default=512, show_default=True)
def main(
    only: Sequence[str],
    methods: Sequence[str],
    observers: Sequence[str],
    model: Path | None,
    encoder: bool,
    skipped: Sequence[str],
    max_tokens: int,
    samples: int,
    length: int,
) -> None:
    source = minilm() if encoder else model or language_model()
    what = "cosine" if encoder else "KL"
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        heldout = None
        if encoder:
            text = texts.of_encoder(source, samples, length)
        else:
            text, heldout = texts.of_decoder(source, work, samples, length)
        click.echo(f"Calibrated with {text.ids.numel()} tokens.\n")
        columns = [(name, observer) for name in methods for observer in observers or (None,)]
        titles = [f"{what} {name}" if observer is None else f"{what} {name}, {observer}" for name, observer in columns]
        last = [] if encoder else ["same top token, the best"]
        click.echo("| " + " | ".join(["scheme", "bits", *titles, *last]) + " |")
        click.echo("|---" * (len(columns) + 2 + len(last)) + "|")
        for scheme in only or SCHEMES:
            cells: list[str] = []
            best: Comparison | None = None
            bits = 0.0
            for name, observer in columns:
                folder = work / f"{scheme}-{name}-{observer}"
                options = DATA_FREE.get(name, {"method": name, "calibration": text, "observer": observer})
                made = spicerack.quantize(source, scheme, output=folder, rules=map(skip, skipped), **options)
                bits = made["bits_per_weight"]
                dtype = None if encoder else torch.float32
                conditions = EvaluationOptions(text=heldout, max_tokens=max_tokens, dtype=dtype)
                figures = measure(folder, against=source, options=conditions).figures
                if isinstance(figures, EncoderComparison):
                    cells.append(f"{figures.mean:.5f}, {float(figures.cosine.min()):.4f}")
                else:
                    cells.append(f"{figures.mean:.5f}")
                    best = figures if best is None or figures.mean < best.mean else best
                shutil.rmtree(folder)
            last = [] if best is None else [f"{best.as_dict()['top1_agreement']:.1%}"]
            click.echo("| " + " | ".join([scheme, f"{bits:.2f}", *cells, *last]) + " |")


if __name__ == "__main__":
    main()
