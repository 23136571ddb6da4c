"""Qwen 3 with experts."""

from __future__ import annotations

from spicerack.models.gguf.family import EXPERTS, FRAME, GROUPED, HEAD, NORMS, QK_NORMS, RMS, SILU, Family, Key

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    prefix="model",
    modules={**FRAME, **NORMS, **QK_NORMS, **EXPERTS},
    keys=(
        *GROUPED,
        RMS,
        *HEAD,
        Key("num_local_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key("moe_intermediate_size", "expert_feed_forward_length"),
    ),
    scaled=True,
    fixed={
        "hidden_act": SILU,
        "use_sliding_window": (False, None),
        "attention_bias": (False,),
        "norm_topk_prob": (True,),  # transformers' default is False, and what Qwen released says True
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    settings={
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)
