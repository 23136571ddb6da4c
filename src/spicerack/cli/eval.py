"""`spicerack eval OUT --against MODEL --text FILE`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _output

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("out", metavar="OUT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that OUT was made from.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to evaluate on; for encoders one sentence a line.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens read together. Default: 512, or the most.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after so many tokens.")
@click.option("--device", default="cpu", show_default=True, help="Where both models run: cpu, cuda ...")
@_output.engine_option
@_output.cache_option
@click.option("--trust-remote-code", is_flag=True, help="Run code that came with the model.")
@_output.json_option
def command(
    out: str,
    against: str,
    text: Path | None,
    window: int | None,
    max_tokens: int | None,
    device: str,
    engine: str | None,
    cache: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure what the quantized folder OUT lost against the model it was made from.

    Language models: perplexity, KL divergence and agreement of next-token predictions, on a text. Encoders: similarity
    of sentence embeddings. The reference computes in float32; OUT runs as it ships.

    \b
    spicerack eval out --against MODEL --text held-out.txt
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from spicerack.evaluation.evaluate import measure

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_output.console(as_json=True), transient=True) as bar:
        task = bar.add_task("loading", total=1.0)
        evaluation = measure(
            out,
            against=against,
            text=text,
            window=window,
            max_tokens=max_tokens,
            device=device,
            engine=engine,
            cache=cache,
            trust_remote_code=trust_remote_code,
            progress=lambda doing, share: bar.update(task, description=doing, completed=share),
        )
    figures = evaluation.as_dict()
    if as_json:
        _output.emit(figures)
    elif evaluation.kind == "decoder":
        _decoder(figures, _output.console())
    else:
        _encoder(figures, _output.console())


def _decoder(figures: dict[str, Any], console: Console) -> None:
    kl, floor = figures["kl_mean"], figures["kl_noise_floor"]
    ci = figures["kl_mean_ci95"]
    between = f"95 % interval {_short(ci[0])} to {_short(ci[1])}" if ci else "one window: no interval"
    rows = [
        ("perplexity", f"{figures['perplexity']:.4g}", f"reference {figures['perplexity_reference']:.4g}"),
        ("same top token", f"{figures['top1_agreement']:.2%}", "as the reference"),
        ("KL, mean", _short(kl), f"nats per token; {between}"),
        ("KL, 99.9 %", _short(figures["kl_p999"]), "one token in a thousand moved more"),
        ("KL, noise floor", _short(floor), "the reference cast to bfloat16"),
    ]
    title = f"{figures['tokens']:,} predicted tokens in {figures['windows']} windows of {figures['window']}"
    _table(console, figures, title, rows)
    same = round(1000 * figures["top1_agreement"])
    change = figures["perplexity"] / figures["perplexity_reference"] - 1
    times = "no more than" if kl <= floor or not floor else _times(kl / floor)
    console.print(
        f"Of 1000 next-token choices, {same} are the same; perplexity is {_change(change)}; "
        f"the mean KL is {times} that of a cast to bfloat16."
    )


def _encoder(figures: dict[str, Any], console: Console) -> None:
    mean, least, floor = (figures[key] for key in ("cosine_mean", "cosine_min", "cosine_noise_floor"))
    rank = figures["spearman"]
    rows = [
        ("cosine, mean", f"{mean:.5f}", "between the two embeddings of a sentence"),
        ("cosine, least", f"{least:.5f}", "the sentence that moved most"),
        ("cosine, noise floor", f"{floor:.5f}", "the reference cast to bfloat16"),
        ("Spearman", "-" if rank is None else f"{rank:.5f}", "do all pairs rank alike in similarity?"),
    ]
    _table(console, figures, f"{figures['sentences']:,} sentences, {figures['tokens']:,} tokens", rows)
    console.print(
        f"An embedding turned by about {_angle(mean)}, the worst by {_angle(least)}; "
        f"a cast to bfloat16 turns it by about {_angle(floor)}."
    )


def _table(console: Console, figures: dict[str, Any], title: str, rows: list[tuple[str, str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    cache = f", cache of {figures['cache']} bits" if "cache" in figures else ""
    console.print(f"[bold]{escape(figures['text'])}[/bold]: {title}; computed with {figures['compute']}{cache}")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _short(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def _change(ratio: float) -> str:
    if abs(ratio) < 5e-5:
        return "unchanged"
    if ratio >= 1:
        return f"{ratio + 1:.3g} times as high"
    return f"{abs(ratio):.2%} {'higher' if ratio > 0 else 'lower'}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def _angle(cosine: float) -> str:
    return f"{math.degrees(math.acos(min(cosine, 1.0))):.1f} degrees"
