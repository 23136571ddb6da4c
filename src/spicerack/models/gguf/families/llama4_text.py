"""Llama 4, of text alone: all experts of a block in one tensor, blocks that look back within a chunk, and some without
rotary embeddings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spicerack.models.gguf.family import FRAME, GROUPED, HEAD, NORMS, RMS, SILU, Family, Key

_PERIOD, _CHUNK = 4, 8192
"""Every so manyth block has no rotary embeddings and looks back all the way, others within a chunk of so many tokens:
llama_model_llama4::load_arch_hparams, whatever a file says."""
_LARGE = 128
"""Experts of the model whose queries and keys llama.cpp does not normalize."""
_STEP = "interleave_moe_layer_step"
_LAYER = "model.layers.{i}.feed_forward"


def _with_rotary(layers: int) -> list[int]:
    """1 for each block with rotary embeddings, 0 for those without."""
    return [int((i + 1) % _PERIOD != 0) for i in range(layers)]


def _normalizes(experts: int) -> bool:
    """Whether llama.cpp normalizes queries and keys."""
    return experts != _LARGE


def _refuses(config: Mapping[str, Any]) -> str | None:
    """Blocks of another kind than llama.cpp takes for granted."""
    layers, step = int(config["num_hidden_layers"]), int(config[_STEP])
    if not config["num_local_experts"] or not config["moe_layers"]:
        return "it has no experts, and llama.cpp wants some"
    if list(config["no_rope_layers"])[:layers] != _with_rotary(layers):
        return f"its no_rope_layers are not every {_PERIOD}th block, which llama.cpp takes for granted"
    kinds = ["chunked_attention" if one else "full_attention" for one in _with_rotary(layers)]
    if list(config["layer_types"]) != kinds:
        return "its layer_types are not those of its no_rope_layers, which llama.cpp takes for granted"
    if list(config["moe_layers"]) != list(range(step - 1, layers, step)):
        return f"its moe_layers are not those of {_STEP}, and a file says nothing else"
    if config["use_qk_norm"] != _normalizes(config["num_local_experts"]):
        return f"use_qk_norm is {config['use_qk_norm']}, and llama.cpp has another with so many experts"
    return None


def _to_config(keys: Mapping[str, Any], _names: Collection[str]) -> dict[str, Any]:
    """What llama.cpp takes for granted."""
    layers, experts = int(keys["block_count"]), int(keys["expert_count"])
    with_rotary = _with_rotary(min(layers, 10_000))
    return {
        "no_rope_layers": with_rotary,
        "layer_types": ["chunked_attention" if one else "full_attention" for one in with_rotary],
        "use_qk_norm": _normalizes(experts),
    }


FAMILY = Family(
    model_type="llama4_text",
    architecture="llama4",
    classes=("Llama4ForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **NORMS,
        f"{_LAYER}.router": "blk.{i}.ffn_gate_inp",
        **{f"{_LAYER}.{part}_proj": f"blk.{{i}}.ffn_{part}" for part in ("gate", "up", "down")},
        **{f"{_LAYER}.shared_expert.{part}_proj": f"blk.{{i}}.ffn_{part}_shexp" for part in ("gate", "up", "down")},
    },
    tensors={
        f"{_LAYER}.experts.gate_up_proj": ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight"),
        f"{_LAYER}.experts.down_proj": ("blk.{i}.ffn_down_exps.weight",),
    },
    transposed=frozenset({"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}),
    keys=(
        *(key for key in GROUPED if key.config != "intermediate_size"),
        RMS,
        *HEAD,
        Key("intermediate_size_mlp", "feed_forward_length"),
        Key("intermediate_size", "expert_feed_forward_length"),
        Key("num_local_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key(_STEP, "interleave_moe_layer_step"),
    ),
    scalings=("llama3",),
    kinds=("full_attention", "chunked_attention"),
    fixed={
        "hidden_act": SILU,
        "attention_bias": (False,),
        "attention_chunk_size": (_CHUNK,),
        "attn_temperature_tuning": (True,),
        "floor_scale": (_CHUNK,),
        "attn_scale": (0.1,),
    },
    settings={
        "hidden_act": "silu", "attention_bias": False, "attention_chunk_size": _CHUNK, "attn_temperature_tuning": True,
        "floor_scale": _CHUNK, "attn_scale": 0.1,
    },
    refuses=_refuses,
    to_config=_to_config,
)  # fmt: skip
