"""Llama 1 to 3, and all that took over its class: TinyLlama, SmolLM, Yi ..."""

from __future__ import annotations

from spicerack.models.gguf.family import DECODER, GROUPED, HEAD, LLAMA_SCALINGS, RMS, SILU, Family, biases

FAMILY = Family(
    model_type="llama",
    architecture="llama",
    classes=("LlamaForCausalLM",),
    prefix="model",
    modules=DECODER,
    keys=(*GROUPED, RMS, *HEAD),
    rows={"attn_q": "queries", "attn_k": "keys"},
    scalings=LLAMA_SCALINGS,
    scaled=True,
    fixed={"hidden_act": SILU},
    settings={"hidden_act": "silu"},
    to_config=biases,
)
