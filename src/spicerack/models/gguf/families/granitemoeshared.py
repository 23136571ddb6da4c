"""Granite with experts, of which one is shared by all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spicerack.models.gguf.families._granite import EXPERTS, KEYS, MIXTURE, ROUTER
from spicerack.models.gguf.family import FRAME, LLAMA_SCALINGS, NORMS, SILU, Family, Key

_SHARED = "model.layers.{i}.shared_mlp"


def _refuses(config: Mapping[str, Any]) -> str | None:
    """A model without other experts, which has other tensors in a file."""
    return None if config["num_local_experts"] else "it has no experts but the shared one"


FAMILY = Family(
    model_type="granitemoeshared",
    architecture="granitemoe",
    classes=("GraniteMoeSharedForCausalLM",),
    prefix="model",
    modules={**FRAME, **NORMS, **ROUTER, f"{_SHARED}.output_linear": "blk.{i}.ffn_down_shexp"},
    tensors={
        **EXPERTS,
        f"{_SHARED}.input_linear.weight": ("blk.{i}.ffn_gate_shexp.weight", "blk.{i}.ffn_up_shexp.weight"),
    },
    keys=(*KEYS, *MIXTURE, Key("shared_intermediate_size", "expert_shared_feed_forward_length")),
    rows={"attn_q": "queries", "attn_k": "keys"},
    scalings=LLAMA_SCALINGS,
    fixed={"hidden_act": SILU, "attention_bias": (False,)},
    settings={"hidden_act": "silu", "attention_bias": False},
    marks=("expert_shared_feed_forward_length",),
    refuses=_refuses,
)
