"""What Gemma 2 and 3 share: four norms a block, and scores that llama.cpp scales by a number of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

NORMS = {
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}
"""The norms of a block, in transformers' names and in llama.cpp's."""


def scale_obstacle(config: Mapping[str, Any], large: int) -> str | None:
    """Scores that are scaled in another way: llama.cpp takes the number for granted. large: blocks of the 27B model."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    scale = _scale(large, *(config[name] for name in names))
    if config["query_pre_attn_scalar"] != scale:
        return f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, and llama.cpp computes with {scale}"
    return None


def to_config(large: int) -> Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]]:
    """What makes the part of config.json that no key has: the scale. large: blocks of the 27B model."""

    def of(keys: Mapping[str, Any], _names: Collection[str]) -> dict[str, Any]:
        sizes = ("block_count", "embedding_length", "attention.head_count", "attention.key_length")
        return {"query_pre_attn_scalar": _scale(large, *(int(keys[key]) for key in sizes))}

    return of


def _scale(large: int, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """What llama.cpp divides queries by the root of: of the 27B model alone the width over the heads."""
    return hidden // heads if layers == large else head_dim
