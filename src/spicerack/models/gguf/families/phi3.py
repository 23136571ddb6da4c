"""Phi 3, 3.5 and 4: queries, keys and values in one matrix, gate and up in another, and LongRoPE."""

from __future__ import annotations

from spicerack.models.gguf.family import GROUPED, NORMS, RMS, SILU, Family, Key

FAMILY = Family(
    model_type="phi3",
    architecture="phi3",
    classes=("Phi3ForCausalLM",),
    prefix="model",
    modules={
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        **NORMS,
        "model.layers.{i}.self_attn.qkv_proj": "blk.{i}.attn_qkv",
        "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
        "model.layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn_up",
        "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    },
    keys=(
        *GROUPED,
        RMS,
        Key("sliding_window", "attention.sliding_window"),
        Key("original_max_position_embeddings", "rope.scaling.original_context_length"),
    ),
    scalings=("longrope",),
    partial=True,
    fixed={"hidden_act": SILU},
    settings={"hidden_act": "silu", "sliding_window": None},
)
