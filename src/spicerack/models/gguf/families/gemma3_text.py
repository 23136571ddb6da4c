"""Gemma 3, of text alone: 270M and 1B, and larger ones whose vision was left out."""

from __future__ import annotations

from functools import partial

from spicerack.models.gguf.families._gemma import NORMS, scale_obstacle, to_config
from spicerack.models.gguf.family import FRAME, GELU_TANH, GROUPED, HEAD, MLP, QK_NORMS, RMS, Family, Key, Window

_LARGE = 62
"""Blocks of the 27B model, by which llama.cpp tells it."""


FAMILY = Family(
    model_type="gemma3_text",
    architecture="gemma3",
    classes=("Gemma3ForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **MLP,
        **QK_NORMS,
        **NORMS,
    },
    keys=(
        *GROUPED,
        RMS,
        *HEAD,
        Key("sliding_window", "attention.sliding_window"),
        Key("final_logit_softcapping", "final_logit_softcapping", "f32"),
    ),
    plus_one=True,
    window=Window(period=6),
    fixed={
        "hidden_activation": GELU_TANH,
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),
    },
    settings={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None},
    refuses=partial(scale_obstacle, large=_LARGE),
    to_config=to_config(_LARGE),
)
