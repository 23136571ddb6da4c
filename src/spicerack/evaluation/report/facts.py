"""Everything that is known of a quantized folder, from the files in it, as JSON's own types.

What is not known is None, and named in `missing` with the command that would tell: the page says so, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spicerack.errors import CheckpointError
from spicerack.evaluation.report import shapes
from spicerack.storage import files, ledger, records
from spicerack.storage.ledger import Entry

TENSORS = 1000
"""Tensors that are listed, the largest first; the rest are counted. A page about 100,000 experts is read by nobody."""
_EVENTS = 200
_BLOCK = re.compile(r"\.(\d+)\.")
_MAX_RUN = 16 << 20


def collect(folder: Path, planned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts of a folder of ours, local.

    planned: what a planner knows of it: devices, sensitivity; None where nobody asked one. Raises CheckpointError where
    it has no ledger, or a file of it is damaged.
    """
    written = ledger.read(folder)
    if written is None:
        raise CheckpointError(f"{folder} has no {files.LEDGER}", "give a folder that spicerack quantize wrote")
    run = files.read_json(folder / files.RUN, _MAX_RUN) if (folder / files.RUN).is_file() else None
    if run is not None:
        shapes.check_run(folder / files.RUN, run)
    shapes.check_ledger(folder / files.LEDGER, written.check)
    kept = {command: records.read(folder, command) for command in ("lens", "eval", "bench", "energy")}
    for command, record in kept.items():
        shapes.check(folder, command, record)
    whole = {files.RUN: run, files.LEDGER: [written.identity, written.check, written.budget]}
    for name, value in {**whole, **{f"{command}.json": record for command, record in kept.items()}}.items():
        shapes.check_depth(folder / name, value)
    unreadable = None if kept["eval"] or written.check else _unreadable(folder)
    plans = {"devices": None, "sensitivity": None, **(planned or {})}
    entries = written.entries
    quantized = [entry for entry in entries if entry.action == "quantize"]
    before, after = sum(e.bytes_before for e in entries), sum(e.bytes_after for e in entries)
    largest = sorted(entries, key=lambda entry: -entry.bytes_before)
    facts = {
        "name": folder.resolve().name,
        "recipe": written.recipe,
        "identity": written.identity,
        "run": run,
        "bytes_before": before,
        "bytes_after": after,
        "times_smaller": before / after if after else None,
        "parameters": sum(e.numel for e in entries if e.action != "drop"),
        "bits_quantized": _bits(quantized),
        "bits_all": _bits([entry for entry in entries if entry.action != "drop"]),
        "tensors_in_all": len(entries),
        "types": [asdict(row) for row in ledger.by_layer_type(entries)],
        "blocks": _blocks(quantized),
        "tensors": [_row(entry) for entry in largest[:TENSORS]],
        "tensors_left_out": max(len(entries) - TENSORS, 0),
        "bytes_left_out": sum(entry.bytes_after for entry in largest[TENSORS:]),
        "events": [{"tensor": e.tensor, "event": text} for e in entries for text in e.events][:_EVENTS],
        **kept,
        "check": written.check,
        "budget": written.budget,
        **plans,
        "unreadable": unreadable,
        "missing": _missing(kept, run, unreadable, plans),
    }
    finite: dict[str, Any] = _finite(facts)
    return finite


def _missing(
    kept: Mapping[str, Any], run: Mapping[str, Any] | None, unreadable: str | None, plans: Mapping[str, Any]
) -> list[str]:
    """Commands whose records are not there, of those that could have left one; "run" for run.json."""
    able = [] if unreadable else [*kept.items()]
    sensitivity = [] if unreadable or plans["sensitivity"] else ["sensitivity"]
    return [name for name, record in able if record is None and name != "lens"] + sensitivity + ([] if run else ["run"])


def _unreadable(folder: Path) -> str | None:
    """Why text says nothing about a model, as what follows its name in a sentence; None if it does."""
    from spicerack.models.kind import obstacle  # which asks transformers: a second or two that most pages need not

    path = folder / files.CONFIG
    config = files.read_json(path, _MAX_RUN) if path.is_file() else {}
    own = config.get("config") if config.get("model_type") == files.CONTAINER else config
    return obstacle(own) if isinstance(own, dict) and own else None


def _bits(entries: Iterable[Entry]) -> float | None:
    """Bits of a number in the files, scales counted."""
    entries = list(entries)
    numbers = sum(entry.numel for entry in entries)
    return 8 * sum(entry.bytes_after for entry in entries) / numbers if numbers else None


def _row(entry: Entry) -> dict[str, Any]:
    """A tensor, for the list."""
    return {
        "tensor": entry.tensor, "scheme": entry.scheme, "shape": list(entry.shape), "bits": _bits([entry]),
        "bytes_before": entry.bytes_before, "bytes_after": entry.bytes_after, "error": entry.error, "why": entry.why,
    }  # fmt: skip


def _blocks(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Bits and error of each kind of layer in each block; of what is in no block under None.

    Experts of a block are one: they have one kind. error: root mean square.
    """
    groups: dict[tuple[int | None, str], list[Entry]] = {}
    for entry in (entry for entry in entries if entry.numel):
        match = _BLOCK.search(entry.tensor)
        groups.setdefault((int(match[1]) if match else None, entry.layer_type), []).append(entry)
    rows = []
    for (block, layer), group in groups.items():
        errors = [entry.error for entry in group if entry.error is not None]
        error = math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else None
        rows.append({"block": block, "layer": layer, "bits": _bits(group), "error": error, "tensors": len(group)})
    return sorted(rows, key=lambda row: (row["block"] is None, row["block"] or 0))


def _finite(value: Any) -> Any:
    """The same, without NaN and infinities, which JSON has not: they become None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
