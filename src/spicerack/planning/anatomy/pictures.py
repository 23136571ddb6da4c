"""What a picture is to a model: its size in pixels, and the tokens that it becomes where there are most of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spicerack.planning.anatomy.fields import Fields

_USUAL = 224
"""Pixels of a side where config.json does not say them: convolutions take any."""
_STEM = 4
"""Pixels of a token's side in the first stage of models with stages, where config.json does not say it."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: pixels, and tokens."""

    height: int
    width: int
    tokens: int


def of_config(config: Mapping[str, Any], positions: int | None) -> Picture | None:
    """What a model's pictures are; None for one that config.json says nothing about pictures of.

    positions: of the table that the model has for them, which knows of more tokens than those of the picture; None
    without one. Raises CheckpointError for a size that is none.
    """
    staged = isinstance(config.get("depths"), list) or isinstance(config.get("hidden_sizes"), list)
    if config.get("image_size") is None and not staged:
        return None
    height, width = _sides(config, "image_size", _USUAL)
    if positions is not None:
        return Picture(height, width, positions)
    strides = config.get("strides")
    usual = strides[0] if isinstance(strides, list) and strides and type(strides[0]) is int else _STEM
    high, wide = _sides(config, "patch_size", usual)
    return Picture(height, width, -(-height // high) * -(-width // wide))


def _sides(config: Mapping[str, Any], name: str, default: int) -> tuple[int, int]:
    """Height and width: a number for both, or two."""
    value = config.get(name)
    pair = value if isinstance(value, list | tuple) and len(value) == 2 else [value, value]
    high, wide = (Fields({name: side}, "pictures").size(name, default=default, most=1 << 20) for side in pair)
    return high, wide
