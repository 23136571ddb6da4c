"""Data only: what the parts of models are called in checkpoints, over all families that transformers knows.

A name below is one component of a tensor's name (`model.layers.0.self_attn.q_proj.weight` has the component `q_proj`).
A new family whose parts are called as others' are needs nothing here; one with words of its own adds them to these
sets.
"""

LINEAR = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "qkv", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "in_proj", "x_proj", "dt_proj",
    "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "eh_proj", "fc1", "fc2",
    "fc_in", "fc_out", "dense", "query", "key", "value", "query_key_value", "dense_h_to_4h", "dense_4h_to_h", "q",
    "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "w1", "w2", "w3", "wq", "wk", "wv", "Wqkv", "Wi", "Wo", "q_lin",
    "k_lin", "v_lin", "out_lin", "lin1", "lin2", "c_attn", "c_fc", "c_proj", "q_attn", "linear_1", "linear_2",
    "linear1", "linear2", "ffn_output",
})  # fmt: skip
"""Linear layers beyond doubt, whatever their shape."""

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp", "clvp_decoder"})
"""Families that have GPT-2's Conv1D."""
CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""GPT-2's Conv1D: a linear layer that stores [in, out]. Other families use these names for plain Linear."""

TOKEN_EMBEDDINGS = frozenset({
    "embed_tokens", "wte", "word_embeddings", "word_embedding", "shared", "embed_in", "tok_embeddings",
    "embeddings", "embedding", "tokens_embed", "token_embedding", "token_embeddings", "embed_text_tokens",
    "text_embed_tokens",
})  # fmt: skip
"""The input embedding of tokens: what a head may be tied to."""

EMBEDDINGS = TOKEN_EMBEDDINGS | frozenset({
    "wpe", "position_embedding", "position_embeddings", "positions_embed", "token_type_embeddings",
    "embed_positions", "relative_attention_bias", "rel_embeddings", "rel_pos_emb", "distance_embedding",
    "pos_embed", "pos_emb", "embed", "row_embedder", "column_embedder", "row_embeddings", "column_embeddings",
    "embed_audio_tokens", "ngram_embedding", "input_embeds_layer", "position_embeds_layer",
    "position_embedding_table", "queries_embedder", "relative_position_bias", "block_embeddings",
    "embed_tokens_per_layer", "mask_tokens", "iou_token", "obj_score_token",
})  # fmt: skip
"""Tables whose rows are looked up. Other names that end in `_embedding(s)` count too, except the ones below."""

LINEAR_DESPITE_EMBED = frozenset({
    "patch_embed", "patch_embedding", "class_embed", "vision_embed_tokens", "input_embedding",
    "predictor_embeddings", "decoder_embeddings", "relative_pos_embeddings", "box_linear_embeddings",
    "xpath_unitseq2_embeddings",
})  # fmt: skip
"""Matrices that are multiplied with, although they are called embeddings: of patches, boxes, classes ..."""

HEADS = frozenset({
    "lm_head", "embed_out", "score", "classifier", "cls", "qa_outputs", "classification_head", "generator_lm_head",
    "text_lm_head", "codec_head", "ctc_head", "vocab_projector", "lm_loss", "generator_predictions",
    "discriminator_predictions", "output_projection", "logits_proj", "logits_head", "class_predictor",
    "class_embed", "multiple_choice_head", "qa_classifier", "pred_layer", "shared_head", "nsp_classifier",
    "sop_classifier", "enc_score_head",
})  # fmt: skip
"""Output layers, and the layers that belong to them: any component of the name."""

HEADS_BY_SHAPE = frozenset({"output", "proj_out", "head", "decoder", "out", "proj", "fc", "heads", "classifiers"})
"""Names that mean the output layer only where the tensor has one row per vocabulary entry or label."""

ROUTERS = frozenset({"router", "shared_expert_gate", "routers"})
"""Routers of a mixture, wherever the name stands in a tensor's."""
GATES = frozenset({"gate", "wg", "gating"})
"""Last components that are routers where the tensor has one row per expert; else gates of an MLP."""

EXPERTS = frozenset({"experts", "expert"})
"""Parents of experts, one by one or fused."""
STACKED_EXPERTS = frozenset({"input_linear", "output_linear", "w13_weight", "w2_weight"})
"""Fused expert tensors [experts, out, in] that have no parent called experts (Granite, JetMoE)."""
WRITE_HIDDEN = frozenset({"down_proj", "w2", "wo", "fc2", "output_linear", "w2_weight"})
"""Fused expert tensors whose outputs are the hidden states; the others read these."""
DBRX_EXPERTS = frozenset({"w1", "v1", "w2"})
"""DBRX's own, which stacks its experts along the rows: [experts * inner, hidden], of which w2 is stored [in, out]."""

EXPERTS_ONE_BY_ONE = frozenset({"JetMoeParallelExperts", "Llama4TextExperts"})
"""Classes of modules whose own code multiplies as `nn.experts.ExpertStack` can answer, beside those that transformers
decorates as having an eager loop."""

EXPERTS_IN_OUT = frozenset({
    "gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter", "qwen3_vl_moe",
    "qwen3_vl_moe_text",
})  # fmt: skip
"""Families whose fused experts are stored [experts, in, out]."""

TIED_BY_DEFAULT = frozenset({
    "albert", "bart", "bert", "bigbird_pegasus", "big_bird", "bloom", "camembert", "cohere", "cohere2", "convbert",
    "ctrl", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "falcon", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma3n", "gemma4", "gpt2", "gpt_bigcode", "gpt_neo", "led", "longformer", "m2m_100", "mamba",
    "marian", "mbart", "mobilebert", "modernbert", "mpnet", "mpt", "openai-gpt", "opt", "pegasus", "roberta",
    "roformer", "t5", "mt5", "whisper", "xglm", "xlm", "xlm-roberta", "xlnet",
})  # fmt: skip
"""Families that tie the head to the embedding unless their config.json says otherwise."""

HEAD_OF = {
    "bert": "cls.predictions.decoder",
    "big_bird": "cls.predictions.decoder",
    "ernie": "cls.predictions.decoder",
    "mobilebert": "cls.predictions.decoder",
    "deberta": "cls.predictions.decoder",
    "deberta-v2": "cls.predictions.decoder",
    "albert": "predictions.decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
    "camembert": "lm_head.decoder",
    "longformer": "lm_head.decoder",
    "mpnet": "lm_head.decoder",
    "esm": "lm_head.decoder",
    "modernbert": "decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "gpt_neox": "embed_out",
    "whisper": "proj_out",
    "xlm": "pred_layer.proj",
    "xlnet": "lm_loss",
}
"""What the tied head is called where it is not `lm_head`: it is absent from most files, but recipes may name it."""

TOLD_BY_NAMES = frozenset({
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "olmo", "olmo2", "smollm3", "stablelm", "granite", "cohere",
    "deepseek_v3", "bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "mpnet", "t5", "bart", "vit",
})  # fmt: skip
"""Families of which the names of tensors alone tell what `quantize` does; tests compare that with transformers."""

SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Layers of one parent that read the same input. Engines fuse them into one matrix, so they need one scheme."""

CROSS_ATTENTION = frozenset({"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"})
"""Here queries read the decoder and keys and values the encoder, so that only the latter share an input."""

CONTAINERS = frozenset({"model", "transformer", "backbone"})
"""Components that say nothing about a layer's kind."""

PLAIN_LINEAR = frozenset({"FalconLinear"})
"""Subclasses of torch's Linear in transformers that compute the same."""

SCALED_EMBEDDING = frozenset({
    "BartScaledWordEmbedding", "BigBirdPegasusScaledWordEmbedding", "BioGptScaledWordEmbedding",
    "BlenderbotScaledWordEmbedding", "DiffusionGemmaTextScaledWordEmbedding",
    "EmbeddingGemma2TextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding",
    "Gemma3nTextScaledWordEmbedding", "Gemma4TextScaledWordEmbedding", "Gemma4UnifiedTextScaledWordEmbedding",
    "GemmaTextScaledWordEmbedding", "M2M100ScaledWordEmbedding", "MBartScaledWordEmbedding",
    "MiniCPM3ScaledWordEmbedding", "NllbMoeScaledWordEmbedding", "PLBartScaledWordEmbedding",
    "PPFormulaNetScaledWordEmbedding", "PegasusXScaledWordEmbedding", "SeamlessM4TScaledWordEmbedding",
    "SeamlessM4Tv2ScaledWordEmbedding", "TrOCRScaledWordEmbedding", "VaultGemmaTextScaledWordEmbedding",
    "XGLMScaledWordEmbedding",
})  # fmt: skip
"""Subclasses of torch's Embedding in transformers whose rows are multiplied by a number, `embed_scale`, and that is
all."""

WRAPPED = ("base_layer", "original_module")
"""What PEFT's adapters call the layer around which they are."""

KEY_VALUE_CACHES = ("cache", "past_key_values")
"""What models call their cache of keys and values, as an argument and in their output: transformers renamed it."""

STATES = (*KEY_VALUE_CACHES, "cache_params")
"""What models call whatever they remember of the tokens before: such a cache, or the state of a recurrence."""
