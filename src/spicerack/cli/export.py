"""`spicerack export OUT --to gptq -o FOLDER`: the codes of a quantized folder, in what another engine reads.

What was written, who read it back, and, if anything was rounded again, what that cost.
"""

from __future__ import annotations

import click

from spicerack.cli import _output, _written
from spicerack.cli._commands import About

ABOUT = About(place=62, summary="Write a quantized model for another engine, with the same codes.")


@click.command()
@_output.model_argument
@click.option("--to", required=True, metavar="FORMAT", help="gptq, awq, mlx, gguf ...: what the engine reads.")
@click.option("-o", "--output", required=True, metavar="PATH", help="The file or folder to write.")
@click.option("--scheme", metavar="NAME", help="For a float model: what it is quantized in first, rounded to nearest.")
@click.option("--for", "for_", metavar="ENGINE", help="Only what it computes exactly: vllm, transformers ...")
@click.option("--requantize", is_flag=True, help="Round again what the format cannot hold, and say what that costs.")
@click.option("--text", metavar="FILE", help="With --requantize: what that cost is measured on.")
@click.option("--shard-gb", type=_output.Number(min=0.001), metavar="GB", help="The largest file. Default: 2 GB.")
@_output.json_option
def command(
    model: str,
    to: str,
    output: str,
    scheme: str | None,
    for_: str | None,
    requantize: bool,
    text: str | None,
    shard_gb: float | None,
    as_json: bool,
) -> None:
    """Write a quantized model for another engine, with the codes that it has.

    MODEL is a folder that was quantized here or by another tool, or a hub id; with --scheme a float model. Nothing is
    rounded again unless --requantize says so, and what was written is read back before it gets its name.

    \b
    spicerack export out --to gptq -o out-gptq
    """
    if text is not None and not requantize:
        raise click.UsageError("--text goes with --requantize")
    from spicerack.exports.export import export

    written = export(
        model, to=to, output=output, scheme=scheme, for_=for_, requantize=requantize, text=text,
        shard_bytes=None if shard_gb is None else int(shard_gb * 1e9),
    )  # fmt: skip
    if as_json:
        _output.emit(written.as_dict())
    else:
        _written.show(written, _output.console())
