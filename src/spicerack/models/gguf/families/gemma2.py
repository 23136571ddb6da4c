"""Gemma 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spicerack.models.gguf.families._gemma import NORMS, scale_obstacle, to_config
from spicerack.models.gguf.family import FRAME, GELU_TANH, GROUPED, HEAD, MLP, RMS, Family, Key, Window

_LARGE = 46
"""Blocks of the 27B model, by which llama.cpp tells it."""


def _refuses(config: Mapping[str, Any]) -> str | None:
    """Scores that are scaled in another way, and capped ones that are not: llama.cpp takes the number for granted."""
    if (reason := scale_obstacle(config, _LARGE)) is not None:
        return reason
    if config["attn_logit_softcapping"] is None or config["final_logit_softcapping"] is None:
        return "its logits are not capped, and llama.cpp caps them"
    return None


FAMILY = Family(
    model_type="gemma2",
    architecture="gemma2",
    classes=("Gemma2ForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **MLP,
        **NORMS,
    },
    keys=(
        *GROUPED,
        RMS,
        *HEAD,
        Key("sliding_window", "attention.sliding_window"),
        Key("attn_logit_softcapping", "attn_logit_softcapping", "f32"),
        Key("final_logit_softcapping", "final_logit_softcapping", "f32"),
    ),
    plus_one=True,
    window=Window(period=2),
    fixed={
        "hidden_activation": (*GELU_TANH, None),
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, None),
        "tie_word_embeddings": (True,),
    },
    settings={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    refuses=_refuses,
    to_config=to_config(_LARGE),
)
