"""What one native call for an encoder gains, family by family: random models of the usual base size, w8.

The same packed model by one call and by its modules, and the float model beside both, taking turns in one process;
printed are medians in milliseconds, and times the modules and times torch's float32. Texts are 1 x 16 and 8 x 128
tokens without padding, images 1 and 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import click
import torch
import transformers
from transformers import PreTrainedModel

import spicerack
from benchmarks.runtime.encoder import FLOAT, MODULES, WHOLE, batch, turn
from spicerack.evaluation.turns import take_turns
from spicerack.nn.encoder.whole import obstacles

TEXTS = ("Bert", "MPNet", "NomicBert", "ModernBert")
IMAGES = ("ViT", "DeiT", "Dinov2", "CLIPVision", "SiglipVision")
"""Prefixes of transformers' classes, whose configs' defaults are the base size."""


def made(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")()
    model: PreTrainedModel = getattr(transformers, f"{family}Model")(config).eval()
    return model


def inputs(model: PreTrainedModel, family: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """What the model is asked for, and the name of the case."""
    if family in TEXTS:
        for rows, columns in ((1, 16), (8, 128)):
            yield f"{rows} x {columns}", batch(rows, columns)
        return
    size = model.config.image_size
    for count in (1, 8):
        pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
        yield f"{count} image{'s' * (count > 1)}", {"pixel_values": pixels}


@click.command(help=__doc__)
@click.option("--family", "families", multiple=True, default=(*TEXTS, *IMAGES), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@torch.no_grad()
def main(families: tuple[str, ...], rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    click.echo(f"{'family':14}{'':>10}{FLOAT:>16}{MODULES:>10}{WHOLE:>10}   times modules, times float")
    for family in families:
        original = made(family)
        packed: Any = spicerack.quantize(original, "w8", compute="int8")
        reasons = [reason for reason in obstacles(packed).values() if reason is not None]
        if reasons or not obstacles(packed):
            click.echo(f"{family}: {'; '.join(reasons) or 'no part is of a known family'}")
            continue
        for case, asked in inputs(original, family):
            works = {
                FLOAT: partial(original, **asked),
                MODULES: partial(type(packed).forward, packed, **asked),
                WHOLE: partial(packed, **asked),
            }
            samples = take_turns({name: turn(work) for name, work in works.items()}, rounds, lambda _: None)
            ms = {name: median(taken) for name, taken in samples.items()}
            beside = f"{ms[MODULES] / ms[WHOLE]:13.2f}{ms[FLOAT] / ms[WHOLE]:13.2f}"
            click.echo(f"{family:14}{case:>10}{ms[FLOAT]:16.2f}{ms[MODULES]:10.2f}{ms[WHOLE]:10.2f}{beside}")


if __name__ == "__main__":
    main()
