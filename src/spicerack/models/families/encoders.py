"""Data only: encoders that one native call can compute, and what their parts are called.

All are of one form: tables are summed and normalized, perhaps projected; each block attends and adds what it was given,
normalizes, goes through an up and a down projection with GELU between them, adds and normalizes again. Who reads this
(`nn.encoder`) checks that a model has just these parts, of just these classes, and compares results when it is loaded.
"""

from __future__ import annotations

from typing import NamedTuple

from spicerack.kernels.plan import Index


class Encoder(NamedTuple):
    """An encoder of transformers, by the paths of its modules; "" where there is none.

    model      the class, and `file` the module of transformers that has it
    classes    path -> class of that file; paths that begin with a dot are of a block
    tables     (path, what tells the row), in the order in which rows are added
    counted    positions count the ids that are not padding, from its id + 1 on, unless they are given
    norm       behind the sum of tables
    project    a layer behind that norm, in models that may be without one
    blocks     the list of blocks
    qkv, out   layers of a block's attention
    heads      (path in a block, its attribute) that tells how many heads there are
    norms      of a block: behind attention, and at its end
    up, activation, down    the rest of a block
    pooler     what makes `pooler_output` of the result, by its own code
    output     the class of transformers.modeling_outputs that is returned
    bound      by how much the check when a model is loaded may differ from its modules, in parts of the largest number:
               rounding to int8 turns last bits into whole steps, now and then
    """

    model: str
    file: str
    classes: dict[str, str]
    tables: tuple[tuple[str, Index], ...]
    counted: bool
    norm: str
    project: str
    blocks: str
    qkv: tuple[str, str, str]
    out: str
    heads: tuple[str, str]
    norms: tuple[str, str]
    up: str
    activation: str
    down: str
    pooler: str
    output: str
    bound: float


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
        tables=(
            ("embeddings.word_embeddings", "ids"),
            ("embeddings.token_type_embeddings", "types"),
            ("embeddings.position_embeddings", "positions"),
        ),
        counted=counted,
        norm="embeddings.LayerNorm",
        project=project,
        blocks="encoder.layer",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        out="attention.output.dense",
        heads=("attention.self", "num_attention_heads"),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        pooler="pooler" if pooler else "",
        output=f"BaseModelOutputWith{'Pooling' if pooler else 'Past'}AndCrossAttentions",
        bound=0.05,
    )


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
        tables=(("embeddings.word_embeddings", "ids"), ("embeddings.position_embeddings", "positions")),
        counted=False,
        norm="embeddings.LayerNorm",
        project="",
        blocks="transformer.layer",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        heads=("attention", "n_heads"),
        norms=("sa_layer_norm", "output_layer_norm"),
        up="ffn.lin1",
        activation="ffn.activation",
        down="ffn.lin2",
        pooler="",
        output="BaseModelOutput",
        bound=0.05,
    ),
)  # fmt: skip
