"""`spicerack bench OUT --against MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _output

if TYPE_CHECKING:
    from rich.console import Console

_LABELS = {
    "prefill_tokens_per_s": "prompt tokens/s",
    "decode_tokens_per_s": "new tokens/s",
    "items_per_s": "sentences/s",
}


@click.command()
@click.argument("out", metavar="OUT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that OUT was made from.")
@click.option("--prefill", type=click.IntRange(min=1), help="Prompt tokens. Default: 512, or what there is room for.")
@click.option("--decode", type=click.IntRange(min=1), default=64, show_default=True, help="New tokens, one by one.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Encoders: sentences at once.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of taking turns.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. Default: as torch chooses.")
@click.option("--device", default="cpu", show_default=True, help="Where the models run: cpu, cuda ...")
@click.option("--float32", is_flag=True, help="Also time the original in float32: bfloat16 is slow on many CPUs.")
@_output.engine_option
@_output.cache_option
@click.option("--trust-remote-code", is_flag=True, help="Run code that came with the model.")
@_output.json_option
def command(
    out: str,
    against: str,
    prefill: int | None,
    decode: int,
    batch: int,
    repeats: int,
    threads: int | None,
    device: str,
    float32: bool,
    engine: str | None,
    cache: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure what the quantized folder OUT gained: size on disk, bytes in memory, speed.

    Original and quantized take turns in one run; medians with the whole spread are shown.

    \b
    spicerack bench out --against MODEL
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from spicerack.evaluation.bench import bench

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_output.console(as_json=True), transient=True) as bar:
        task = bar.add_task("loading", total=1.0)
        result = bench(
            out,
            against=against,
            prefill=prefill,
            decode=decode,
            batch=batch,
            repeats=repeats,
            threads=threads,
            device=device,
            float32=float32,
            engine=engine,
            cache=cache,
            trust_remote_code=trust_remote_code,
            progress=lambda doing, share: bar.update(task, description=doing, completed=share),
        )
    if as_json:
        _output.emit(result)
    else:
        _print(result, _output.console())


def _print(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    rows = result["rows"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column()
    for row in rows:
        table.add_column(row["name"], justify="right")
    table.add_row("computed with", *(row["compute"] for row in rows))
    table.add_row("on disk", *(_output.size(row["bytes_on_disk"]) for row in rows))
    table.add_row("in memory", *(_output.size(row["resident_bytes"]) for row in rows))
    if "cache_bytes" in rows[0]:
        table.add_row("its cache", *(_output.size(row["cache_bytes"]) for row in rows))
    for key, label in _LABELS.items():
        if key in rows[0]:
            table.add_row(label, *(f"{row[key]:,.4g}" for row in rows))
            spread = (f"{row[key + '_min']:,.4g} to {row[key + '_max']:,.4g}" for row in rows)
            table.add_row("  least to most", *spread, style="dim")
    console.print(table)
    console.print(_setting(result))
    console.print(_meaning(result))


def _setting(result: dict[str, Any]) -> str:
    work = (
        f"a prompt of {result['prefill']} tokens, then {result['decode']} new ones"
        if "prefill" in result
        else f"{result['batch']} sentences of {result['length']} tokens at once"
    )
    where = f"{result['threads']} threads, {result['device']}"
    return f"[dim]{work}; median of {result['repeats']} turns; {where}[/dim]"


def _meaning(result: dict[str, Any]) -> str:
    """One plain sentence. Speeds whose spreads overlap around each other's medians are called equal."""
    original, quantized = result["rows"][:2]
    key, doing = ("decode_tokens_per_s", "generating") if "prefill" in result else ("items_per_s", "embedding")
    size = f"The quantized model is {original['bytes_on_disk'] / quantized['bytes_on_disk']:.2f} times smaller on disk"
    equal = all(a[f"{key}_min"] <= b[key] <= a[f"{key}_max"] for a, b in ((original, quantized), (quantized, original)))
    if equal:
        return f"{size}; at {doing} it is as fast as the original, within the spread."
    if result["speedup"] > 1:
        return f"{size}; at {doing} it is {result['speedup']:.2f} times as fast."
    slower = f"{size}; at {doing} it is slower: it takes {1 / result['speedup']:.2f} times as long"
    if quantized["compute"].startswith("reference"):
        return f"{slower}, because its weights are unpacked in torch for every call."
    return f"{slower}."
