"""Qwen 1.5 and 2 with experts, of which one is shared by all tokens."""

from __future__ import annotations

from spicerack.models.gguf.family import EXPERTS, FRAME, GROUPED, NORMS, RMS, SILU, Family, Key

_SHARED = "model.layers.{i}.mlp.shared_expert"

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="qwen2moe",
    classes=("Qwen2MoeForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **NORMS,
        **EXPERTS,
        "model.layers.{i}.mlp.shared_expert_gate": "blk.{i}.ffn_gate_inp_shexp",
        f"{_SHARED}.gate_proj": "blk.{i}.ffn_gate_shexp",
        f"{_SHARED}.up_proj": "blk.{i}.ffn_up_shexp",
        f"{_SHARED}.down_proj": "blk.{i}.ffn_down_shexp",
    },
    keys=(
        *GROUPED,
        RMS,
        Key("num_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key("moe_intermediate_size", "expert_feed_forward_length"),
        Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ),
    fixed={
        "hidden_act": SILU,
        "use_sliding_window": (False, None),
        "norm_topk_prob": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    settings={
        "hidden_act": "silu",
        "use_sliding_window": False,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    own_head=True,
)
