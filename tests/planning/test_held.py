"""What a cache is said to keep is what ours and transformers' keep, for every kind of layer that can be built here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spicerack.nn import cache_segments
from spicerack.nn.cache import QuantizedCache, nbytes
from spicerack.planning import cache
from spicerack.planning.anatomy.fields import text_of

SMALL = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
DELTA = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {}, "phi3": {}, "qwen2": {}, "falcon": {"multi_query": True}, "mixtral": {"num_local_experts": 2},
    "mistral": {"sliding_window": 64}, "cohere2": {"sliding_window": 64},
    "gemma2": {"head_dim": 32, "sliding_window": 64},
    "gemma3_text": {"head_dim": 32, "sliding_window": 64, "num_hidden_layers": 7},
    "gpt_oss": {"head_dim": 32, "sliding_window": 64, **EXPERTS},
    "llama4_text": {"head_dim": 32, "attention_chunk_size": 64, "intermediate_size_mlp": 48, **EXPERTS},
    "glm4_moe": {"head_dim": 32, **ROUTED},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, **ROUTED,
    },
}  # fmt: skip
STATES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        **DELTA,
    },
    "qwen3_5_text": DELTA,
    "granitemoehybrid": {
        "shared_intermediate_size": 32, "layer_types": ["mamba", "attention", "mamba", "mamba"], **EXPERTS, **MAMBA,
    },
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "falcon_h1": {"mamba_d_ssm": 128, **MAMBA},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "use_mamba_kernels": False,
        "num_experts": 2, "num_experts_per_tok": 1,
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
        "hybrid_override_pattern": "M-*M", "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}  # fmt: skip


def build(family: str, sizes: dict[str, Any]) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](**{**SMALL, **sizes})
    return AutoModelForCausalLM.from_config(config).float().eval()


def said(model: PreTrainedModel, tokens: int, bits: float = 4.0) -> float:
    """Bytes for two sequences, by our rule, of a model in float32."""
    config = model.config.to_dict()
    family = str(text_of(config)["model_type"])
    room = cache.Room(tokens, 2, bits, 4.0)
    return sum(cache.nbytes(layer, room, "spicerack", family) for layer in cache.layers(config))


@pytest.mark.parametrize("family", [*ATTENTION, *STATES])
def test_what_is_kept_after_a_prompt_and_a_token(family: str) -> None:
    model = build(family, (ATTENTION | STATES)[family])
    for tokens in (50, 200):
        ids = torch.randint(3, 90, (2, tokens))
        with torch.no_grad():
            kept = DynamicCache(config=model.config)
            model(input_ids=ids[:, :-1], cache=kept, use_cache=True)
            model(input_ids=ids[:, -1:], cache=kept, use_cache=True)
        assert nbytes(kept) == said(model, tokens)


def test_rwkv_keeps_its_state() -> None:
    model = build("rwkv", {})
    with torch.no_grad():
        kept = model(input_ids=torch.randint(3, 90, (2, 50)), use_cache=True).state
    assert sum(state.nbytes for state in kept) == said(model, 50)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ATTENTION)
def test_what_is_kept_in_few_bits(family: str, bits: int) -> None:
    model = build(family, ATTENTION[family])
    for tokens in (20, 50, 95, 96, 97, 200):
        kept = QuantizedCache(model.config, bits)
        ids = torch.randint(3, 90, (2, tokens))
        with torch.no_grad():
            model(input_ids=ids[:, :-1], cache=kept, use_cache=True)
            model(input_ids=ids[:, -1:], cache=kept, use_cache=True)
        assert kept.nbytes == said(model, tokens, bits / 8), tokens


def test_segments_are_those_of_the_cache() -> None:
    scheme = cache_segments.CacheScheme(4)
    assert (cache._SEGMENT, cache._RESIDUAL) == (cache_segments.TOKENS, scheme.residual) == (scheme.group, 32)
