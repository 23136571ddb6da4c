"""What each scheme costs in quality, with `--range absmax` and `--range opt`, on the project's two real models.

Language model: mean KL in nats per token on its held-out text, of the shipped folders, computed in float32 so that
bfloat16's own noise stays out; then opt minus absmax with its 95 % interval, paired over the windows of the text: below
zero, opt is better. Encoder: cosine of embeddings of the built-in sentences. Prints the Markdown tables of
docs/quantization/quality.md. Takes about ten minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

import spicerack
from spicerack.evaluation.encoder import EncoderComparison
from spicerack.evaluation.evaluate import Evaluation, EvaluationOptions, measure
from spicerack.evaluation.language import Comparison, paired_difference
from spicerack.models.bundled import encoder, language_model
from spicerack.numerics.search import Range

SCHEMES = ("w8", "w8a8", "w4g128", "w4g64", "w4g32", "w4g32z", "w3g64", "w2g32", "w2g32z", "w2g32h", "nf4", "ternary")
ENCODER_SCHEMES = ("w8", "w8a8", "w4g128", "w4g32", "w4g32z", "w3g32z", "w2g32h")
RANGES: tuple[Range, ...] = ("absmax", "opt")


@click.command(help=__doc__)
@click.option("--max-tokens", type=int, default=24_576, show_default=True, help="Of the held-out text.")
def main(max_tokens: int) -> None:
    with TemporaryDirectory() as temporary:
        language(Path(temporary), max_tokens)
        encoders(Path(temporary))


def language(work: Path, max_tokens: int) -> None:
    click.echo("| scheme | bits | KL absmax | KL opt | opt - absmax, 95 % | same top token | perplexity |")
    click.echo("|---|---|---|---|---|---|---|")
    floor = perplexity = 0.0
    options = EvaluationOptions(max_tokens=max_tokens, dtype=torch.float32)
    for scheme in SCHEMES:
        found: dict[Range, Comparison] = {}
        for range_ in RANGES:
            folder = work / f"lm-{scheme}-{range_}"
            bits = spicerack.quantize(language_model(), scheme, output=folder, range_=range_)["bits_per_weight"]
            evaluation = measure(folder, against=language_model(), options=options)
            assert isinstance(evaluation.figures, Comparison)
            found[range_] = evaluation.figures
            floor = evaluation.noise_floor
        gain = paired_difference(found["opt"], found["absmax"])
        figures = found["opt"].as_dict()
        perplexity = figures["perplexity_reference"]
        click.echo(
            f"| {scheme} | {bits:.2f} | {found['absmax'].mean:.5f} | {found['opt'].mean:.5f} "
            f"| {gain.mean:+.5f} ({gain.lo:+.5f} to {gain.hi:+.5f}) "
            f"| {figures['top1_agreement']:.1%} | {figures['perplexity']:.2f} |"
        )
    click.echo(
        f"\nNoise floor (the float model computed in bfloat16): KL {floor:.5f}. Float perplexity: {perplexity:.2f}.\n"
    )


def encoders(work: Path) -> None:
    click.echo("| scheme | bits | cosine mean absmax | opt | cosine least absmax | opt | Spearman of pairs, opt |")
    click.echo("|---|---|---|---|---|---|---|")
    evaluation: Evaluation | None = None
    for scheme in ENCODER_SCHEMES:
        found: dict[Range, EncoderComparison] = {}
        for range_ in RANGES:
            folder = work / f"encoder-{scheme}-{range_}"
            bits = spicerack.quantize(encoder(), scheme, output=folder, range_=range_)["bits_per_weight"]
            evaluation = measure(folder, against=encoder())
            assert isinstance(evaluation.figures, EncoderComparison)
            found[range_] = evaluation.figures
        absmax, opt = (found[range_] for range_ in RANGES)
        click.echo(
            f"| {scheme} | {bits:.2f} | {absmax.mean:.5f} | {opt.mean:.5f} "
            f"| {float(absmax.cosine.min()):.4f} | {float(opt.cosine.min()):.4f} | {opt.spearman:.4f} |"
        )
    assert evaluation is not None
    click.echo(f"\nNoise floor (the float model computed in bfloat16): cosine {evaluation.noise_floor:.5f}.")


if __name__ == "__main__":
    main()
