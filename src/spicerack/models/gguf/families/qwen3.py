"""Qwen 3."""

from __future__ import annotations

from spicerack.models.gguf.family import DECODER, GROUPED, HEAD, QK_NORMS, RMS, SILU, Family

FAMILY = Family(
    model_type="qwen3",
    architecture="qwen3",
    classes=("Qwen3ForCausalLM",),
    prefix="model",
    modules={**DECODER, **QK_NORMS},
    keys=(*GROUPED, RMS, *HEAD),
    scaled=True,
    fixed={"hidden_act": SILU, "use_sliding_window": (False, None), "attention_bias": (False,)},
    settings={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
)
