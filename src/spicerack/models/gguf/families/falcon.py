"""Falcon 7B, 40B, 180B and Falcon 2: queries, keys and values in one matrix, attention beside the MLP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spicerack.models.gguf.family import SIZES, Family, Key, Kind


def _heads_of_keys(config: Mapping[str, Any]) -> int:
    """One for all queries, but in the architecture that came with 40B."""
    return int(config["num_kv_heads"]) if config["new_decoder_architecture"] else 1


def _refuses(config: Mapping[str, Any]) -> str | None:
    """Heads of keys of their own, as the small models of RefinedWeb have them."""
    if not config["new_decoder_architecture"] and not config["multi_query"]:
        return "every head has keys of its own, and llama.cpp takes one head of keys for all"
    return None


def _to_metadata(config: Mapping[str, Any]) -> dict[str, tuple[Kind, Any]]:
    """Heads of keys, and what llama.cpp calls the order of rows."""
    return {"attention.head_count_kv": ("u32", _heads_of_keys(config))}


def _to_config(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Which of the two architectures it is, from heads of keys and from norms."""
    heads, two_norms = int(keys["attention.head_count_kv"]), "blk.0.attn_norm_2.weight" in names
    new = two_norms or heads > 1
    return {
        "num_kv_heads": heads,
        "new_decoder_architecture": new,
        "multi_query": True,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
    }


FAMILY = Family(
    model_type="falcon",
    architecture="falcon",
    classes=("FalconForCausalLM",),
    prefix="transformer",
    modules={
        "transformer.word_embeddings": "token_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "transformer.h.{i}.input_layernorm": "blk.{i}.attn_norm",
        "transformer.h.{i}.ln_mlp": "blk.{i}.attn_norm",
        "transformer.h.{i}.ln_attn": "blk.{i}.attn_norm_2",
        "transformer.h.{i}.self_attention.query_key_value": "blk.{i}.attn_qkv",
        "transformer.h.{i}.self_attention.dense": "blk.{i}.attn_output",
        "transformer.h.{i}.mlp.dense_h_to_4h": "blk.{i}.ffn_up",
        "transformer.h.{i}.mlp.dense_4h_to_h": "blk.{i}.ffn_down",
    },
    keys=(
        *(key for key in SIZES if key.config != "intermediate_size"),
        Key("ffn_hidden_size", "feed_forward_length"),
        Key("layer_norm_epsilon", "attention.layer_norm_epsilon", "f32"),
    ),
    rows={"attn_qkv": "groups"},
    fixed={"activation": ("gelu",), "alibi": (False,), "parallel_attn": (True,), "bias": (False,)},
    settings={"activation": "gelu", "alibi": False, "parallel_attn": True, "bias": False},
    refuses=_refuses,
    to_metadata=_to_metadata,
    to_config=_to_config,
)
