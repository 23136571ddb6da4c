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
_MAMBA = frozenset({"mamba", "mamba2", "falcon_mamba"})


def kinds(text: Mapping[str, Any]) -> list[Kind]:
    """What each layer of a language model keeps. text: its config (`fields.text_of`).

    Raises CheckpointError for a type of layer that is not known, and without a number of layers.
    """
    family = str(text.get("model_type"))
    named = text.get("layer_types") or text.get("layers_block_type")
    if named:
        unknown = sorted({str(kind) for kind in named} - _KINDS.keys())
        if unknown:
            raise CheckpointError(
                f"config.json: layers of the type {', '.join(unknown)} are not known: what they keep cannot be told",
                "update spicerack",
            )
        named_kinds = [_KINDS[kind] for kind in named]
    elif pattern := text.get("hybrid_override_pattern"):
        named_kinds = [_NEMOTRON[mark] for mark in pattern]
    else:
        named_kinds = _by_rule(text, family, Fields(text, family).layers)
    shared = text.get("num_kv_shared_layers") or 0  # the last ones read what another layer keeps
    return [kind if i < len(named_kinds) - shared else "none" for i, kind in enumerate(named_kinds)]


def _by_rule(text: Mapping[str, Any], family: str, count: int) -> list[Kind]:
    """Where config.json names no types: by its other fields, or the family's habit."""
    numbers = range(count)
    if step := text.get("full_attention_interval"):
        return ["linear" if (i + 1) % step else "full" for i in numbers]
    if isinstance(text.get("linear_attn_config"), dict):  # counted from 1
        full = set(text["linear_attn_config"]["full_attn_layers"])
        return ["full" if i + 1 in full else "linear" for i in numbers]
    if marks := text.get("attn_type_list"):
        return ["full" if mark == 1 else "linear" for mark in marks]
    if (chosen := text.get("attn_layer_indices")) is not None:  # Bamba
        return ["full" if i in chosen else "linear" for i in numbers]
    if step := text.get("attn_layer_period"):
        return ["full" if i % step == text.get("attn_layer_offset", 0) else "linear" for i in numbers]
    if family in _MAMBA:
        return ["linear"] * count
    if family == "falcon_h1":
        return ["hybrid"] * count
    if family == "llama4_text":
        return ["chunked" if rotated else "full" for rotated in _rotated(text, count)]
    if family in _PATTERNS or text.get("sliding_window_pattern"):
        step = text.get("sliding_window_pattern") or _PATTERNS[family]
        return ["sliding" if (i + 1) % step else "full" for i in numbers]
    if text.get("sliding_window") is None or (family.startswith("qwen") and not text.get("use_sliding_window")):
        return ["full"] * count
    first = text.get("max_window_layers", count) if family.startswith("qwen") else 0
    return ["sliding" if i >= first else "full" for i in numbers]


def _rotated(text: Mapping[str, Any], count: int) -> list[int]:
    """Of Llama 4's layers: whether they turn positions, which those do that look at a chunk."""
    return text.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(count)]
