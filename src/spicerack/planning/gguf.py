"""Bytes of tensors in GGUF: types of blocks, and which type llama.cpp's mixtures give each tensor.

The mixtures are `llama_tensor_get_type` of llama.cpp b11549 in a table: a default, one for the head, and exceptions by
what a tensor does and how deep its layer lies. Bytes are those of the tensors' data; a file's header adds the
vocabulary (8 MB for Llama 3), and every tensor begins at a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from spicerack.models.sizes import FLOATS
from spicerack.planning.model import Model, Weight

BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210), "Q5_K": (256, 176),
    "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_K": (256, 144), "Q4_1": (32, 20), "Q4_0": (32, 18), "IQ4_NL": (32, 18),
    "MXFP4": (32, 17), "Q3_K": (256, 110), "Q2_K": (256, 84),
}  # fmt: skip
"""Type -> (weights of a block, its bytes)."""
_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes the place of a type whose blocks do not tile a row."""

Choice = str | Callable[[int, int], str]
"""A type, or one by the number of a layer and how many there are."""


def _more_bits(layer: int, count: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third between."""
    eighth = count // 8
    return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2


def _deep(more: str, usual: str) -> Choice:
    return lambda layer, count: more if _more_bits(layer, count) else usual


def _first(share: int, more: str, usual: str) -> Choice:
    return lambda layer, count: more if layer < count // share else usual


@dataclass(frozen=True, slots=True)
class Mixture:
    """A recipe of llama-quantize.

    usual    type of all matrices that nothing else is said of
    head     of the head, and of a table that is one
    by_role  attn_v, attn_output, attn_qkv, ffn_down -> type
    experts  type of routed experts, in place of all that; None: they are as other matrices
    """

    usual: str
    head: str = "Q6_K"
    by_role: Mapping[str, Choice] = field(default_factory=dict)
    experts: str | None = None


MIXTURES: Mapping[str, Mixture] = {
    "F16": Mixture("F16", "F16"),
    "Q8_0": Mixture("Q8_0", "Q8_0"),
    "MXFP4": Mixture("F16", "F16", experts="MXFP4"),
    "Q6_K": Mixture("Q6_K"),
    "Q5_K_M": Mixture(
        "Q5_K", by_role={"attn_v": _deep("Q6_K", "Q5_K"), "ffn_down": _deep("Q6_K", "Q5_K"), "attn_qkv": "Q6_K"}
    ),
    "Q4_K_M": Mixture(
        "Q4_K", by_role={"attn_v": _deep("Q6_K", "Q4_K"), "ffn_down": _deep("Q6_K", "Q4_K"), "attn_qkv": "Q5_K"}
    ),
    "Q4_0": Mixture("Q4_0"),
    "Q3_K_M": Mixture(
        "Q3_K",
        by_role={
            "attn_v": lambda layer, _count: "Q5_K" if layer < 2 else "Q4_K",
            "ffn_down": _first(16, "Q5_K", "Q4_K"), "attn_output": "Q4_K", "attn_qkv": "Q4_K",
        },
    ),
    "Q2_K": Mixture("Q2_K", by_role={"attn_v": "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}),
}  # fmt: skip
_ROLES = {
    "v_proj": "attn_v", "o_proj": "attn_output", "out_proj": "attn_output", "qkv_proj": "attn_qkv",
    "down_proj": "ffn_down", "w2": "ffn_down", "fc2": "ffn_down", "wo": "ffn_down", "output_linear": "ffn_down",
}  # fmt: skip
"""Component of a checkpoint's name -> what llama.cpp goes by."""
_PLAIN_TABLES = ("position_embeddings", "token_type_embeddings", "wpe", "embed_positions", "position_embedding")
"""Components of a checkpoint's names of tables that llama.cpp's converter leaves in F32, whatever the file is to be."""
_LAYERS_OF_70B = 80
"""Layers of the one size of model that it makes an exception for."""
_EIGHT = 8
"""Experts of Mixtral, for which it makes another."""


def weigh(model: Model, mixture: str) -> list[int]:
    """Bytes of each weight of the model, all that are alike together, in the order of `model.weights`."""
    recipe = MIXTURES[mixture]
    return [
        # integers are buffers, which are left out of the file: BERT's numbers of places
        0 if weight.entry.info.dtype not in FLOATS else _nbytes(weight, type_of(model, weight, recipe)) * weight.count
        for weight in model.weights
    ]


def type_of(model: Model, weight: Weight, recipe: Mixture) -> str:
    """The type that llama-quantize gives a tensor; floats for vectors, convolutions, routers and towers."""
    entry = weight.entry
    shape = entry.matrix_shape if len(entry.info.shape) > 1 else entry.info.shape
    if len(shape) < 2 or entry.role in ("norm", "bias"):
        return "F32"
    if weight.place == "tower":
        return "F16"
    if entry.role in ("router", "conv") or entry.info.name.rsplit(".", 1)[-1] in ("A_log", "sinks"):
        return "F32"
    if entry.role == "embedding" and is_place(entry.module):
        return "F32"
    return _tiled(_wanted(model, weight, recipe), shape[-1])


def is_place(module: str) -> bool:
    """Whether a table is of places or segments and not of tokens: llama.cpp has these in float32, whatever the rest."""
    return module.rpartition(".")[2] in _PLAIN_TABLES


def _wanted(model: Model, weight: Weight, recipe: Mixture) -> str:
    """The type before it is asked whether its blocks tile the rows."""
    if weight.routed and recipe.experts is not None:
        return recipe.experts
    if recipe.usual in ("F16", "Q8_0"):
        return recipe.usual
    head = weight.entry.role == "head" or (weight.place == "input" and model.tied)
    if head:
        return recipe.head
    if weight.layer is None:
        return recipe.usual
    parts = weight.entry.module.split(".")
    role = next((_ROLES[part] for part in reversed(parts) if part in _ROLES), "")
    if model.experts == _EIGHT and role == "attn_v":
        return "Q8_0"
    if model.experts == _EIGHT and parts[-1] == "k_proj":
        return "Q8_0"
    if model.experts == _EIGHT and role == "attn_output" and recipe.usual in ("Q2_K", "Q3_K", "Q4_K"):
        return "Q5_K"
    choice = recipe.by_role.get(role, recipe.usual)
    count = len(model.layers)
    kind = choice if isinstance(choice, str) else choice(weight.layer, count)
    grouped = model.fields.heads >= 4 * model.fields.kv_heads if role == "attn_v" else False
    if recipe.usual == "Q2_K" and grouped:
        kind = "Q4_K"
    # the values of a 70 B are shared by eight heads, and cost little
    if role == "attn_v" and count == _LAYERS_OF_70B and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return kind


def _tiled(kind: str, columns: int) -> str:
    """The type, or what takes its place where its blocks do not tile a row."""
    if columns % BLOCKS[kind][0] == 0:
        return kind
    other = _FALLBACK.get(kind, "F16")
    return other if columns % BLOCKS[other][0] == 0 else "F16"


def _nbytes(weight: Weight, kind: str) -> int:
    """Bytes of one of them."""
    block, nbytes = BLOCKS[kind]
    return weight.entry.info.numel // block * nbytes
