"""Data only: encoders that one native call can compute, and what their parts are called.

All are of one form: tables are summed and normalized, perhaps projected, or the model's own code makes the states of an
image; each block attends and adds what it was given, and does the same with an up and a down projection that have an
activation, or a gate, between them. Norms come first in a block's halves, or behind their sums. Who reads this
(`nn/encoder`) checks that a model has just these parts, of just these classes, and compares results when it is loaded.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from spicerack.kernels.plan import Index


class Block(NamedTuple):
    """A block of an encoder, by paths from it; "" where there is none.

    qkv          layers of its attention, or the one that makes all three, side by side
    out          the layer behind attention
    heads        (path, its attribute) that tells how wide a head is
    norms        of attention, and of the rest
    up           the layer whose result is activated, and another one for what that is multiplied by, if any
    activation   behind it
    down         the last layer
    scaling      the attribute beside the heads' that scores are multiplied by; "": 1 / sqrt of the width of a head
    first        norms are before attention and before the rest, and one may be missing; else behind their sums
    gated        one layer makes both what is activated and what that is multiplied by, side by side
    factors      modules with a `lambda1` that multiply what attention, and what the rest, adds
    kind         the block's attribute that names its rotary positions, and whether its attention is within a window
    """

    qkv: tuple[str, ...]
    out: str
    heads: tuple[str, str]
    norms: tuple[str, str]
    up: tuple[str, ...]
    activation: str
    down: str
    scaling: str = ""
    first: bool = False
    gated: bool = False
    factors: tuple[str, ...] = ()
    kind: str = ""


class Encoder(NamedTuple):
    """An encoder of transformers, by the paths of its modules; "" where there is none.

    model       the class, and `file` the module of transformers that has it
    classes     path -> class of that file; paths that begin with a dot are of a block
    block       what its blocks have
    blocks      the list of them
    output      the class of transformers.modeling_outputs that is returned
    tables      (path, what tells the row), in the order in which rows are added
    counted     positions count the ids that are not padding, from its id + 1 on, unless they are given
    embed       instead of tables: what makes states of an image, by its own code
    images      arguments that it takes besides the image
    norm        behind the sum of tables, or behind `embed`
    project     a layer behind that norm, in models that may be without one
    rotary      what has the frequencies of rotary positions
    distances   (path, table in it): biases of scores by distance, whose rows `relative_position_bucket` of the former
                tells
    final       the norm behind the blocks
    pooler      what makes `pooler_output`, by its own code
    pooled      what it makes it of: the result, or the first row of each sequence, which without a pooler is it
    idle        classes of the file that do nothing but in training
    looks_up    its attention is looked up by name, as native attention has to be
    bound       by how much the check when a model is loaded may differ from its modules, in parts of the largest
                number: rounding to int8 turns last bits into whole steps, now and then
    """

    model: str
    file: str
    classes: dict[str, str]
    block: Block
    blocks: str
    output: str
    tables: tuple[tuple[str, Index], ...] = ()
    counted: bool = False
    embed: str = ""
    images: tuple[str, ...] = ()
    norm: str = ""
    project: str = ""
    rotary: str = ""
    distances: tuple[str, str] = ("", "")
    final: str = ""
    pooler: str = ""
    pooled: Literal["", "result", "first"] = ""
    idle: tuple[str, ...] = ()
    looks_up: bool = True
    bound: float = 0.05


def _bert(name: str, file: str, *, counted: bool = False, project: str = "", pooler: bool = True) -> Encoder:
    """An encoder whose code is BERT's, with a name of its own."""
    parts = {
        "embeddings": "Embeddings", "encoder": "Encoder", ".": "Layer", ".attention": "Attention",
        ".attention.self": "SelfAttention", ".attention.output": "SelfOutput", ".intermediate": "Intermediate",
        ".output": "Output",
    }  # fmt: skip
    return Encoder(
        model=f"{name}Model",
        file=f"transformers.models.{file}.modeling_{file}",
        classes={path: name + part for path, part in parts.items()},
        block=Block(
            qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
            out="attention.output.dense",
            heads=("attention.self", "attention_head_size"),
            scaling="scaling",
            norms=("attention.output.LayerNorm", "output.LayerNorm"),
            up=("intermediate.dense",),
            activation="intermediate.intermediate_act_fn",
            down="output.dense",
        ),
        blocks="encoder.layer",
        output=f"BaseModelOutputWith{'Pooling' if pooler else 'Past'}AndCrossAttentions",
        tables=(
            ("embeddings.word_embeddings", "ids"),
            ("embeddings.token_type_embeddings", "types"),
            ("embeddings.position_embeddings", "positions"),
        ),
        counted=counted,
        norm="embeddings.LayerNorm",
        project=project,
        pooler="pooler" if pooler else "",
        pooled="result" if pooler else "",
    )


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _vit(name: str, file: str) -> Encoder:
    """An encoder of images whose code is ViT's, with a name of its own."""
    return Encoder(
        model=f"{name}Model",
        file=f"transformers.models.{file}.modeling_{file}",
        classes={".": f"{name}Layer", ".attention": f"{name}Attention", ".mlp": f"{name}MLP"},
        block=Block(
            qkv=tuple(f"attention.{layer}" for layer in _PROJECTIONS),
            out="attention.o_proj",
            heads=("attention", "head_dim"),
            scaling="scaling",
            norms=("layernorm_before", "layernorm_after"),
            up=("mlp.fc1",),
            activation="mlp.activation_fn",
            down="mlp.fc2",
            first=True,
        ),
        blocks="layers",
        output="BaseModelOutputWithPooling",
        embed="embeddings",
        images=("bool_masked_pos", "interpolate_pos_encoding"),
        final="layernorm",
        pooler="pooler",
        pooled="result",
    )


_DINOV2 = Encoder(
    model="Dinov2Model",
    file="transformers.models.dinov2.modeling_dinov2",
    classes={
        "encoder": "Dinov2Encoder", ".": "Dinov2Layer", ".attention": "Dinov2Attention", ".mlp": "Dinov2MLP",
        ".layer_scale1": "Dinov2LayerScale", ".layer_scale2": "Dinov2LayerScale",
    },
    block=Block(
        qkv=tuple(f"attention.{layer}" for layer in _PROJECTIONS),
        out="attention.o_proj",
        heads=("attention", "head_dim"),
        scaling="scaling",
        norms=("norm1", "norm2"),
        up=("mlp.fc1",),
        activation="mlp.activation_fn",
        down="mlp.fc2",
        first=True,
        factors=("layer_scale1", "layer_scale2"),
    ),
    blocks="encoder.layer",
    output="BaseModelOutputWithPooling",
    embed="embeddings",
    images=("bool_masked_pos",),
    final="layernorm",
    pooled="first",
    idle=("Dinov2DropPath",),
)  # fmt: skip

_CLIP = Encoder(
    model="CLIPVisionModel",
    file="transformers.models.clip.modeling_clip",
    classes={
        "encoder": "CLIPEncoder", ".": "CLIPEncoderLayer", ".self_attn": "CLIPAttention", ".mlp": "CLIPMLP",
    },
    block=Block(
        qkv=tuple(f"self_attn.{layer}" for layer in _PROJECTIONS),
        out="self_attn.out_proj",
        heads=("self_attn", "head_dim"),
        scaling="scale",
        norms=("layer_norm1", "layer_norm2"),
        up=("mlp.fc1",),
        activation="mlp.activation_fn",
        down="mlp.fc2",
        first=True,
    ),
    blocks="encoder.layers",
    output="BaseModelOutputWithPooling",
    embed="embeddings",
    images=("interpolate_pos_encoding",),
    norm="pre_layrnorm",
    pooler="post_layernorm",
    pooled="first",
)  # fmt: skip

ENCODERS = (
    _bert("Bert", "bert"),
    _bert("Roberta", "roberta", counted=True),
    _bert("XLMRoberta", "xlm_roberta", counted=True),
    _bert("Camembert", "camembert", counted=True),
    _bert("Electra", "electra", project="embeddings_project", pooler=False),
    Encoder(
        model="DistilBertModel",
        file="transformers.models.distilbert.modeling_distilbert",
        classes={
            "embeddings": "Embeddings", "transformer": "Transformer", ".": "TransformerBlock",
            ".attention": "DistilBertSelfAttention", ".ffn": "FFN",
        },
        block=Block(
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            out="attention.out_lin",
            heads=("attention", "attention_head_size"),
            scaling="scaling",
            norms=("sa_layer_norm", "output_layer_norm"),
            up=("ffn.lin1",),
            activation="ffn.activation",
            down="ffn.lin2",
        ),
        blocks="transformer.layer",
        output="BaseModelOutput",
        tables=(("embeddings.word_embeddings", "ids"), ("embeddings.position_embeddings", "positions")),
        norm="embeddings.LayerNorm",
    ),
    Encoder(
        model="MPNetModel",
        file="transformers.models.mpnet.modeling_mpnet",
        classes={
            "embeddings": "MPNetEmbeddings", "encoder": "MPNetEncoder", ".": "MPNetLayer",
            ".attention": "MPNetAttention", ".attention.attn": "MPNetSelfAttention",
            ".intermediate": "MPNetIntermediate", ".output": "MPNetOutput",
        },
        block=Block(
            qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            out="attention.attn.o",
            heads=("attention.attn", "attention_head_size"),
            norms=("attention.LayerNorm", "output.LayerNorm"),
            up=("intermediate.dense",),
            activation="intermediate.intermediate_act_fn",
            down="output.dense",
        ),
        blocks="encoder.layer",
        output="BaseModelOutputWithPooling",
        tables=(("embeddings.word_embeddings", "ids"), ("embeddings.position_embeddings", "positions")),
        counted=True,
        norm="embeddings.LayerNorm",
        distances=("encoder", "relative_attention_bias"),
        pooler="pooler",
        pooled="result",
        looks_up=False,
    ),
    Encoder(
        model="NomicBertModel",
        file="transformers.models.nomic_bert.modeling_nomic_bert",
        classes={
            "embeddings": "NomicBertEmbeddings", "rotary_emb": "NomicBertRotaryEmbedding", ".": "NomicBertLayer",
            ".self_attn": "NomicBertAttention", ".mlp": "NomicBertMLP",
        },
        block=Block(
            qkv=tuple(f"self_attn.{layer}" for layer in _PROJECTIONS),
            out="self_attn.o_proj",
            heads=("self_attn", "head_dim"),
            scaling="scaling",
            norms=("post_attention_layernorm", "post_mlp_layernorm"),
            up=("mlp.gate_proj", "mlp.up_proj"),
            activation="mlp.act_fn",
            down="mlp.down_proj",
        ),
        blocks="layers",
        output="BaseModelOutputWithPooling",
        tables=(("embeddings.word_embeddings", "ids"), ("embeddings.token_type_embeddings", "types")),
        norm="embeddings.LayerNorm",
        rotary="rotary_emb",
        pooler="pooler",
        pooled="result",
    ),
    Encoder(
        model="ModernBertModel",
        file="transformers.models.modernbert.modeling_modernbert",
        classes={
            "embeddings": "ModernBertEmbeddings", "rotary_emb": "ModernBertRotaryEmbedding",
            ".": "ModernBertEncoderLayer", ".attn": "ModernBertAttention", ".mlp": "ModernBertMLP",
        },
        block=Block(
            qkv=("attn.Wqkv",),
            out="attn.Wo",
            heads=("attn", "head_dim"),
            norms=("attn_norm", "mlp_norm"),
            up=("mlp.Wi",),
            activation="mlp.act",
            down="mlp.Wo",
            first=True,
            gated=True,
            kind="attention_type",
        ),
        blocks="layers",
        output="BaseModelOutput",
        tables=(("embeddings.tok_embeddings", "ids"),),
        norm="embeddings.norm",
        rotary="rotary_emb",
        final="final_norm",
    ),
    _vit("ViT", "vit"),
    _vit("DeiT", "deit"),
    _DINOV2,
    _CLIP,
    _CLIP._replace(
        model="SiglipVisionModel",
        file="transformers.models.siglip.modeling_siglip",
        classes={path: kind.replace("CLIP", "Siglip") for path, kind in _CLIP.classes.items()},
        norm="",
        final="post_layernorm",
        pooler="head",
        pooled="result",
    ),
)  # fmt: skip
