"""Mistral 7B and its like. llama.cpp has them as llamas, which look back all the way: their window is kept, for us."""

from __future__ import annotations

from spicerack.models.gguf.family import DECODER, GROUPED, HEAD, LLAMA_SCALINGS, RMS, SILU, Family, Key

FAMILY = Family(
    model_type="mistral",
    architecture="llama",
    classes=("MistralForCausalLM",),
    prefix="model",
    modules=DECODER,
    keys=(*GROUPED, RMS, *HEAD, Key("sliding_window", "attention.sliding_window")),
    rows={"attn_q": "queries", "attn_k": "keys"},
    scalings=LLAMA_SCALINGS,
    scaled=True,
    fixed={"hidden_act": SILU},
    settings={"hidden_act": "silu", "sliding_window": None},
    marks=("attention.sliding_window",),
)
