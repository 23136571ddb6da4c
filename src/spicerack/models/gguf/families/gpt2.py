"""GPT-2: matrices that a checkpoint stores the other way round, and learned positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spicerack.models.gguf.family import GELU_TANH, Family, Key, Kind


def _to_metadata(config: Mapping[str, Any]) -> dict[str, tuple[Kind, Any]]:
    """The MLP's width, of which a config may say nothing."""
    return {"feed_forward_length": ("u32", config.get("n_inner") or 4 * config["n_embd"])}


def _to_config(keys: Mapping[str, Any], _names: Collection[str]) -> dict[str, Any]:
    """The same, where it is not the usual one."""
    width, hidden = int(keys["feed_forward_length"]), int(keys["embedding_length"])
    return {"n_inner": None if width == 4 * hidden else width}


FAMILY = Family(
    model_type="gpt2",
    architecture="gpt2",
    classes=("GPT2LMHeadModel",),
    prefix="transformer",
    modules={
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "transformer.h.{i}.ln_1": "blk.{i}.attn_norm",
        "transformer.h.{i}.attn.c_attn": "blk.{i}.attn_qkv",
        "transformer.h.{i}.attn.c_proj": "blk.{i}.attn_output",
        "transformer.h.{i}.ln_2": "blk.{i}.ffn_norm",
        "transformer.h.{i}.mlp.c_fc": "blk.{i}.ffn_up",
        "transformer.h.{i}.mlp.c_proj": "blk.{i}.ffn_down",
    },
    keys=(
        Key("n_layer", "block_count"),
        Key("n_positions", "context_length"),
        Key("n_embd", "embedding_length"),
        Key("n_head", "attention.head_count"),
        Key("layer_norm_epsilon", "attention.layer_norm_epsilon", "f32"),
    ),
    transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    rope=False,
    fixed={
        "activation_function": GELU_TANH,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    settings={"activation_function": "gelu_new"},
    left_out=(r".*\.attn\.(masked_)?bias",),
    to_metadata=_to_metadata,
    to_config=_to_config,
)
