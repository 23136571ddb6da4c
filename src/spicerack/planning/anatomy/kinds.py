"""What kind each layer of a language model is: full attention, a window, a state that does not grow.

config.json names the types of layers, or says a rule, or leaves it to the family's habit. A type that is not known is
refused by name: to count it as nothing would promise memory that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from spicerack.errors import CheckpointError
from spicerack.planning.anatomy.fields import Fields

Kind = Literal["full", "sliding", "chunked", "linear", "hybrid", "none"]
"""What a layer looks back at, and so keeps; hybrid ones have a cache and a state, none reads what others keep."""
_KINDS: Mapping[str, Kind] = {
    "full_attention": "full", "attention": "full", "global_attention": "full", "indexed_attention": "full",
    "deepseek_sparse_attention": "full", "sliding_attention": "sliding", "local_attention": "sliding",
    "chunked_attention": "chunked", "linear_attention": "linear", "mamba": "linear", "recurrent": "linear",
    "conv": "linear", "hybrid": "hybrid", "moe": "none", "mlp": "none",
}  # fmt: skip
"""Types of layers in config.json, of now and before; others are refused by name."""
_NEMOTRON: Mapping[str, Kind] = {"M": "linear", "*": "full", "-": "none", "E": "none"}
_PATTERNS: Mapping[str, int] = {"gemma3_text": 6, "gemma3n_text": 5, "cohere2": 4, "gemma2": 2, "gpt_oss": 2}
"""Families whose every n-th layer is full and the others slide, where config.json names no types."""
_RECURRENT = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv"})


def kinds(text: Mapping[str, Any]) -> list[Kind]:
    """What each layer of a language model keeps. text: its config (`fields.text_of`).

    Raises CheckpointError for a type of layer that is not known, and without a number of layers.
    """
    family = str(text.get("model_type"))
    fields = Fields(text, family)
    named = fields.marks("layer_types") or fields.marks("layers_block_type")
    pattern = fields.marks("hybrid_override_pattern")
    table = _KINDS if named else _NEMOTRON
    unknown = sorted({str(kind) for kind in (named or pattern)} - table.keys())
    if unknown:
        names = ", ".join(map(repr, unknown))[:200]
        raise CheckpointError(
            f"config.json: layers of the type {names} are not known: what they keep cannot be told", "update spicerack"
        )
    named_kinds = [table[kind] for kind in (named or pattern)] or _by_rule(fields, family, fields.layers)
    shared = fields.size("num_kv_shared_layers", default=0) if fields.get("num_kv_shared_layers") else 0
    # the last ones read what another layer keeps
    return [kind if i < len(named_kinds) - shared else "none" for i, kind in enumerate(named_kinds)]


def _by_rule(c: Fields, family: str, count: int) -> list[Kind]:
    """Where config.json names no types: by its other fields, or the family's habit."""
    numbers = range(count)
    if c.get("full_attention_interval"):
        step = c.size("full_attention_interval")
        return ["linear" if (i + 1) % step else "full" for i in numbers]
    if isinstance(c.get("linear_attn_config"), dict):  # counted from 1
        full = set(Fields(c.get("linear_attn_config"), family).marks("full_attn_layers"))
        return ["full" if i + 1 in full else "linear" for i in numbers]
    if marks := c.marks("attn_type_list"):
        return ["full" if mark == 1 else "linear" for mark in marks]
    if chosen := c.marks("attn_layer_indices"):  # Bamba
        return ["full" if i in chosen else "linear" for i in numbers]
    if c.get("attn_layer_period"):
        step = c.size("attn_layer_period")
        return ["full" if i % step == (c.get("attn_layer_offset") or 0) else "linear" for i in numbers]
    if family in _RECURRENT:
        return ["linear"] * count
    if family == "falcon_h1":
        return ["hybrid"] * count
    if family == "llama4_text":
        return ["chunked" if rotated else "full" for rotated in _rotated(c, count)]
    if family in _PATTERNS or c.get("sliding_window_pattern"):
        step = c.size("sliding_window_pattern", default=_PATTERNS.get(family, 1))
        return ["sliding" if (i + 1) % step else "full" for i in numbers]
    if c.get("sliding_window") is None or (family.startswith("qwen") and not c.get("use_sliding_window")):
        return ["full"] * count
    first = c.size("max_window_layers", default=count) if family.startswith("qwen") else 0
    return ["sliding" if i >= first else "full" for i in numbers]


def _rotated(c: Fields, count: int) -> list[int]:
    """Of Llama 4's layers: whether they turn positions, which those do that look at a chunk."""
    return c.marks("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(count)]
