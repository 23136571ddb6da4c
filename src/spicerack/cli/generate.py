"""`spicerack generate MODEL PROMPT`: the quickest look at what is left of a model.

Text appears as it is made. With --json it does not: the object has all of it, and the speed, at the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from spicerack.cli import _output
from spicerack.cli._commands import About

ABOUT = About(place=60, summary="Let a model continue a text.")


@click.command()
@_output.model_argument
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), help="How long the text gets. Default: 64, or the room left.")
@click.option("--temperature", type=_output.Number(0), default=0.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-p", type=_output.Number(0, 1, min_open=True), help="Sample of the likeliest so much in all.")
@click.option("--top-k", type=click.IntRange(1), help="Sample of the so many likeliest tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--raw", is_flag=True, help="Continue the prompt itself, without the tokenizer's chat template.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, mps ...")
@_output.engine_option
@_output.cache_option
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that came with the model.")
@_output.json_option
def command(model: str, prompt: str, as_json: bool, **given: Any) -> None:
    """Let a model continue a text.

    MODEL is a folder, quantized or not, or a hub id.

    \b
    spicerack generate out "def read_csv(path):"
    """
    from spicerack.models.opening import open_stored

    open_stored(model)  # what headers refuse is said before torch is there
    from spicerack.runtime.generate import GenerateOptions, generate

    def write(piece: str) -> None:
        """Text appears as it is written, and not at the end."""
        click.echo(piece, nl=False)

    result = generate(model, prompt, GenerateOptions(**given), write=None if as_json else write)
    if as_json:
        _output.emit(dataclasses.asdict(result))
