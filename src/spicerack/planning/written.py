"""A folder that `quantize` wrote, as a planner sees it: the float model of its ledger, in the bytes that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spicerack.errors import CheckpointError, UsageError
from spicerack.machine import catalogue
from spicerack.models.opening import open_model as open_folder
from spicerack.models.overview import source_of
from spicerack.planning import sensitivity
from spicerack.planning.engine import Request
from spicerack.planning.model import Model, of_checkpoint
from spicerack.planning.plan import Goal, check, context_of, default_engine, longest_context, row_of
from spicerack.planning.precisions import Precision
from spicerack.planning.sensitivity import Sensitivity
from spicerack.storage import ledger
from spicerack.storage.files import LEDGER

DEVICES = (
    "iPhone 16 Pro", "Snapdragon 8 Gen 3", "Raspberry Pi 5", "Laptop, LPDDR5-6400", "Apple M4", "RTX 3060 12GB",
    "RTX 3090", "2x RTX 3090", "RTX 4090", "A100 80GB SXM",
)  # fmt: skip
"""What people have, small ones first: phones, a board, laptops, cards."""
_UNITS = 1000
"""Parts of a model whose losses are shown."""


def open_written(folder: str | Path) -> tuple[Model, Precision]:
    """The model that a folder of ours was made from, and the numbers that it is in: headers and ledger are read.

    Raises CheckpointError for a folder without a ledger, or without a language model that is known.
    """
    checkpoint = open_folder(folder)
    written = ledger.read(checkpoint.folder)
    if written is None:
        raise CheckpointError(f"{checkpoint.folder} has no {LEDGER}", "give a folder that spicerack quantize wrote")
    model = of_checkpoint(str(folder), source_of(checkpoint, written))
    nbytes = {entry.tensor: entry.bytes_after for entry in written.entries}
    weights = [entry for entry in written.entries if entry.action == "quantize"]
    numbers = sum(entry.numel for entry in weights)
    bits = 8 * sum(entry.bytes_after for entry in weights) / numbers if numbers else 16.0

    def weigh(model: Model) -> list[int]:
        """As the ledger has it."""
        return [nbytes[weight.entry.name] * weight.count for weight in model.weights]

    return model, Precision(written.recipe or "as saved", bits, weigh)


def shown(folder: Path) -> dict[str, Any]:
    """What a page about a folder of ours takes from planning, as JSON has it: devices, of `on_devices`, None where the
    model is none that a planner knows; and sensitivity, None where no run with a budget left one.

    Raises CheckpointError where the latter is damaged.
    """
    known = sensitivity.read(folder)
    try:
        devices = on_devices(folder)
    except CheckpointError:
        devices = None
    return {"devices": devices, "sensitivity": shown_sensitivity(known)}


def shown_sensitivity(known: Sensitivity | None) -> dict[str, Any] | None:
    """The same without what only a further run needs, of the parts that lose most: a page has room for a thousand."""
    if known is None:
        return None
    fields = known.as_dict()
    units = [
        {
            "name": unit.name, "weights": unit.weights, "chosen": unit.chosen, "loss": unit.loss,
            "schemes": {name: {"nbytes": o.nbytes, "loss": o.loss} for name, o in unit.schemes.items()},
        }
        for unit in sorted(known.units, key=lambda unit: -unit.loss)
    ]  # fmt: skip
    left = max(len(units) - _UNITS, 0)
    kept = {name: fields[name] for name in ("metric", "budget", "curve", "rounds")}
    return {**kept, "units": units[:_UNITS], "units_left_out": left}


def on_devices(folder: str | Path) -> list[dict[str, Any]]:
    """Whether what a folder of ours holds would run on a handful of devices, as JSON has it, by the planner's answer.

    Of each: device, engine, context, fits, memory_bytes, spare_bytes, longest_context, tokens_per_s, and basis: what
    the speed follows from, or why there is none. Where an engine does not run the model there, `refused` says why in
    place of all that. Raises CheckpointError as `open_written` does.
    """
    model, precision = open_written(folder)
    return [_on(model, precision, name) for name in DEVICES]


def _on(model: Model, precision: Precision, name: str) -> dict[str, Any]:
    devices = catalogue.find(name)
    engine = default_engine(devices)
    goal = Goal(devices, engine, Request(context_of(model, None), 1, 16))
    about = {"device": name, "engine": engine.name, "context": goal.request.context}
    try:
        check(model, goal)
    except UsageError as error:
        return {**about, "refused": error.message}
    row = row_of(model, precision, goal)
    fits = row.placement.fits
    return {
        **about,
        "fits": fits,
        "memory_bytes": row.placement.total,
        "spare_bytes": row.placement.spare,
        "longest_context": longest_context(model, precision, goal) if fits and model.generates else None,
        "tokens_per_s": row.speed.decode if fits and row.speed else None,
        "basis": row.speed.basis if row.speed else row.speechless,
    }
