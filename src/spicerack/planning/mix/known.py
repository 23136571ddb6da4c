"""What every unit loses in every scheme: measured once for a model and a text, and taken over by later runs.

Estimates depend on model, text, method and schemes, and not on the budget. They are looked for in the folders beside
the output, each of which has its own `sensitivity.json`; a file of somebody else's is passed over.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spicerack.errors import CheckpointError, counted
from spicerack.models.blocks.find import find
from spicerack.planning import sensitivity
from spicerack.planning.mix.estimate import Losses, estimate
from spicerack.planning.mix.fisher import TOKENS, Fisher, fisher
from spicerack.planning.mix.order import Prepared, estimated
from spicerack.planning.sensitivity import Sensitivity
from spicerack.quantization.calibration.chunks import Text
from spicerack.quantization.calibration.targets import tensors_of
from spicerack.quantization.rotation import original
from spicerack.quantization.stream import plan
from spicerack.quantization.watch import Watch
from spicerack.runtime.load import load_apart
from spicerack.storage.durable import json_bytes, read_json, write_atomically

_SIBLINGS = 1000
"""Folders beside the output that are looked into for estimates."""

Tell = Callable[[str], None]
"""Called with a sentence on what is done."""


def known(prepared: Prepared, identity: Mapping[str, Any], workshop: Path, watch: Watch, tell: Tell) -> Sensitivity:
    """Estimates of all units: those of a folder beside the output, or made now."""
    wanted = _facts(estimated(prepared, {}))
    for folder in (workshop, *_beside(prepared.order.output)):
        try:
            there = sensitivity.read(folder)
        except CheckpointError:  # somebody else's, or damaged: it is made anew
            continue
        if there is not None and dict(there.identity) == dict(identity) and _facts(there) == wanted:
            tell(f"sensitivity is that of {folder}" if folder != workshop else "sensitivity is known already")
            return _estimates(there)
    losses = _measured(prepared, workshop, watch, tell)
    found = estimated(prepared, losses)
    found.write(workshop)
    return found


def _facts(there: Sensitivity) -> list[Any]:
    """What does not depend on what was measured; a file that says otherwise is of something else."""
    return [there.metric, there.fixed_bytes] + [
        (unit.name, unit.tensors, unit.weights, [(name, o.nbytes, o.bits) for name, o in unit.schemes.items()])
        for unit in there.units
    ]


def _beside(output: Path) -> Iterator[Path]:
    """Folders beside the output that have estimates."""
    parent = output.absolute().parent
    names = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())[:_SIBLINGS] if parent.is_dir() else []
    return (parent / name for name in names)


def _estimates(there: Sensitivity) -> Sensitivity:
    """What a pass found, without what a budget made of it."""
    found = tuple(
        dataclasses.replace(unit, chosen="", schemes={
            name: dataclasses.replace(option, loss=option.estimate) for name, option in unit.schemes.items()
        })
        for unit in there.units
    )  # fmt: skip
    return dataclasses.replace(there, units=found, budget=None, curve=(), rounds=())


def _measured(prepared: Prepared, workshop: Path, watch: Watch, tell: Tell) -> Losses:
    """One pass for what the output minds, and one for what codes lose."""
    order, listing = prepared.order, prepared.listing
    model, experts = load_apart(original(listing.source))
    stack = find(model)
    tensors = tensors_of(stack, experts, listing)
    folder = workshop / "estimates"
    folder.mkdir(exist_ok=True)
    device = order.means.device
    minds = _read_fishers(folder)
    if minds is None:
        tell(f"one pass backwards through the float model, {TOKENS:,} tokens")
        minds = fisher(
            stack, tensors, prepared.text, folder, device, prepared.judge.pooling, lambda _what, _share: None
        )
        _write_fishers(folder, minds)
    count = max(len(unit.schemes) for unit in prepared.choices.units)
    units = counted(len(prepared.choices.units), "unit")
    tell(f"losses of {units} in up to {counted(count, 'scheme')}: each is solved for every layer")
    text = Text(prepared.text, plan(listing, prepared.text, order.means.memory).sequences)
    losses = estimate(
        listing, stack, tensors, prepared.choices.units, minds, text, folder, device, order.means.workers, watch
    )
    shutil.rmtree(folder)
    return losses


def _write_fishers(folder: Path, minds: list[Fisher]) -> None:
    record = [{path: values.tolist() for path, values in block.items()} for block in minds]
    write_atomically(folder / "fisher.json", json_bytes(record))


def _read_fishers(folder: Path) -> list[Fisher] | None:
    record = read_json(folder / "fisher.json")
    if record is None:
        return None
    return [
        {path: torch.tensor(values, dtype=torch.float32, device="cpu") for path, values in block.items()}
        for block in record
    ]
