"""What calibration gains: KL of the project's language model at each scheme and method, on text held out from both.

Plain rounding (absmax), the least squared weight error (opt), and any chains of methods. The shipped folders are
computed in float32, so that bfloat16's own noise stays out. Prints Markdown tables as in docs/quality.md. About fifteen
minutes on two cores with --method rtn --method gptq.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from transformers import AutoTokenizer

import spicerack
from spicerack import calibration
from spicerack.demo import language_model
from spicerack.evaluation import measure
from spicerack.evaluation_lm import Comparison

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
@click.option("--max-tokens", type=int, default=24_576, show_default=True, help="Of the held-out text.")
@click.option("--samples", type=int, default=128, show_default=True)
@click.option("--length", type=int, default=512, show_default=True)
def main(
    only: Sequence[str], methods: Sequence[str], observers: Sequence[str], max_tokens: int, samples: int, length: int
) -> None:
    model = language_model()
    text = calibration.read(
        model / "calibration.txt", AutoTokenizer.from_pretrained(model), samples=samples, length=length, seed=0
    )
    click.echo(f"Calibrated with {text.ids.numel()} tokens.\n")
    columns = [(name, observer) for name in methods for observer in observers or (None,)]
    titles = (f"KL {name}" if observer is None else f"KL {name}, {observer}" for name, observer in columns)
    click.echo("| scheme | bits | " + " | ".join(titles) + " | same top token, the best |")
    click.echo("|---" * (len(columns) + 3) + "|")
    for scheme in only or SCHEMES:
        found: list[Comparison] = []
        bits = 0.0
        for name, observer in columns:
            with TemporaryDirectory() as work:
                folder = Path(work) / "out"
                options = DATA_FREE.get(name, {"method": name, "calibration": text, "observer": observer})
                bits = spicerack.quantize(model, scheme, output=folder, **options)["bits_per_weight"]
                figures = measure(folder, against=model, max_tokens=max_tokens, dtype=torch.float32).figures
                assert isinstance(figures, Comparison)
                found.append(figures)
        best = min(found, key=lambda figures: figures.mean).as_dict()["top1_agreement"]
        kls = " | ".join(f"{figures.mean:.5f}" for figures in found)
        click.echo(f"| {scheme} | {bits:.2f} | {kls} | {best:.1%} |")


if __name__ == "__main__":
    main()
