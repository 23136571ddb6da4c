"""gpt-oss: all experts of a block in one tensor each, which is released in MXFP4; attention with sinks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spicerack.models.gguf.family import FRAME, GROUPED, HEAD, RMS, SILU, Family, Key, Window

_LAYER = "model.layers.{i}"
_EXPERTS = f"{_LAYER}.mlp.experts"


def _refuses(config: Mapping[str, Any]) -> str | None:
    """Blocks without a window: llama.cpp wants the number."""
    if config["sliding_window"] is None:
        return "config.json has no sliding_window, and llama.cpp computes with one"
    return None


FAMILY = Family(
    model_type="gpt_oss",
    architecture="gpt-oss",
    classes=("GptOssForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        f"{_LAYER}.input_layernorm": "blk.{i}.attn_norm",
        f"{_LAYER}.post_attention_layernorm": "blk.{i}.post_attention_norm",
        f"{_LAYER}.mlp.router": "blk.{i}.ffn_gate_inp",
    },
    tensors={
        f"{_LAYER}.self_attn.sinks": ("blk.{i}.attn_sinks.weight",),
        f"{_EXPERTS}.gate_up_proj": ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight"),
        f"{_EXPERTS}.gate_up_proj_bias": ("blk.{i}.ffn_gate_exps.bias", "blk.{i}.ffn_up_exps.bias"),
        f"{_EXPERTS}.down_proj": ("blk.{i}.ffn_down_exps.weight",),
        f"{_EXPERTS}.down_proj_bias": ("blk.{i}.ffn_down_exps.bias",),
    },
    alternating=True,
    transposed=frozenset({"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}),
    keys=(
        *GROUPED,
        RMS,
        *HEAD,
        Key("num_local_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key("intermediate_size", "expert_feed_forward_length"),
        Key("sliding_window", "attention.sliding_window"),
    ),
    truncated=False,
    scalings=("yarn",),
    window=Window(period=2),
    fixed={
        "hidden_act": SILU,
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),  # ggml_swiglu_oai, as src/llama-graph.cpp calls it
        "swiglu_limit": (7.0,),
    },
    settings={"hidden_act": "silu", "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    own_head=True,
    refuses=_refuses,
)
