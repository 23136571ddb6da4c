"""`spicerack eval OUT --against MODEL --text FILE`."""

from __future__ import annotations

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
@click.option("--window", type=click.IntRange(min=2), help="Tokens read together. Default: 512, or the model's longest.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after so many tokens.")
@click.option("--device", default="cpu", show_default=True, help="Where both models run: cpu, cuda ...")
@click.option("--trust-remote-code", is_flag=True, help="Run code that came with the model.")
@_output.json_option
def command(
    out: str,
    against: str,
    text: Path | None,
    window: int | None,
    max_tokens: int | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure what the quantized folder OUT lost against the model it was made from.

    Language models: perplexity, KL divergence and agreement of next-token predictions, on a text. Encoders: similarity of
    sentence embeddings. The reference computes in float32; OUT runs as it ships.

    \b
    spicerack eval out --against MODEL --text held-out.txt
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from spicerack.evaluate import measure

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_output.console(as_json=True), transient=True) as bar:
        tasks = {doing: bar.add_task(doing, total=1.0, visible=False) for doing in ("loading", "noise floor", "evaluating")}
        evaluation = measure(
            out,
            against=against,
            text=text,
            window=window,
            max_tokens=max_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=lambda doing, share: bar.update(tasks[doing], completed=share, visible=share < 1),
        )
    figures = evaluation.as_dict()
    if as_json:
        _output.emit(figures)
    elif evaluation.kind == "decoder":
        _decoder(figures, _output.console())
    else:
        _encoder(figures, _output.console())


def _decoder(figures: dict[str, Any], console: Console) -> None:
    ci = figures["kl_mean_ci95"]
    between = f"95 % interval {_short(ci[0])} to {_short(ci[1])}" if ci else "one window: no interval"
    _table(
        console,
        figures,
        f"{figures['tokens']:,} predicted tokens in {figures['windows']} windows of {figures['window']}",
        [
            ("perplexity", f"{figures['perplexity']:.4g}", f"reference {figures['perplexity_reference']:.4g}"),
            ("KL, mean", _short(figures["kl_mean"]), f"nats per token; {between}"),
            ("KL, 99.9 %", _short(figures["kl_p999"]), "one token in a thousand moved more than this"),
            ("KL, noise floor", _short(figures["kl_noise_floor"]), "the reference in bfloat16 against itself in float32"),
            ("same top token", f"{figures['top1_agreement']:.2%}", "as the reference"),
        ],
    )
    same = round(1000 * figures["top1_agreement"])
    change = figures["perplexity"] / figures["perplexity_reference"] - 1
    console.print(
        f"Of 1000 next-token choices, {same} are the same; perplexity is {_change(change)}; "
        f"the mean KL is {_times(figures['kl_mean'], figures['kl_noise_floor'])} a plain cast to bfloat16 costs."
    )


def _encoder(figures: dict[str, Any], console: Console) -> None:
    order = "all pairs are equally similar" if figures["spearman"] is None else f"{figures['spearman']:.5f}"
    _table(
        console,
        figures,
        f"{figures['sentences']:,} sentences, {figures['tokens']:,} tokens",
        [
            ("cosine, mean", f"{figures['cosine_mean']:.5f}", "between the two embeddings of one sentence"),
            ("cosine, least", f"{figures['cosine_min']:.5f}", "the sentence that moved most"),
            ("cosine, noise floor", f"{figures['cosine_noise_floor']:.5f}", "the reference in bfloat16 against float32"),
            ("Spearman", order, "order of all pairs by similarity; 1 is the same order"),
        ],
    )
    console.print(
        f"On average an embedding kept {figures['cosine_mean']:.2%} of its direction, at least {figures['cosine_min']:.2%}; "
        f"a plain cast to bfloat16 keeps {figures['cosine_noise_floor']:.2%}."
    )


def _table(console: Console, figures: dict[str, Any], title: str, rows: list[tuple[str, str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(figures['text'])}[/bold]: {title}; computed with {figures['compute']}")
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
    return f"{abs(ratio):.2%} {'higher' if ratio > 0 else 'lower'}"


def _times(value: float, floor: float) -> str:
    if value <= floor:
        return "no more than"
    return f"{value / floor:.2g} times what" if floor > 0 else "more than"
