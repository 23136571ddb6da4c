"""The tensors that a model's folder would have, from config.json alone: names, shapes, how many are alike.

A family's blocks are made of parts that families share (`parts`), so a family is a row that says which parts it has.
Names are those of checkpoints.

What is given up. Families that are not rows here are refused by name, with headers as the remedy: a shape that is
guessed is a byte count that is wrong, and nobody sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spicerack.errors import CheckpointError
from spicerack.planning.anatomy import towers
from spicerack.planning.anatomy.fields import MOST_LAYERS, Fields, text_of
from spicerack.planning.anatomy.kinds import kinds
from spicerack.planning.anatomy.parts import (
    Attention,
    Block,
    DeltaNet,
    Part,
    Tensor,
    deepseek_mixture,
    fused_mlp,
    gated_mlp,
    gpt_oss_mixture,
    granite_mixture,
    latent,
    linear,
    llama4_mixture,
    mamba1,
    mamba2,
    mixtral,
    norm,
    qwen_mixture,
    stacked_qwen_mixture,
)


def tensors(config: Mapping[str, Any]) -> list[Tensor]:
    """All tensors of a model with this config.json, in the order of its layers; a tied head is in no file.

    Raises CheckpointError for families that are not known here, with those that are, and for missing fields.
    """
    kind = str(text_of(config).get("model_type", config.get("model_type")))
    family = FAMILIES.get(kind) or FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"the tensors of the family {kind!r} are not known from config.json alone",
            f"give the model's folder, or one of: {', '.join(sorted(FAMILIES))}",
        )
    return list(family(config))


@dataclass(frozen=True, slots=True)
class Decoder:
    """A family of decoders: a table, blocks that are alike or of two kinds, a norm, a head.

    attention   of a block
    mlp         of a block
    other       in place of attention, in the layers that `cache.kinds` calls linear
    norms       of a block
    prefix      of all but the head
    head        its name, where it is not tied
    tied        whether it is, where config.json says nothing
    tower       for pictures, with its prefix
    """

    attention: Block
    mlp: Block
    other: Block | None = None
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    prefix: str = "model."
    head: str = "lm_head"
    tied: bool = False
    tower: tuple[Callable[[Mapping[str, Any], int, str], Part], str] | None = None

    def __call__(self, config: Mapping[str, Any]) -> Part:
        """Its tensors. config: the whole of config.json."""
        text = text_of(config)
        c = Fields(text, str(text.get("model_type", config.get("model_type"))))
        if self.tower is not None and isinstance(config.get("vision_config"), dict):
            tower, prefix = self.tower
            yield from tower(config["vision_config"], c.hidden, prefix)
        yield Tensor(f"{self.prefix}embed_tokens.weight", (c.vocabulary, c.hidden))
        for i, kind in enumerate(kinds(text)):
            at = f"{self.prefix}layers.{i}."
            yield from (self.other or self.attention)(c, i, at) if kind == "linear" else self.attention(c, i, at)
            yield from self.mlp(c, i, at)
            for name in self.norms:
                yield from norm(f"{at}{name}", c.hidden)
        yield from norm(f"{self.prefix}norm", c.hidden)
        if not tied(config, self.tied):
            yield from linear(self.head, c.vocabulary, c.hidden)


def tied(config: Mapping[str, Any], default: bool) -> bool:
    """Whether head and input table are one. default: the family's habit, where config.json says nothing."""
    for section in (text_of(config), config):
        if isinstance(section.get("tie_word_embeddings"), bool):
            return bool(section["tie_word_embeddings"])
    return default


def _mamba(config: Mapping[str, Any]) -> Part:
    """Mamba: a table, blocks of one norm and one mixer."""
    c = Fields(config, "mamba")
    yield Tensor("backbone.embeddings.weight", (c.vocabulary, c.hidden))
    for i in range(c.layers):
        yield from norm(f"backbone.layers.{i}.norm", c.hidden)
        yield from mamba1(c, i, f"backbone.layers.{i}.")
    yield from norm("backbone.norm_f", c.hidden)
    if not tied(config, True):
        yield from linear("lm_head", c.vocabulary, c.hidden)


def _t5(config: Mapping[str, Any]) -> Part:
    """T5: encoder and decoder under one table."""
    c = Fields(config, "t5")
    heads, inner = c.heads, c.heads * c.size("d_kv")
    gated = str(c.get("feed_forward_proj") or "relu").startswith("gated")
    yield Tensor("shared.weight", (c.vocabulary, c.hidden))
    for side, layers in (
        ("encoder", c.layers),
        ("decoder", c.size("num_decoder_layers", default=c.layers, most=MOST_LAYERS)),
    ):
        attentions = ("SelfAttention",) if side == "encoder" else ("SelfAttention", "EncDecAttention")
        for i in range(layers):
            block = f"{side}.block.{i}.layer."
            for j, name in enumerate(attentions):
                for part in ("q", "k", "v"):
                    yield from linear(f"{block}{j}.{name}.{part}", inner, c.hidden)
                yield from linear(f"{block}{j}.{name}.o", c.hidden, inner)
                if i == 0 and j == 0:
                    buckets = c.size("relative_attention_num_buckets", default=32)
                    yield Tensor(f"{block}0.SelfAttention.relative_attention_bias.weight", (buckets, heads))
                yield from norm(f"{block}{j}.layer_norm", c.hidden)
            at = f"{block}{len(attentions)}."
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                yield from linear(f"{at}DenseReluDense.{part}", c.inner, c.hidden)
            yield from linear(f"{at}DenseReluDense.wo", c.hidden, c.inner)
            yield from norm(f"{at}layer_norm", c.hidden)
        yield from norm(f"{side}.final_layer_norm", c.hidden)
    if not tied(config, True):
        yield from linear("lm_head", c.vocabulary, c.hidden)


def _whisper(config: Mapping[str, Any]) -> Part:
    """Whisper: an encoder of sound and a decoder of text; keys have no bias."""
    c = Fields(config, "whisper")
    width = c.hidden
    yield Tensor("model.encoder.conv1.weight", (width, c.size("num_mel_bins"), 3))
    yield Tensor("model.encoder.conv1.bias", (width,))
    yield Tensor("model.encoder.conv2.weight", (width, width, 3))
    yield Tensor("model.encoder.conv2.bias", (width,))
    yield Tensor("model.encoder.embed_positions.weight", (c.size("max_source_positions"), width))
    yield Tensor("model.decoder.embed_tokens.weight", (c.vocabulary, width))
    yield Tensor("model.decoder.embed_positions.weight", (c.size("max_target_positions"), width))
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        inner = c.size(f"{side}_ffn_dim")
        for i in range(c.size(f"{side}_layers", most=MOST_LAYERS)):
            block = f"model.{side}.layers.{i}."
            for name in attentions:
                for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    yield from linear(f"{block}{name}.{part}", width, width, bias=part != "k_proj")
                yield from norm(f"{block}{name}_layer_norm", width, bias=True)
            yield from linear(f"{block}fc1", inner, width, bias=True)
            yield from linear(f"{block}fc2", width, inner, bias=True)
            yield from norm(f"{block}final_layer_norm", width, bias=True)
        yield from norm(f"model.{side}.layer_norm", width, bias=True)
    if not tied(config, True):
        yield from linear("proj_out", c.vocabulary, width)


_GEMMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
_PLAIN = Attention(out_bias="attention_bias")
_QWEN3 = Attention(norms=True, out_bias="attention_bias")
_LLAMA = Decoder(_PLAIN, gated_mlp)

FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], Part]] = {
    "llama": _LLAMA,
    "mistral": Decoder(Attention(bias=False), gated_mlp),
    "qwen2": Decoder(Attention(bias=True), gated_mlp),
    "qwen3": Decoder(_QWEN3, gated_mlp),
    "phi3": Decoder(Attention(bias=False, fused=True), fused_mlp),
    "gemma": Decoder(_PLAIN, gated_mlp, tied=True),
    "gemma2": Decoder(_PLAIN, gated_mlp, norms=_GEMMA_NORMS, tied=True),
    "gemma3_text": Decoder(
        Attention(norms=True, out_bias="attention_bias"), gated_mlp, norms=_GEMMA_NORMS, tied=True,
        prefix="language_model.model.", head="language_model.lm_head", tower=(towers.siglip, ""),
    ),
    "mixtral": Decoder(Attention(bias=False), mixtral),
    "qwen3_moe": Decoder(_QWEN3, qwen_mixture),
    "qwen3_next": Decoder(
        Attention(norms=True, gated=True, out_bias="attention_bias"), qwen_mixture, other=DeltaNet(fused=True)
    ),
    "qwen3_5_text": Decoder(
        Attention(norms=True, gated=True, out_bias="attention_bias"), gated_mlp, other=DeltaNet(fused=False),
        prefix="model.language_model.", tower=(towers.qwen, "model."),
    ),
    "qwen3_5_moe_text": Decoder(
        Attention(norms=True, gated=True, out_bias="attention_bias"), stacked_qwen_mixture,
        other=DeltaNet(fused=False), prefix="model.language_model.", tower=(towers.qwen, "model."),
    ),
    "gpt_oss": Decoder(Attention(bias=True, out_bias=True, sinks=True), gpt_oss_mixture),
    "deepseek_v3": Decoder(latent, deepseek_mixture),
    "glm4_moe": Decoder(Attention(norms="use_qk_norm"), deepseek_mixture),
    "granitemoehybrid": Decoder(_PLAIN, granite_mixture, other=mamba2, tied=True),
    "llama4_text": Decoder(
        _PLAIN, llama4_mixture, prefix="language_model.model.", head="language_model.lm_head",
        tower=(towers.llama4, ""),
    ),
    "mamba": _mamba,
    "t5": _t5,
    "whisper": _whisper,
}  # fmt: skip
"""model_type of the language model -> config.json as a whole -> its tensors."""
