"""Granite 3: a llama with four multipliers."""

from __future__ import annotations

from spicerack.models.gguf.family import DECODER, GROUPED, LLAMA_SCALINGS, RMS, SILU, Family, Key, biases

FAMILY = Family(
    model_type="granite",
    architecture="granite",
    classes=("GraniteForCausalLM",),
    prefix="model",
    modules=DECODER,
    keys=(
        *GROUPED,
        RMS,
        Key("attention_multiplier", "attention.scale", "f32"),
        Key("embedding_multiplier", "embedding_scale", "f32"),
        Key("residual_multiplier", "residual_scale", "f32"),
        Key("logits_scaling", "logit_scale", "f32"),
    ),
    rows={"attn_q": "queries", "attn_k": "keys"},
    scalings=LLAMA_SCALINGS,
    fixed={"hidden_act": SILU},
    settings={"hidden_act": "silu"},
    to_config=biases,
)
