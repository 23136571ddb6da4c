"""What calibration gains: KL of the project's language model at each scheme and method, on text held out from both.

Plain rounding (absmax), the least squared weight error (opt), the same weighted by what flows through (rtn with
--calib), and GPTQ. The shipped folders are computed in float32, so that bfloat16's own noise stays out. Prints the
Markdown table of docs/quality.md. About fifteen minutes on two cores.
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
METHODS: dict[str, dict[str, Any]] = {
    "absmax": {"range_": "absmax"},
    "opt": {"range_": "opt"},
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
}
CALIBRATED = ("rtn", "gptq")


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="Schemes; default: all.")
@click.option("--max-tokens", type=int, default=24_576, show_default=True, help="Of the held-out text.")
@click.option("--samples", type=int, default=128, show_default=True)
@click.option("--length", type=int, default=512, show_default=True)
def main(only: Sequence[str], max_tokens: int, samples: int, length: int) -> None:
    model = language_model()
    text = calibration.read(
        model / "calibration.txt", AutoTokenizer.from_pretrained(model), samples=samples, length=length, seed=0
    )
    click.echo(f"Calibrated with {text.ids.numel()} tokens.\n")
    click.echo(
        "| scheme | bits | " + " | ".join(f"KL {name}" for name in METHODS) + " | gptq / absmax | same top token |"
    )
    click.echo("|---" * (len(METHODS) + 4) + "|")
    for scheme in only or SCHEMES:
        found: dict[str, Comparison] = {}
        bits = 0.0
        for name, options in METHODS.items():
            with TemporaryDirectory() as work:
                folder = Path(work) / "out"
                given = text if name in CALIBRATED else None
                made = spicerack.quantize(model, scheme, output=folder, calibration=given, **options)
                bits = made["bits_per_weight"]
                figures = measure(folder, against=model, max_tokens=max_tokens, dtype=torch.float32).figures
                assert isinstance(figures, Comparison)
                found[name] = figures
        ratio = found["gptq"].mean / found["absmax"].mean
        kls = " | ".join(f"{figures.mean:.5f}" for figures in found.values())
        agreement = found["gptq"].as_dict()["top1_agreement"]
        click.echo(f"| {scheme} | {bits:.2f} | {kls} | {ratio:.2f} | {agreement:.1%} |")


if __name__ == "__main__":
    main()
