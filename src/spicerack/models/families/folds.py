"""Data only: where a factor per channel can be moved from one part of a block into another, per family of models.

(source, readers), as paths in a block: what leaves the source is read by the readers and by nothing else, so that
dividing the one and multiplying the columns of the others by the same factors changes nothing. Between an up and a down
projection stands only a product with the gate, or an activation f with f(cx) = c f(x); between values and the output
projection only a weighted sum over tokens.
"""

Fold = tuple[str, tuple[str, ...]]
"""(source, readers)."""

_ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_VALUES: Fold = ("self_attn.v_proj", ("self_attn.o_proj",))
_UP: Fold = ("mlp.up_proj", ("mlp.down_proj",))

_LLAMA: tuple[Fold, ...] = (
    ("input_layernorm", _ATTENTION_INPUT),
    _VALUES,
    ("post_attention_layernorm", _GATE_UP),
    _UP,
)
_GEMMA: tuple[Fold, ...] = (
    ("input_layernorm", _ATTENTION_INPUT),
    _VALUES,
    ("pre_feedforward_layernorm", _GATE_UP),
    _UP,
)
_EXPERTS: tuple[Fold, ...] = (("input_layernorm", _ATTENTION_INPUT), _VALUES)
_BERT: tuple[Fold, ...] = (("attention.self.value", ("attention.output.dense",)),)

FOLDS: dict[str, tuple[Fold, ...]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "stablelm", "helium", "arcee", "gemma", "glm4_moe",
         "seed_oss"),
        _LLAMA,
    ),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _EXPERTS),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    "mpnet": (("attention.attn.v", ("attention.attn.o",)),),
    "distilbert": (("attention.v_lin", ("attention.out_lin",)),),
    "cohere": (("input_layernorm", (*_ATTENTION_INPUT, *_GATE_UP)), _VALUES, _UP),
    "phi3": (("input_layernorm", ("self_attn.qkv_proj",)), ("post_attention_layernorm", ("mlp.gate_up_proj",))),
    "phi": (
        ("input_layernorm", (*_ATTENTION_INPUT, "mlp.fc1")),
        ("self_attn.v_proj", ("self_attn.dense",)),
    ),
    "opt": (
        ("self_attn_layer_norm", _ATTENTION_INPUT),
        ("self_attn.v_proj", ("self_attn.out_proj",)),
        ("final_layer_norm", ("fc1",)),
        ("fc1", ("fc2",)),
    ),
    "gpt2": (("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
    "gpt_neox": (
        ("input_layernorm", ("attention.query_key_value",)),
        ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    "bloom": (
        ("input_layernorm", ("self_attention.query_key_value",)),
        ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    "gptj": (("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")), ("attn.v_proj", ("attn.out_proj",))),
}  # fmt: skip
"""Every fold is tried on the block before it is kept: one that changes what the block computes is left out, and said.
Families that are not here get every method that folds nothing."""

UNIT_OFFSET = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})
"""Families whose norms multiply by 1 + weight."""
