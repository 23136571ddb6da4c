"""Gemma 3, of text alone: 270M and 1B, and larger ones whose vision was left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spicerack.models.gguf.family import FRAME, GELU_TANH, GROUPED, HEAD, MLP, QK_NORMS, RMS, Family, Key, Window

_LARGE = 62
"""Blocks of the 27B model, by which llama.cpp tells it: it alone divides scores by the width over the heads."""


def _scale(layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """What llama.cpp divides queries by the root of."""
    return hidden // heads if layers == _LARGE else head_dim


def _refuses(config: Mapping[str, Any]) -> str | None:
    """Scores that are scaled in another way: llama.cpp takes the number for granted."""
    scale = _scale(*(config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")))
    if config["query_pre_attn_scalar"] != scale:
        return f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, and llama.cpp computes with {scale}"
    return None


def _to_config(keys: Mapping[str, Any], _names: Collection[str]) -> dict[str, Any]:
    """The scale, which no key has."""
    sizes = ("block_count", "embedding_length", "attention.head_count", "attention.key_length")
    return {"query_pre_attn_scalar": _scale(*(int(keys[key]) for key in sizes))}


FAMILY = Family(
    model_type="gemma3_text",
    architecture="gemma3",
    classes=("Gemma3ForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **MLP,
        **QK_NORMS,
        "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
        "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
        "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
        "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
    },
    keys=(
        *GROUPED,
        RMS,
        *HEAD,
        Key("sliding_window", "attention.sliding_window"),
        Key("final_logit_softcapping", "final_logit_softcapping", "f32"),
    ),
    plus_one=True,
    window=Window(period=6),
    fixed={
        "hidden_activation": GELU_TANH,
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),
    },
    settings={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None},
    refuses=_refuses,
    to_config=_to_config,
)
