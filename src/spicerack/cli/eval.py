"""`spicerack eval OUT --against MODEL --text FILE`.

People get a table whose every figure has something beside it to compare it with, and one sentence that says what the
figures mean; programs get all of them by --json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _loss, _output
from spicerack.cli._commands import About
from spicerack.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.evaluation.encoder import EncoderComparison
    from spicerack.evaluation.evaluate import Evaluation
    from spicerack.evaluation.language import Comparison

ABOUT = About(place=40, summary="What the smaller model lost.")


@click.command()
@click.argument("out", metavar="OUT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that OUT was made from.")
@click.option("--text", metavar="TEXT", help="File, JSON lines, folder or dataset; for encoders one sentence a line.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens read together. Default: 512, or the most.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after so many tokens.")
@click.option("--device", default="cpu", show_default=True, help="Where both models run: cpu, cuda ...")
@_output.engine_option
@_output.cache_option
@click.option("--trust-remote-code", is_flag=True, help="Run code that came with the model.")
@_output.json_option
def command(out: str, against: str, as_json: bool, **given: Any) -> None:
    """Measure what the quantized folder OUT lost against the model it was made from.

    Language models: perplexity, KL divergence and agreement of next-token predictions, on a text. Encoders: similarity
    of sentence embeddings. The reference computes in float32; OUT runs as it ships.

    \b
    spicerack eval out --against MODEL --text held-out.txt
    """
    from spicerack.models.overview import check_sides

    check_sides(out, against, "eval")  # before torch is there
    from spicerack.evaluation.evaluate import EvaluationOptions, measure
    from spicerack.evaluation.language import Comparison
    from spicerack.evaluation.report import lens
    from spicerack.storage import records
    from spicerack.storage.files import locate

    with _output.measuring() as progress:
        evaluation = measure(out, against=against, options=EvaluationOptions(**given), examples=True, progress=progress)
    figures, folder = evaluation.figures, locate(out)
    lens.keep(folder, locate(against))
    shown = {"kernels": list(map(list, evaluation.kernels)), "examples": list(evaluation.examples)}
    records.keep(folder, "eval", evaluation.as_dict(), against=against, **shown)
    if as_json:
        _output.emit(evaluation.as_dict())
    elif isinstance(figures, Comparison):
        _decoder(evaluation, figures, _output.console())
    else:
        _encoder(evaluation, figures, _output.console())


def _decoder(evaluation: Evaluation, figures: Comparison, console: Console) -> None:
    """A table of a language model's figures, each with what it is measured against, and one sentence on what they mean.

    The sentence speaks of 1000 choices, because a share of 99.3 % sounds like none were changed; and of the mean KL as
    a multiple of what a cast to bfloat16 costs, which everybody accepts.
    """
    kl, floor = figures.kl_interval, evaluation.noise_floor
    if kl.lo is None or kl.hi is None:
        between = "one window: no interval"
    else:
        between = f"95 % interval {_loss.short(kl.lo)} to {_loss.short(kl.hi)}"
    rows = [
        ("perplexity", f"{figures.perplexity:.4g}", f"reference {figures.perplexity_reference:.4g}"),
        ("same top token", f"{figures.top1_agreement:.2%}", "as the reference"),
        ("KL, mean", _loss.short(kl.mean), f"nats per token; {between}"),
        ("KL, 99.9 %", _loss.short(figures.kl_p999), "one token in a thousand moved more"),
        ("KL, noise floor", "-" if floor is None else _loss.short(floor), "the reference cast to bfloat16"),
    ]
    count = len(figures.kl)
    title = f"{counted(figures.tokens, 'predicted token')} in {counted(count, 'window')} of {figures.window}"
    _table(console, evaluation, title, rows)
    same = round(1000 * figures.top1_agreement)
    change = figures.perplexity / figures.perplexity_reference - 1
    sentence = f"Of 1000 next-token choices, {same} are the same; perplexity is {_loss.change(change)}"
    if floor is None:
        console.print(f"{sentence}.")
        return
    console.print(f"{sentence}; the mean KL is {_loss.beside_cast(kl.mean, floor)} that of a cast to bfloat16.")


def _encoder(evaluation: Evaluation, figures: EncoderComparison, console: Console) -> None:
    """A table of an encoder's figures, and one sentence that says by how many degrees embeddings turned.

    Cosines near 1 all look alike, and angles do not: .9994 is 2 degrees and .9973 is 4.2.
    """
    rank, floor = figures.spearman, evaluation.noise_floor
    rows = [
        ("cosine, mean", f"{figures.mean:.5f}", "between the two embeddings of a sentence"),
        ("cosine, least", f"{figures.least:.5f}", "the sentence that moved most"),
        ("cosine, noise floor", "-" if floor is None else f"{floor:.5f}", "the reference cast to bfloat16"),
        ("Spearman", "-" if rank is None else f"{rank:.5f}", "do all pairs rank alike in similarity?"),
    ]
    _table(console, evaluation, f"{counted(len(figures.cosine), 'sentence')}, {counted(figures.tokens, 'token')}", rows)
    cast = "" if floor is None else f"; a cast to bfloat16 turns it by about {_loss.angle(floor)}"
    console.print(
        f"An embedding turned by about {_loss.angle(figures.mean)}, the worst by {_loss.angle(figures.least)}{cast}."
    )


def _table(console: Console, evaluation: Evaluation, title: str, rows: list[tuple[str, str, str]]) -> None:
    """What was measured, on what and with what; then name, figure and explanation of each row.

    title: how much was read. rows: name, figure, and what stands beside it to compare it with.
    """
    from rich.markup import escape
    from rich.table import Table

    cache = "" if evaluation.cache is None else f", cache of {evaluation.cache} bits"
    console.print(f"[bold]{escape(evaluation.text)}[/bold]: {title}; computed with {evaluation.compute}{cache}")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    console.print(table)
