"""Tiny models of every family that GGUF has names for, with tokenizers, as folders and as files."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import tiny
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spicerack.exports.source import Source
from spicerack.exports.target import Order, find
from spicerack.runtime.folder import Folder

_GRANITE = {
    "attention_multiplier": 0.125, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "gpt_oss": {
        "intermediate_size": 64, "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "llama4_text": {
        "num_hidden_layers": 4, "attention_chunk_size": 8192, "interleave_moe_layer_step": 2, "moe_layers": [1, 3],
        "no_rope_layers": [1, 1, 1, 0], "layer_types": [*["chunked_attention"] * 3, "full_attention"],
    },
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True, "head_dim": 16},
}  # fmt: skip
"""What llama.cpp computes, or what tells one multiplier from another, where tiny configs say something else."""
CLASSES = {"bert": "BertModel", "nomic_bert": "NomicBertModel"}
"""Encoders without heads, as sentence encoders are."""
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "bert", "nomic_bert", "mixtral", "qwen2_moe",
    "qwen3_moe", "gpt2", "falcon", "starcoder2", "stablelm", "olmo2", "granite", "smollm3", "gpt_oss", "granitemoe",
    "granitemoeshared", "llama4_text",
)  # fmt: skip
ENCODERS = ("bert", "nomic_bert")
_TEXT = ["the cat sat on the mat and the dog ran to the red barn where the hens are"] * 4


@functools.cache
def folder(family: str) -> Path:
    """The folder of a tiny float32 model, the same each time."""
    of = tiny.config(family, tiny._small)
    for key, value in OVERRIDES.get(family, {}).items():
        setattr(of, key, value)
    cls = getattr(transformers, CLASSES.get(family) or tiny.families()[family][0])
    place = Path(tempfile.mkdtemp()) / family.replace("3", "-three")  # llama.cpp knows "phi3" by its name
    tiny._built(cls, of).save_pretrained(place)
    (word_pieces() if family in ENCODERS else byte_pieces()).save_pretrained(place)
    return place


def written(place: Path, output: Path, **order: Any) -> Path:
    """The GGUF file of a folder, quantized or not, without its being read back."""
    target, source = find("gguf"), Source.of(Folder.open(place))
    assert target.refusals("gguf", source) == []
    target.write(source, Order("gguf", output, lambda _path: None, {"to": "gguf"}, **order))
    return output


@functools.cache
def byte_pieces() -> PreTrainedTokenizerFast:
    """Pieces of bytes, as GPT-2 cuts a text."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@functools.cache
def word_pieces() -> PreTrainedTokenizerFast:
    """Pieces of words, as BERT has them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary += [word for word in dict.fromkeys(_TEXT[0].split()) if word not in vocabulary]
    vocabulary += [f"[unused{i}]" for i in range(tiny.VOCABULARY - len(vocabulary))]
    words = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
