"""Is each file of a folder what a command of ours left there? Looked at before anything is drawn from it.

A file may be damaged, or a stranger's: what is missing or of another type is an error with the file's name, and no
page is written. `evaluation.figures` knows the figures of an evaluation; here is what stands beside them, and what
other commands leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spicerack.errors import CheckpointError
from spicerack.evaluation import figures
from spicerack.evaluation.figures import is_count, is_ends, is_number, is_speed, is_text, maybe, wrong

_SPEEDS = ("decode_tokens_per_s", "items_per_s")
_TOKEN = {"text": is_text, "kl": is_number, "original": is_text, "small": is_text}
_CHOICE = {"text": is_text, "share": is_number}
_PASSAGE = {
    "which": is_text, "kl": is_number, "before": is_text, "at": is_count, "original_writes": is_text,
    "small_writes": is_text,
}  # fmt: skip
_PAIR = {
    "a": is_text, "b": is_text, "before": is_number, "after": is_number,
    "typical": lambda value: isinstance(value, bool),
}  # fmt: skip
_DEEPEST = 32
"""Lists and objects in one another: those that commands leave have fewer than ten."""
_MOST_WEIGHTS = 4096
"""Under the lens: four times what `eval` keeps."""


def check(folder: Path, name: str, record: Mapping[str, Any] | None) -> None:
    """Raises CheckpointError where the record `name` (lens, eval, bench, energy) in the folder is not as it was
    written; None is no record, and right."""
    if record is None:
        return
    obstacle = {"lens": _lens, "eval": _evaluation, "bench": _benchmark, "energy": _energy}[name](record)
    if obstacle is not None:
        path = folder / f"{name}.json"
        again = "eval" if name == "lens" else name
        raise CheckpointError(f"{path} is damaged: {obstacle}", f"remove it, and run spicerack {again} again")


def check_run(path: Path, run: Mapping[str, Any]) -> None:
    """Raises CheckpointError where run.json is not as `quantize` wrote it."""
    command = run.get("command", [])
    if not isinstance(command, list) or not isinstance(run.get("machine", {}), dict):
        raise CheckpointError(f"{path} is damaged: command or machine is of another type", "remove it")


def check_depth(path: Path, value: Any) -> None:
    """Raises CheckpointError where lists and objects of a file stand in one another more often than any of ours do."""
    level = [value]
    for _ in range(_DEEPEST):
        children = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [child for inner in children for child in inner]
    if level:
        raise CheckpointError(f"{path} is damaged: it is nested too deeply", "remove it")


def check_ledger(path: Path, check: Mapping[str, Any] | None) -> None:
    """Raises CheckpointError where the check in a ledger is not as `quantize` wrote it."""
    obstacle = None if check is None else figures.obstacle(check)
    if obstacle is not None:
        raise CheckpointError(f"{path} is damaged: in its check {obstacle}", "quantize the model again")


def _evaluation(record: Mapping[str, Any]) -> str | None:
    """Figures, the weights under the lens, kernels, examples; older records have not all of them."""
    kernels, examples = record.get("kernels", []), record.get("examples", [])
    return (
        figures.obstacle(record["result"])
        or (None if _is_list(kernels, _is_kernel) else "kernels are of another type")
        or (None if _is_list(examples, _is_example) else "examples are of another type")
    )


def _lens(record: Mapping[str, Any]) -> str | None:
    """Weights under the lens."""
    row = record["result"]
    if not _is_list(row.get("weights"), is_number) or not row["weights"]:
        return "its weights are of another type"
    if len(row["weights"]) > _MOST_WEIGHTS or not _is_list(row.get("rounded"), _is_rounded) or not row["rounded"]:
        return "its rounded weights are of another type"
    return wrong(row, {"tensor": is_text})


def _is_rounded(value: Any) -> bool:
    few = isinstance(value, dict) and _is_list(value.get("levels"), is_number) and len(value["levels"]) <= _MOST_WEIGHTS
    return few and wrong(value, {"bits": is_count, "error": is_number}) is None


def _is_kernel(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and is_text(value[0]) and is_text(value[1]) and is_count(value[2])
    )


def _is_example(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if "tokens" not in value:
        return wrong(value, _PAIR) is None
    lists = _is_list(value["tokens"], lambda token: isinstance(token, dict) and wrong(token, _TOKEN) is None)
    choices = all(
        _is_list(value.get(side), lambda choice: isinstance(choice, dict) and wrong(choice, _CHOICE) is None)
        for side in ("original", "small")
    )
    return lists and choices and wrong(value, _PASSAGE) is None and value["at"] < len(value["tokens"])


def _benchmark(record: Mapping[str, Any]) -> str | None:
    """Two models at least, each with the speeds of its kind and how far they went apart."""
    result = record["result"]
    rows = result.get("rows")
    if not isinstance(rows, list) or len(rows) < 2 or not all(isinstance(row, dict) for row in rows):
        return "rows are of another type"
    key = next((key for key in _SPEEDS if key in rows[0]), _SPEEDS[0])
    for row in rows:
        spreads = [name.removesuffix("_min") for name in row if name.endswith("_min")]
        names = [f"{name}{end}" for name in {key, *spreads} for end in ("", "_min", "_max")]
        wanted = {"name": is_text, "compute": is_text, "resident_bytes": is_count, **dict.fromkeys(names, is_speed)}
        if obstacle := wrong(row, wanted):
            return obstacle
    return wrong(result, {"repeats": is_count, "threads": is_count, "device": is_text})


def _energy(record: Mapping[str, Any]) -> str | None:
    """Measured, or estimated with a range or a floor."""
    result = record["result"]
    wanted = {"joules_per_token": maybe(is_number)}
    if result.get("joules_per_token") is None:
        wanted["floor_joules_per_token"] = is_number
    elif result.get("how") == "measured":
        wanted["joules_per_token_with_idle"] = is_number
    else:
        wanted |= {"joules_per_token_range": is_ends, "device": is_text}
    return (
        "how is neither measured nor estimated"
        if result.get("how") not in ("measured", "estimated")
        else wrong(result, wanted)
    )


def _is_list(value: Any, test: Any) -> bool:
    return isinstance(value, list) and all(map(test, value))
