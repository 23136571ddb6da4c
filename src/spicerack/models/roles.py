"""What one tensor of a checkpoint is, from its name, its shape and what config.json says of sizes.

Where that is not enough it says "other", and what is "other" stays in float: a matrix that could be a table of tokens
is not guessed to be a linear layer, because what is guessed wrong here is quantized wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spicerack.models.config import EXPERTS, HIDDEN, INNER, VOCABULARY, nested, sizes
from spicerack.models.families import names

Role = Literal[
    "linear", "conv1d", "embedding", "head", "router", "norm", "bias", "experts", "conv", "other"
]  # fmt: skip
"""What a tensor does. Quantized by default are linear, conv1d and experts, on request embedding, head and router
(`census.BY_DEFAULT`, `ON_REQUEST`); the rest stays in float."""

_NORM = re.compile(r".*norm\d*$|.*norm_.*|^(ln|bn)(_?\w+)?$", re.IGNORECASE)
"""Components that are a norm's: `input_layernorm`, `norm_1`, `ln_f`, `bn2` ..."""
_EMBEDDING = re.compile(r".*_(embeddings?|embeds?|emb)$")
"""Components that are a table's, in families that `names.EMBEDDINGS` does not list."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What of config.json tells tensors apart; sets, because models nest.

    types             families
    vocabularies      sizes of vocabularies
    widths            of hidden and inner layers: numbers of rows that say nothing about a vocabulary
    hidden            channels between blocks
    experts           numbers of experts
    fused_attention   what tensors are called in front of `in_proj_weight`: torch's own attention modules
    """

    types: frozenset[str]
    vocabularies: frozenset[int]
    widths: frozenset[int]
    hidden: frozenset[int]
    experts: frozenset[int]
    fused_attention: frozenset[str]
    classifiers: frozenset[str] = frozenset()


def facts_of(config: Mapping[str, Any], tensors: Iterable[str]) -> Facts:
    """The facts of a config.json, those of models inside it as well, and of the names of all tensors."""
    inside = tuple(nested(config))
    return Facts(
        types=frozenset(c["model_type"] for c in inside if isinstance(c.get("model_type"), str)),
        vocabularies=sizes(inside, *VOCABULARY),
        widths=sizes(inside, *HIDDEN, *INNER),
        hidden=sizes(inside, *HIDDEN),
        experts=sizes(inside, *EXPERTS),
        fused_attention=frozenset(n.removesuffix("in_proj_weight") for n in tensors if n.endswith("in_proj_weight")),
        classifiers=classifiers_of(config.get("pretrained_cfg")),
    )


def classifiers_of(settings: object) -> frozenset[str]:
    """The layers that timm's settings of a model (`pretrained_cfg`) call its classifiers, by path: heads, whatever
    their names."""
    named = settings.get("classifier") if isinstance(settings, Mapping) else None
    return frozenset(name for name in (named if isinstance(named, list | tuple) else [named]) if isinstance(name, str))


def role_of(name: str, shape: tuple[int, ...], facts: Facts) -> Role:
    """The role of the tensor `name` of this stored shape, in a checkpoint of which `facts` are known.

    Biases and norms go by name and number of axes, stacked experts by name and three axes, and what is left with two is
    a matrix, told by `_matrix_role`. Whatever has no module that could be replaced is "other".
    """
    parts = name.split(".")
    owner = parts[-2] if len(parts) > 1 else ""  # the module, if parts[-1] is its parameter
    if parts[-1].endswith("bias"):  # of experts: [experts, out]
        return "bias" if len(shape) <= 2 else "other"
    if len(shape) < 2:
        return "norm" if len(shape) == 1 and _NORM.match(owner if parts[-1] == "weight" else parts[-1]) else "other"
    if _is_experts(parts, shape):
        return "experts"
    if parts[-1] != "weight" or not owner:
        return "other"  # a bare parameter: no layer class that we could replace
    if len(shape) > 2:
        return "conv"
    if owner == "out_proj" and name.removesuffix("out_proj.weight") in facts.fused_attention:
        return "other"  # torch's MultiheadAttention reads this weight itself: no layer to replace
    return _matrix_role(parts[:-1], shape, facts)


def is_transposed(name: str, role: Role, shape: tuple[int, ...], facts: Facts) -> bool:
    """Whether a matrix is stored [..., in, out] instead of [..., out, in].

    GPT-2's Conv1D is, by its role. Of fused experts the shape decides, as far as the hidden size tells its axes apart;
    where it does not, the family. A model that transformers builds knows better (`architecture.transposed_stacks`).
    """
    if role != "experts":
        return role == "conv1d"
    if len(shape) == 2:
        return name.endswith(".w2")
    # of [experts, a, b] one axis is the hidden size: a down projection writes it, all others read it
    if len(facts.hidden) == 1 and (shape[1] in facts.hidden) != (shape[2] in facts.hidden):
        writes_hidden = not names.WRITE_HIDDEN.isdisjoint(name.split("."))
        return (shape[2] in facts.hidden) == writes_hidden
    return bool(facts.types & names.EXPERTS_IN_OUT)


def _is_experts(parts: list[str], shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds the matrices of several experts, stacked along an axis, or along the rows as DBRX does.

    parts: its name, cut at dots. A convolution under experts is none.
    """
    stacked = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    in_experts = any(part in names.EXPERTS for part in parts[:-1]) and "conv" not in stacked
    if len(shape) == 2:
        return in_experts and parts[-1] in names.DBRX_EXPERTS
    return len(shape) == 3 and (in_experts or stacked in names.STACKED_EXPERTS)


def _matrix_role(module: list[str], shape: tuple[int, ...], facts: Facts) -> Role:
    """The role of a 2-D `<module>.weight`: names beyond doubt first, then names that need a shape to mean something.

    A name that nobody knows is a linear layer's, unless the matrix has as many rows or columns as a vocabulary.
    """
    last = module[-1]
    vocabulary = shape[0] in facts.vocabularies
    if any(part in names.ROUTERS for part in module):
        return "router"
    if last in names.GATES and (shape[0] in facts.experts or "moe" in "".join(module[:-1])):
        return "router"
    if last in names.CONV1D and facts.types & names.CONV1D_TYPES:
        return "conv1d"
    if _is_embedding(last):
        return "embedding"
    if (
        ".".join(module) in facts.classifiers
        or any(part in names.HEADS for part in module)
        or (last in names.HEADS_BY_SHAPE and vocabulary)
    ):
        return "head"
    if last in names.LINEAR:
        return "linear"
    if any(part.startswith("mtp") for part in module):
        return "other"  # heads that predict several tokens: what is in them has no common names
    # a vocabulary as large as a layer is wide (in models for tests) tells nothing about a matrix of that size
    size_is_telling = facts.vocabularies - facts.widths
    return "other" if not size_is_telling.isdisjoint(shape) else "linear"


def _is_embedding(last: str) -> bool:
    """Whether a module of this name is a table whose rows are looked up."""
    if last in names.EMBEDDINGS:
        return True
    return _EMBEDDING.match(last) is not None and last not in names.LINEAR_DESPITE_EMBED
