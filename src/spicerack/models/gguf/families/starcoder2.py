"""StarCoder 2. llama.cpp looks back all the way: a window is kept, for us."""

from __future__ import annotations

from spicerack.models.gguf.family import FRAME, GELU_TANH, GROUPED, NORMS, Family, Key

FAMILY = Family(
    model_type="starcoder2",
    architecture="starcoder2",
    classes=("Starcoder2ForCausalLM",),
    prefix="model",
    modules={
        **FRAME,
        **NORMS,
        "model.layers.{i}.mlp.c_fc": "blk.{i}.ffn_up",
        "model.layers.{i}.mlp.c_proj": "blk.{i}.ffn_down",
    },
    keys=(
        *GROUPED,
        Key("norm_epsilon", "attention.layer_norm_epsilon", "f32"),
        Key("sliding_window", "attention.sliding_window"),
    ),
    fixed={"hidden_act": GELU_TANH, "use_bias": (True,)},
    settings={"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": None},
)
