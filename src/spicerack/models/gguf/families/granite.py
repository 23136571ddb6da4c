"""Granite 3: a llama with four multipliers."""

from __future__ import annotations

from spicerack.models.gguf.families._granite import KEYS
from spicerack.models.gguf.family import DECODER, LLAMA_SCALINGS, SILU, Family, biases

FAMILY = Family(
    model_type="granite",
    architecture="granite",
    classes=("GraniteForCausalLM",),
    prefix="model",
    modules=DECODER,
    keys=KEYS,
    rows={"attn_q": "queries", "attn_k": "keys"},
    scalings=LLAMA_SCALINGS,
    fixed={"hidden_act": SILU},
    settings={"hidden_act": "silu"},
    to_config=biases,
)
