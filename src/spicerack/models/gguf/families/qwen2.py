"""Qwen 2 and 2.5."""

from __future__ import annotations

from spicerack.models.gguf.family import DECODER, GROUPED, RMS, SILU, Family

FAMILY = Family(
    model_type="qwen2",
    architecture="qwen2",
    classes=("Qwen2ForCausalLM",),
    prefix="model",
    modules=DECODER,
    keys=(*GROUPED, RMS),
    fixed={"hidden_act": SILU, "use_sliding_window": (False, None)},
    settings={"hidden_act": "silu", "use_sliding_window": False},
)
