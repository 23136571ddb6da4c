"""BERT and the sentence encoders of its class: MiniLM, BGE, E5, GTE ..."""

from __future__ import annotations

from spicerack.models.gguf.family import SIZES, Family, Key

_LAYER = "encoder.layer.{i}"

FAMILY = Family(
    model_type="bert",
    architecture="bert",
    classes=("BertModel", "BertForMaskedLM", "BertLMHeadModel", "BertForPreTraining"),
    prefix="bert",
    modules={
        "embeddings.word_embeddings": "token_embd",
        "embeddings.position_embeddings": "position_embd",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "token_embd_norm",
        f"{_LAYER}.attention.self.query": "blk.{i}.attn_q",
        f"{_LAYER}.attention.self.key": "blk.{i}.attn_k",
        f"{_LAYER}.attention.self.value": "blk.{i}.attn_v",
        f"{_LAYER}.attention.output.dense": "blk.{i}.attn_output",
        f"{_LAYER}.attention.output.LayerNorm": "blk.{i}.attn_output_norm",
        f"{_LAYER}.intermediate.dense": "blk.{i}.ffn_up",
        f"{_LAYER}.output.dense": "blk.{i}.ffn_down",
        f"{_LAYER}.output.LayerNorm": "blk.{i}.layer_output_norm",
        "pooler.dense": "cls",
    },
    keys=(*SIZES, Key("layer_norm_eps", "attention.layer_norm_epsilon", "f32")),
    rope=False,
    fixed={"hidden_act": ("gelu",), "position_embedding_type": ("absolute", None), "is_decoder": (False,)},
    settings={"hidden_act": "gelu"},
    left_out=(r"(bert\.)?embeddings\.position_ids", r"cls\..*"),
    encoder=True,
    pooler="pooler.dense",
)
