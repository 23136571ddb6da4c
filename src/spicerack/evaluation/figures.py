"""Is a record what a command left? What is read back from a folder may be damaged, or a stranger's.

Each command's result has figures under known names; `obstacle` says what is missing or of another type, before anybody
computes with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

Test = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """A finite one, which a float can be: integers of JSON may be larger."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    """A whole number that is not below 0, and that something may have so many of."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def is_speed(value: Any) -> bool:
    """So many a second, above 0: what is shown may be divided by it."""
    return is_number(value) and value > 0


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_ends(value: Any) -> bool:
    """Both ends of an interval."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def maybe(test: Test) -> Test:
    """The same, or None."""
    return lambda value: value is None or test(value)


_READ: dict[str, Test] = {"compute": is_text, "text": is_text, "tokens": is_count}
_DECODER: dict[str, Test] = {
    **_READ, "windows": is_count, "window": is_count, "perplexity": is_number, "perplexity_reference": is_number,
    "kl_mean": is_number, "kl_mean_ci95": maybe(is_ends), "kl_p999": is_number, "top1_agreement": is_number,
    "kl_noise_floor": maybe(is_number),
}  # fmt: skip
_ENCODER: dict[str, Test] = {
    **_READ, "sentences": is_count, "cosine_mean": is_number, "cosine_min": is_number, "spearman": maybe(is_number),
    "cosine_noise_floor": maybe(is_number),
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
    return wrong(figures, {**wanted, **{name: maybe(is_ends) for name in _INTERVALS if name in figures}})


def wrong(record: Mapping[str, Any], wanted: Mapping[str, Test]) -> str | None:
    """The first name whose value is missing or not what is wanted, as the end of a sentence; None for none."""
    bad = next((name for name, test in wanted.items() if name not in record or not test(record[name])), None)
    return None if bad is None else f"{bad} is {record.get(bad)!r:.40}"
