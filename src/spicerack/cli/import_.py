"""`spicerack import MODEL -o FOLDER`: what another tool quantized, as a folder of ours, with the codes that it has."""

from __future__ import annotations

import click

from spicerack.cli import _output, _written
from spicerack.cli._commands import About

ABOUT = About(place=63, summary="Make a folder of what another tool quantized, with the same codes.")


@click.command(name="import")
@_output.model_argument
@click.option("-o", "--output", required=True, metavar="FOLDER", help="The folder to write.")
@click.option("--shard-gb", type=_output.Number(min=0.001), metavar="GB", help="The largest file. Default: 2 GB.")
@_output.json_option
def command(model: str, output: str, shard_gb: float | None, as_json: bool) -> None:
    """Make a folder of what another tool quantized, with the same codes.

    MODEL is a file or folder of GGUF, GPTQ, AWQ, MLX, bitnet or compressed-tensors, a release in FP8 with a scale for
    each row or tensor, or a hub id. All commands read these as they are, too; a folder of ours opens faster, and says
    what became of every tensor.

    \b
    spicerack import model-gptq -o model
    """
    from spicerack.exports.export import import_model

    written = import_model(model, output=output, shard_bytes=None if shard_gb is None else int(shard_gb * 1e9))
    if as_json:
        _output.emit(written.as_dict())
    else:
        _written.show(written, _output.console())
