"""Data only: what single families need to be built tiny, beside the rules of `tiny.py`."""

from __future__ import annotations

from typing import Any

_SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "image_size": 64}
_GLM_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_QWEN_VL = {"text_config": _GLM_ROPE}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_MIMI = {"hidden_size": 64, "num_filters": 8, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32}

OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bailing_hybrid": {**_LINEAR_THEN_FULL, "n_group": 2, "num_experts": 4, "topk_group": 1, "num_experts_per_tok": 2},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "donut-swin": _SWIN,
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_heads": 8},
    "gemma3n_text": {
        "intermediate_size": 96, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "glm46v": _QWEN_VL, "glm4v": _QWEN_VL, "glm4v_moe": _QWEN_VL, "glm_ocr": _QWEN_VL, "glm_image": _QWEN_VL,
    "glm4v_text": _GLM_ROPE, "glm4v_moe_text": _GLM_ROPE, "glm_ocr_text": _GLM_ROPE, "glm_image_text": _GLM_ROPE,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": {"prediction_length": 4},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "kimi_linear": {**_LINEAR_THEN_FULL, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {
        "qk_rope_head_dim": 16, "head_dim": 16, "qk_head_dim": 32, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96,
        "zero_expert_num": 2, "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "maskformer-swin": _SWIN,
    "mimi": _MIMI,
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_vl": _QWEN_VL, "qwen2_vl": _QWEN_VL, "qwen2_5_vl_text": _GLM_ROPE, "qwen2_vl_text": _GLM_ROPE,
    "qwen4_exp_text": {"token_budget": 8, "compress_ratio": 4, **_LINEAR_THEN_FULL},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": (4, 8), "axial_pos_embds_dim": (32, 32), "max_position_embeddings": 32,
        "num_buckets": 4, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "attn_layers": ["local", "lsh"],
        "feed_forward_size": 96,
    },
    "resnet": {"embedding_size": 16},
    "rwkv": {"attention_hidden_size": 64, "intermediate_size": 96},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "wav2vec2-conformer": {"vocab_size": 300},
    "xlnet": {"d_head": 16},
    "xlstm": {"qk_dim_factor": 1.0, "num_heads": 4, "chunk_size": 16, "head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4},
    "zamba": {
        "attn_layer_period": 3, "attn_layer_offset": 2, "num_hidden_layers": 6, "attention_head_dim": 32,
        "n_mamba_heads": 2, "mamba_dt_rank": 8,
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 2, "adapter_rank": 32, "mamba_ngroups": 1, "n_mamba_heads": 8, "attention_head_dim": 32,
    },
}  # fmt: skip
