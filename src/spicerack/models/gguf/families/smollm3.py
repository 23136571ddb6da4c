"""SmolLM 3: a llama of which every fourth block has no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spicerack.models.gguf.family import DECODER, GROUPED, RMS, SILU, Family

_PERIOD = 4


def _refuses(config: Mapping[str, Any]) -> str | None:
    """Blocks without rotary embedding that are not those which llama.cpp takes for granted."""
    layers = range(config["num_hidden_layers"])
    rotary = [bool(config["no_rope_layers"][i]) for i in layers]
    if rotary != [(i + 1) % _PERIOD != 0 for i in layers]:
        return f"no_rope_layers are not every {_PERIOD}th, which are those that llama.cpp leaves without"
    return None


FAMILY = Family(
    model_type="smollm3",
    architecture="smollm3",
    classes=("SmolLM3ForCausalLM",),
    prefix="model",
    modules=DECODER,
    keys=(*GROUPED, RMS),
    rows={"attn_q": "queries", "attn_k": "keys"},
    fixed={
        "hidden_act": SILU,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False, None),
    },
    settings={"hidden_act": "silu", "use_sliding_window": False, "no_rope_layer_interval": _PERIOD},
    refuses=_refuses,
)
