"""Granite 3 with experts."""

from __future__ import annotations

from spicerack.models.gguf.families._granite import EXPERTS, KEYS, MIXTURE, ROUTER
from spicerack.models.gguf.family import FRAME, LLAMA_SCALINGS, NORMS, SILU, Family

FAMILY = Family(
    model_type="granitemoe",
    architecture="granitemoe",
    classes=("GraniteMoeForCausalLM",),
    prefix="model",
    modules={**FRAME, **NORMS, **ROUTER},
    tensors=EXPERTS,
    keys=(*KEYS, *MIXTURE),
    rows={"attn_q": "queries", "attn_k": "keys"},
    scalings=LLAMA_SCALINGS,
    fixed={"hidden_act": SILU, "attention_bias": (False,)},
    settings={"hidden_act": "silu", "attention_bias": False},
)
