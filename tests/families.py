"""Tiny random models of many families: name -> (config class, what to set, model class), all names of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 99}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TWO_TOWERS = {"text_config": SMALL, "vision_config": VISION}
AUDIO = {"max_source_positions": 30, "max_target_positions": 20, "num_mel_bins": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MLA = {
    **SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
GATED_DELTA = {
    **MOE, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
DBRX = {
    "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99, "max_seq_len": 64,
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
}  # fmt: skip
WAV2VEC = {
    **SMALL, "conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
QWEN_VL = {
    "text_config": {
        **LLAMA,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
}

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "albert": ("AlbertConfig", {**SMALL, "embedding_size": 16}, "AlbertForMaskedLM"),
    "bart": ("BartConfig", {**SEQ2SEQ, "max_position_embeddings": 64}, "BartForConditionalGeneration"),
    "bert": ("BertConfig", SMALL, "BertModel"),
    "bert-classifier": ("BertConfig", SMALL, "BertForSequenceClassification"),
    "bert-mlm": ("BertConfig", SMALL, "BertForMaskedLM"),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, "BloomForCausalLM"),
    "clip": ("CLIPConfig", TWO_TOWERS, "CLIPModel"),
    "cohere": ("CohereConfig", LLAMA, "CohereForCausalLM"),
    "dbrx": ("DbrxConfig", DBRX, "DbrxForCausalLM"),
    "deberta": ("DebertaV2Config", SMALL, "DebertaV2Model"),
    "deepseek_v3": ("DeepseekV3Config", MLA, "DeepseekV3ForCausalLM"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
        "DistilBertForMaskedLM",
    ),
    "electra": ("ElectraConfig", {**SMALL, "embedding_size": 16}, "ElectraForPreTraining"),
    "falcon": ("FalconConfig", SMALL, "FalconForCausalLM"),
    "gemma2": ("Gemma2Config", LLAMA, "Gemma2ForCausalLM"),
    "gemma3": (
        "Gemma3Config",
        {"text_config": LLAMA, "vision_config": VISION, "mm_tokens_per_image": 4},
        "Gemma3ForConditionalGeneration",
    ),
    "gemma3-text": ("Gemma3TextConfig", LLAMA, "Gemma3ForCausalLM"),
    "gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel"),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT, "GPTBigCodeForCausalLM"),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "hidden_size": 32,
            "vocab_size": 99,
        },
        "GPTNeoForCausalLM",
    ),
    "gpt_neox": ("GPTNeoXConfig", SMALL, "GPTNeoXForCausalLM"),
    "gpt_oss": ("GptOssConfig", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, "GptOssForCausalLM"),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 8}, "GPTJForCausalLM"),
    "granitemoe": ("GraniteMoeConfig", {**LLAMA, "num_local_experts": 4}, "GraniteMoeForCausalLM"),
    "imagegpt": ("ImageGPTConfig", GPT, "ImageGPTForCausalImageModeling"),
    "jetmoe": (
        "JetMoeConfig",
        {**SMALL, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
        "JetMoeForCausalLM",
    ),
    "lfm2": ("Lfm2Config", {**LLAMA, "layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM"),
    "llama": ("LlamaConfig", LLAMA, "LlamaForCausalLM"),
    "llama4": (
        "Llama4TextConfig",
        {**LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 16},
        "Llama4ForCausalLM",
    ),
    "mamba": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 8},
        "MambaForCausalLM",
    ),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "num_heads": 8, "head_dim": 8, "n_groups": 2},
        "Mamba2ForCausalLM",
    ),
    "mistral": ("MistralConfig", LLAMA, "MistralForCausalLM"),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, "MixtralForCausalLM"),
    "modernbert": ("ModernBertConfig", {**SMALL, "pad_token_id": 0}, "ModernBertForMaskedLM"),
    "mpnet": ("MPNetConfig", SMALL, "MPNetModel"),
    "openai-gpt": ("OpenAIGPTConfig", GPT, "OpenAIGPTLMHeadModel"),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16}, "OPTForCausalLM"),
    "phi": ("PhiConfig", SMALL, "PhiForCausalLM"),
    "phi3": ("Phi3Config", {**LLAMA, "pad_token_id": 0}, "Phi3ForCausalLM"),
    "qwen2": ("Qwen2Config", LLAMA, "Qwen2ForCausalLM"),
    "qwen2_moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 40}, "Qwen2MoeForCausalLM"),
    "qwen2_vl": ("Qwen2VLConfig", QWEN_VL, "Qwen2VLForConditionalGeneration"),
    "qwen3": ("Qwen3Config", {**LLAMA, "tie_word_embeddings": True}, "Qwen3ForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", MOE, "Qwen3MoeForCausalLM"),
    "qwen3_next": ("Qwen3NextConfig", GATED_DELTA, "Qwen3NextForCausalLM"),
    "roberta": ("RobertaConfig", SMALL, "RobertaForMaskedLM"),
    "rwkv": ("RwkvConfig", {**SMALL, "context_length": 64}, "RwkvForCausalLM"),
    "siglip": ("SiglipConfig", TWO_TOWERS, "SiglipModel"),
    "smollm3": ("SmolLM3Config", {**LLAMA, "pad_token_id": 0}, "SmolLM3ForCausalLM"),
    "swin": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        "SwinForImageClassification",
    ),
    "switch": (
        "SwitchTransformersConfig",
        {**T5, "num_decoder_layers": 2, "num_experts": 4},
        "SwitchTransformersForConditionalGeneration",
    ),
    "t5": ("T5Config", T5, "T5ForConditionalGeneration"),
    "vit": ("ViTConfig", VISION, "ViTForImageClassification"),
    "wav2vec2": ("Wav2Vec2Config", WAV2VEC, "Wav2Vec2ForCTC"),
    "whisper": ("WhisperConfig", {**SEQ2SEQ, **AUDIO, **TOKENS}, "WhisperForConditionalGeneration"),
    "xlnet": (
        "XLNetConfig",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 99},
        "XLNetLMHeadModel",
    ),
}


def build(family: str) -> transformers.PreTrainedModel:
    """A random model of the family, the same each time."""
    config, settings, model = FAMILIES[family]
    torch.manual_seed(0)
    instance: transformers.PreTrainedModel = vars_of(model)(vars_of(config)(**settings))
    return instance


def vars_of(name: str) -> Any:
    """A class of transformers, which loads them when they are asked for."""
    return getattr(transformers, name)


def is_seq2seq(model: transformers.PreTrainedModel) -> bool:
    """Whether its forward wants decoder inputs too."""
    return bool(model.config.is_encoder_decoder)
