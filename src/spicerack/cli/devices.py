"""`spicerack devices [NAME]`: the catalogue that `plan --fit` goes by, and a person's own devices.

What is not confirmed stands behind a "~".
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spicerack.cli import _output
from spicerack.cli._commands import About

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from spicerack.machine.catalogue import Device

ABOUT = About(place=16, summary="The devices that plan knows, and --add for your own.")
_COLUMNS = (
    ("GiB", "memory_gib", "memory"), ("usable", "usable_gib", "usable"), ("GB/s", "bandwidth_gb_s", "bandwidth"),
    ("fp16", "fp16_tflops", "fp16"), ("int8", "int8_tops", "int8"), ("W", "tdp_w", "tdp"),
)  # fmt: skip
"""Title, field, and what it is called among those that are not confirmed."""


@click.command()
@click.argument("name", required=False)
@click.option("--add", type=click.Path(path_type=Path), metavar="FILE", help="Add the devices of a JSON file.")
@_output.json_option
def command(name: str | None, add: Path | None, as_json: bool) -> None:
    """The devices that plan knows: memory, bandwidth, peaks of 10^12 operations a second, watts.

    NAME shows one with its sources. --add takes an object, or a list of them, with name, kind (gpu, soc, cpu, phone),
    memory_gib, usable_gib, bandwidth_gb_s and more as `devices NAME --json` prints them; what you add comes first.
    """
    from spicerack.machine import catalogue

    if add is not None:
        shown: tuple[Device, ...] = catalogue.add(add)
    else:
        shown = catalogue.everything() if name is None else tuple(dict.fromkeys(catalogue.find(name)))
    if as_json:
        _output.emit({"devices": [asdict(device) for device in shown]})
        return
    console = _output.console()
    if add is not None:
        console.print(f"added to {catalogue.own_file()}:", markup=False, soft_wrap=True)
    console.print(_table(shown))
    if name is not None:
        for device in shown:
            for title, text in (
                ("in", ", ".join(device.aliases)), ("link", device.link), ("computes with", device.arch),
                ("note", device.note), ("source", device.source),
            ):  # fmt: skip
                if text:
                    console.print(f"{title}: {text}", markup=False, soft_wrap=True)
    if any(device.uncertain for device in shown):
        console.print("~ not confirmed")


def _table(devices: Iterable[Device]) -> Table:
    """A line for each device."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("device", overflow="fold")
    for title, _, _ in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for device in devices:
        values = asdict(device)
        cells = (
            "" if values[field] is None else f"{'~' * (called in device.uncertain)}{values[field]:.5g}"
            for _, field, called in _COLUMNS
        )
        table.add_row(Text(device.name), *cells)
    return table
