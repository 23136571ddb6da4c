"""Is a record what a command left? What is read back from a folder may be damaged, or a stranger's.

Each command's result has figures under known names; `obstacle` says what is missing or of another type, before anybody
computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_Test = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _ends(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


def _maybe(test: _Test) -> _Test:
    return lambda value: value is None or test(value)


_READ: dict[str, _Test] = {"compute": _text, "text": _text, "tokens": _count}
_DECODER: dict[str, _Test] = {
    **_READ, "windows": _count, "window": _count, "perplexity": _number, "perplexity_reference": _number,
    "kl_mean": _number, "kl_mean_ci95": _maybe(_ends), "kl_p999": _number, "top1_agreement": _number,
    "kl_noise_floor": _maybe(_number),
}  # fmt: skip
_ENCODER: dict[str, _Test] = {
    **_READ, "sentences": _count, "cosine_mean": _number, "cosine_min": _number, "spearman": _maybe(_number),
    "cosine_noise_floor": _maybe(_number),
}  # fmt: skip
_INTERVALS = (
    "perplexity_ci95", "perplexity_reference_ci95", "top1_agreement_ci95", "kl_noise_floor_ci95", "cosine_mean_ci95",
    "cosine_noise_floor_ci95",
)  # fmt: skip
"""Figures of an evaluation that older records have not."""


def obstacle(figures: Any) -> str | None:
    """What is wrong with the figures of an evaluation, as the end of a sentence; None if nothing is."""
    if not isinstance(figures, Mapping):
        return "they are no object"
    wanted = _DECODER if "kl_mean" in figures else _ENCODER
    return wrong(figures, {**wanted, **{name: _maybe(_ends) for name in _INTERVALS if name in figures}})


def wrong(record: Mapping[str, Any], wanted: Mapping[str, _Test]) -> str | None:
    """The first name whose value is missing or not what is wanted, as the end of a sentence; None for none."""
    bad = next((name for name, test in wanted.items() if name not in record or not test(record[name])), None)
    return None if bad is None else f"{bad} is {record.get(bad)!r:.40}"
