"""nomic-embed-text 1 and 1.5: BERT with rotary embeddings and a gate, as transformers has it."""

from __future__ import annotations

from spicerack.models.gguf.family import SIZES, Family, Key

FAMILY = Family(
    model_type="nomic_bert",
    architecture="nomic-bert",
    classes=("NomicBertModel", "NomicBertForMaskedLM"),
    prefix="nomic_bert",
    modules={
        "embeddings.word_embeddings": "token_embd",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "token_embd_norm",
        "layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
        "layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
        "layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
        "layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
        "layers.{i}.post_attention_layernorm": "blk.{i}.attn_output_norm",
        "layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
        "layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
        "layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
        "layers.{i}.post_mlp_layernorm": "blk.{i}.layer_output_norm",
        # what the files of its makers call the same
        "emb_ln": "token_embd_norm",
        "encoder.layers.{i}.attn.Wqkv": "blk.{i}.attn_qkv",
        "encoder.layers.{i}.attn.out_proj": "blk.{i}.attn_output",
        "encoder.layers.{i}.norm1": "blk.{i}.attn_output_norm",
        "encoder.layers.{i}.mlp.fc11": "blk.{i}.ffn_up",
        "encoder.layers.{i}.mlp.fc12": "blk.{i}.ffn_gate",
        "encoder.layers.{i}.mlp.fc2": "blk.{i}.ffn_down",
        "encoder.layers.{i}.norm2": "blk.{i}.layer_output_norm",
    },
    keys=(*SIZES, Key("layer_norm_eps", "attention.layer_norm_epsilon", "f32")),
    fixed={"hidden_act": ("silu", "swish")},
    settings={"hidden_act": "silu"},
    left_out=(r"cls\..*", r".*rotary_emb\.inv_freq"),
    encoder=True,
)
