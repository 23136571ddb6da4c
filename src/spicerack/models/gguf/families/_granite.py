"""What Granite's families share: a llama with four multipliers, and the tensors of its experts."""

from __future__ import annotations

from spicerack.models.gguf.family import GROUPED, RMS, Key

KEYS = (
    *GROUPED,
    RMS,
    Key("attention_multiplier", "attention.scale", "f32"),
    Key("embedding_multiplier", "embedding_scale", "f32"),
    Key("residual_multiplier", "residual_scale", "f32"),
    Key("logits_scaling", "logit_scale", "f32"),
)
"""Sizes, and the multipliers."""
MIXTURE = (Key("num_local_experts", "expert_count"), Key("num_experts_per_tok", "expert_used_count"))
"""What a mixture has beside them."""
_MOE = "model.layers.{i}.block_sparse_moe"
ROUTER = {f"{_MOE}.router.layer": "blk.{i}.ffn_gate_inp"}
EXPERTS = {
    f"{_MOE}.input_linear.weight": ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight"),
    f"{_MOE}.output_linear.weight": ("blk.{i}.ffn_down_exps.weight",),
}
"""All experts of a block in one tensor, [experts, out, in], gate above up."""
