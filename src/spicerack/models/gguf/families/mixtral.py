"""Mixtral: a llama with experts, as llama.cpp has it."""

from __future__ import annotations

from spicerack.models.gguf.family import FRAME, GROUPED, HEAD, LLAMA_SCALINGS, NORMS, RMS, SILU, Family, Key

_MOE = "model.layers.{i}.block_sparse_moe"

FAMILY = Family(
    model_type="mixtral",
    architecture="llama",
    classes=("MixtralForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **NORMS,
        f"{_MOE}.gate": "blk.{i}.ffn_gate_inp",
        f"{_MOE}.experts.{{e}}.w1": "blk.{i}.ffn_gate_exps",
        f"{_MOE}.experts.{{e}}.w3": "blk.{i}.ffn_up_exps",
        f"{_MOE}.experts.{{e}}.w2": "blk.{i}.ffn_down_exps",
    },
    keys=(
        *GROUPED,
        RMS,
        *HEAD,
        Key("num_local_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key("sliding_window", "attention.sliding_window"),
    ),
    rows={"attn_q": "queries", "attn_k": "keys"},
    scalings=LLAMA_SCALINGS,
    scaled=True,
    fixed={"hidden_act": SILU},
    settings={"hidden_act": "silu", "sliding_window": None},
    marks=("expert_count",),
)
