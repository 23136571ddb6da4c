"""A model that is quantized, as a planner sees it: the float model that it stands for, in the bytes that are there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from spicerack.errors import CheckpointError, UsageError
from spicerack.evaluation import figures
from spicerack.machine import catalogue
from spicerack.models.opening import open_model as open_folder
from spicerack.models.overview import quantized_with, source_of
from spicerack.planning import engine as engines
from spicerack.planning import sensitivity
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model, of_checkpoint, open_model
from spicerack.planning.plan import Goal, check, context_of, default_engine, longest_context, row_of
from spicerack.planning.precisions import Lost, Precision
from spicerack.planning.sensitivity import Sensitivity
from spicerack.storage import engine as stored_engines
from spicerack.storage import ledger, records
from spicerack.storage.files import CONFIG, LEDGER, MAX_CONFIG_BYTES, read_json
from spicerack.storage.ledger import Ledger
from spicerack.storage.reader import Checkpoint

DEVICES = (
    "iPhone 16 Pro", "Snapdragon 8 Gen 3", "Raspberry Pi 5", "Laptop, LPDDR5-6400", "Apple M4", "RTX 3060 12GB",
    "RTX 3090", "2x RTX 3090", "RTX 4090", "A100 80GB SXM",
)  # fmt: skip
"""What people have, small ones first: phones, a board, laptops, cards."""
_OURS = "spicerack"
_NAMED = 3
"""Schemes that a folder is called by."""
_UNITS = 1000
"""Parts of a model whose losses are shown."""


def open_any(source: str | Path) -> tuple[Model, Precision | None]:
    """A float model as `open_model` has it, with None; or one that is quantized, as `open_written` has it.

    Raises CheckpointError as they do.
    """
    if Path(source).suffix == ".json" and Path(source).is_file():
        return open_model(source), None
    checkpoint = open_folder(source)
    if (checkpoint.folder / LEDGER).is_file() or quantized_with(checkpoint.config) is not None:
        return open_written(source)
    return open_model(source), None


def open_written(folder: str | Path) -> tuple[Model, Precision]:
    """The float model that a quantized folder or GGUF file stands for, and the numbers that it is in. Headers are read,
    and the ledger of a folder of ours.

    Raises CheckpointError for one that holds floats alone, no language model that is known, or damaged records of what
    it lost.
    """
    checkpoint = open_folder(folder)
    written = ledger.read(checkpoint.folder) if (checkpoint.folder / LEDGER).is_file() else None
    if written is None:
        return _open_stored(folder)
    model = of_checkpoint(str(folder), source_of(checkpoint, written))
    nbytes = {entry.tensor: entry.bytes_after for entry in written.entries}
    weights = [entry for entry in written.entries if entry.action == "quantize"]
    numbers = sum(entry.numel for entry in weights)
    bits = 8 * sum(entry.bytes_after for entry in weights) / numbers if numbers else 16.0
    stored, measured = _stored_as(checkpoint), lost(checkpoint.folder, written)
    name = _named(entry.scheme or "" for entry in weights) or "as saved"
    return model, Precision(name, bits, partial(_weigh, nbytes), stored=stored, lost=measured)


def _open_stored(folder: str | Path) -> tuple[Model, Precision]:
    """The same of what others wrote, by what lies in it."""
    from spicerack.runtime.folder import Folder  # whose formats need torch

    opened = Folder.open(folder)
    if opened.format is None:
        raise CheckpointError(f"{folder} has no {LEDGER}, and nothing in it is quantized", "give a quantized folder")
    tensors = opened.checkpoint.tensors
    nbytes = {name: info.nbytes for name, info in opened.float_headers().items()}
    packed = {
        f"{module}.weight": sum(tensors[name].nbytes for name in names) for module, names in opened.layouts().items()
    }
    numbers = sum(math.prod(stored.shape) for stored in opened.contents.values())
    bits = 8 * sum(packed.values()) / numbers if numbers else 16.0
    name = _named(stored.scheme.name for stored in opened.contents.values())
    model = of_checkpoint(str(folder), opened.described(opened.contents))
    to = opened.format.name.replace("_", "-")
    return model, Precision(name, bits, partial(_weigh, nbytes | packed), stored=to)


def _named(schemes: Iterable[str]) -> str:
    """What a folder is called by: the schemes of its layers, those that most have first."""
    counted = [name for name, _count in Counter(schemes).most_common()]
    return ", ".join(counted[:_NAMED]) + (" ..." if len(counted) > _NAMED else "")


def _weigh(nbytes: Mapping[str, int], model: Model) -> list[int]:
    """Of each weight of a model what is stored of it."""
    return [nbytes[weight.entry.name] * weight.count for weight in model.weights]


def _stored_as(checkpoint: Checkpoint) -> str:
    """What `export --to` calls the format of a folder of ours."""
    from spicerack.storage import format as formats

    fmt = formats.of_folder(checkpoint)
    return "" if fmt is None else fmt.name.replace("_", "-")


def lost(folder: Path, written: Ledger) -> Lost | None:
    """What was measured of a folder of ours, by whoever did it last: `eval`, the check behind `quantize`, or the
    rounds of a run with a budget; None where nobody did. written: its ledger.

    An evaluation through a quantized cache is left out: it is of more than the weights. Raises CheckpointError for
    records that are damaged, by the file's name.
    """
    record = records.read(folder, "eval")
    if record is not None and "cache" not in record["result"]:
        return _of_figures(folder / "eval.json", record["result"], "spicerack eval")
    if written.check is not None:
        return _of_figures(folder / LEDGER, written.check, "the check behind quantize")
    return None if written.budget is None else _of_budget(folder / LEDGER, written.budget)


def _of_figures(path: Path, measured: Mapping[str, Any], by: str) -> Lost:
    """Of an evaluation."""
    if (reason := figures.obstacle(measured)) is not None:
        raise CheckpointError(f"{path} is damaged: {reason}", "remove it, and run spicerack eval again")
    if "kl_mean" in measured:
        ends = measured["kl_mean_ci95"]
        return Lost("kl", measured["kl_mean"], ends and (ends[0], ends[1]), measured["tokens"], measured["text"], by)
    ends = measured.get("cosine_mean_ci95")
    turned = ends and (1 - ends[1], 1 - ends[0])
    return Lost("cosine", 1 - measured["cosine_mean"], turned, measured["tokens"], measured["text"], by)


def _of_budget(path: Path, budget: Mapping[str, Any]) -> Lost | None:
    """Of the last round, which is the folder's."""
    rounds = budget.get("rounds")
    last = rounds[-1] if isinstance(rounds, list) and rounds else None
    wanted = {"measured": figures.is_number, "interval": figures.is_ends, "tokens": figures.is_count}
    if last is None:
        return None
    if not isinstance(last, Mapping) or figures.wrong(last, wanted) or budget.get("metric") not in ("kl", "cosine"):
        raise CheckpointError(f"{path} is damaged: its budget is not as it was written", "quantize the model again")
    low, high = last["interval"]
    return Lost(budget["metric"], last["measured"], (low, high), last["tokens"], "", "the run that chose its numbers")


def readers(model: Model, precision: Precision) -> tuple[Engine, ...]:
    """The engines that compute with a quantized model as it lies there, ours first; its numbers are their only ones.

    transformers is none of them: it decodes what others quantized while it loads, and takes what the float model takes.
    """
    able = []
    for engine in engines.all_engines():
        if engine.name == "transformers" or (engine.name != _OURS and _obstacle(engine, model, precision)):
            continue
        able.append(replace(engine, precisions=lambda _model: [precision]))
    return tuple(sorted(able, key=lambda engine: engine.name != _OURS))


def reader(model: Model, precision: Precision, name: str) -> Engine:
    """The one of `readers` that is called so. Raises UsageError with the reason where it is none."""
    known = engines.get(name)
    able = readers(model, precision)
    for engine in able:
        if engine.name == known.name:
            return engine
    others = f"--engine {' or '.join(engine.name for engine in able)}; spicerack export writes other files"
    if known.name == "transformers":
        raise UsageError("transformers decodes these codes as it loads, and takes what the float model takes", others)
    raise UsageError(str(_obstacle(known, model, precision)), others)


def _obstacle(engine: Engine, model: Model, precision: Precision) -> str | None:
    """Why an engine does not read the files, as a sentence; None if it does."""
    try:
        stored_engines.find(engine.name).reading(precision.stored or "", model.config.get("model_type"))
    except UsageError as error:
        return error.message
    return None


def shown(folder: Path) -> dict[str, Any]:
    """What a page about a folder of ours takes from planning, as JSON has it: devices, of `on_devices`, None where the
    model is none that a planner knows; and sensitivity, None where no run with a budget left one.

    Raises CheckpointError where the latter or config.json is damaged.
    """
    known = sensitivity.read(folder)
    if (folder / CONFIG).is_file():
        read_json(folder / CONFIG, MAX_CONFIG_BYTES)
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
    devices = catalogue.find(name, catalogue.built_in())  # a person's own are theirs, and others read it
    engine = default_engine(model, devices)
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
