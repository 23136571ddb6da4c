"""StableLM 2 and 3B: layer norms, embeddings that turn a part of each head, and norms of single heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spicerack.models.gguf.family import DECODER, GROUPED, SILU, Family, Key


def _to_config(_keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What a file says by the tensors that it has."""
    return {
        "qk_layernorm": "blk.0.attn_q_norm.weight" in names,
        "use_qkv_bias": "blk.0.attn_q.bias" in names,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in names,
    }


FAMILY = Family(
    model_type="stablelm",
    architecture="stablelm",
    classes=("StableLmForCausalLM",),
    prefix="model",
    modules={
        **DECODER,
        "model.layers.{i}.self_attn.q_layernorm.norms.{e}": "blk.{i}.attn_q_norm",
        "model.layers.{i}.self_attn.k_layernorm.norms.{e}": "blk.{i}.attn_k_norm",
    },
    keys=(
        *GROUPED,
        Key("layer_norm_eps", "attention.layer_norm_epsilon", "f32"),
        Key("use_parallel_residual", "use_parallel_residual", "bool"),
    ),
    partial=True,
    fixed={"hidden_act": SILU},
    settings={"hidden_act": "silu"},
    own_head=True,
    to_config=_to_config,
)
