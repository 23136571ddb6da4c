"""What `export` and `import` say of the folder or file that they wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spicerack.cli import _output
from spicerack.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.exports.export import Written


def show(written: Written, console: Console) -> None:
    """What was written, in a few lines."""
    from rich.markup import escape

    tensors = f"{counted(written.packed, 'quantized tensor')} and {counted(written.floats, 'other')}"
    console.print(
        f"[bold]{escape(str(written.output))}[/bold]: {tensors}, "
        f"{_output.size(written.nbytes)}, in {written.seconds:.1f} s",
        soft_wrap=True,
    )
    whose = "" if written.foreign or written.to == "spicerack" else " (the engine's own reader is not installed)"
    console.print(f"read back by {escape(written.verified_by)}{whose}: every weight is what it was meant to be")
    for one in written.rounded:
        console.print(
            f"[yellow]rounded again[/yellow] {counted(one.count, 'layer')} of {one.given} in {one.scheme}: the weights "
            f"changed by {one.error:.2%}, because {escape(one.rule)}",
            soft_wrap=True,
        )
    if written.added_kl is not None:
        console.print(f"which costs {written.added_kl:.4g} nats a token (KL from the folder that was exported)")
    for note in written.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True)
