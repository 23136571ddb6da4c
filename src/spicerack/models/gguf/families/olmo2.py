"""OLMo 2: norms behind attention and MLP."""

from __future__ import annotations

from spicerack.models.gguf.family import FRAME, GROUPED, MLP, QK_NORMS, RMS, SILU, Family

FAMILY = Family(
    model_type="olmo2",
    architecture="olmo2",
    classes=("Olmo2ForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **MLP,
        **QK_NORMS,
        "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
        "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
    },
    keys=(*GROUPED, RMS),
    fixed={"hidden_act": SILU, "attention_bias": (False,)},
    settings={"hidden_act": "silu", "attention_bias": False},
    own_head=True,
)
