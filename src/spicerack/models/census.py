"""What each tensor of a checkpoint is, from names, shapes and config.json alone: no torch, no weights.

The second opinion is `architecture.modules_of`, which asks transformers. Where this one cannot be sure it says "other",
and what is "other" stays in float: a vocabulary-sized matrix with an unknown name, or a table without `.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spicerack.models.families import names
from spicerack.storage.reader import Checkpoint, TensorInfo

Role = Literal[
    "linear", "conv1d", "embedding", "head", "router", "norm", "bias", "experts", "conv", "other"
]  # fmt: skip

_NORM = re.compile(r".*norm\d*$|.*norm_.*|^(ln|bn)(_?\w+)?$", re.IGNORECASE)
_EMBEDDING = re.compile(r".*_(embeddings?|embeds?|emb)$")
_LANGUAGE_HEAD = re.compile(r".*(ForCausalLM|LMHeadModel|DoubleHeadsModel|ForConditionalGeneration|ForMaskedLM)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor and what it is.

    module      its name without `.weight`: what recipes match
    layer_type  the same for all layers of a kind: "self_attn.q_proj"
    transposed  a matrix stored [..., in, out] (GPT-2's Conv1D, some fused experts) instead of [..., out, in]
    """

    name: str
    module: str
    role: Role
    info: TensorInfo
    layer_type: str
    transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """[..., out, in], whatever the stored order."""
        *leading, a, b = self.info.shape
        return (*leading, b, a) if self.transposed else (*leading, a, b)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What config.json says of the (text) model; None where it does not."""

    model_type: str
    classes: tuple[str, ...]
    dtype: str | None
    layers: int | None
    hidden: int | None
    heads: int | None
    experts: int | None
    vocabulary: int | None


@dataclass(frozen=True, slots=True)
class Census:
    """All tensors of a checkpoint.

    tied           alias -> owner, tensor names; the alias may be absent from the files (lm_head is the embedding)
    shared_inputs  modules that read the same input and that engines fuse
    parameters, nbytes   totals without the aliases: tied tensors count once
    """

    entries: dict[str, Entry]
    tied: dict[str, str]
    shared_inputs: tuple[tuple[str, ...], ...]
    architecture: Architecture

    @property
    def parameters(self) -> int:
        return sum(e.info.numel for name, e in self.entries.items() if name not in self.tied)

    @property
    def nbytes(self) -> int:
        return sum(e.info.nbytes for name, e in self.entries.items() if name not in self.tied)


def take(checkpoint: Checkpoint) -> Census:
    """Classify every tensor of `checkpoint`."""
    configs = tuple(_configs(checkpoint.config))
    facts = _Facts(
        types=frozenset(c["model_type"] for c in configs if isinstance(c.get("model_type"), str)),
        vocabularies=_sizes(configs, "vocab_size", "n_vocab", "padded_vocab_size", "text_vocab_size"),
        widths=_sizes(configs, *_HIDDEN, "intermediate_size", "ffn_dim", "d_ff", "n_inner"),
        hidden=_sizes(configs, *_HIDDEN),
        experts=_sizes(configs, *_EXPERTS),
        fused_attention=frozenset(
            n.removesuffix("in_proj_weight") for n in checkpoint.tensors if n.endswith("in_proj_weight")
        ),
    )
    label = _layer_types(checkpoint.tensors)
    entries = {}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        role = _role(name, info.shape, facts)
        entries[name] = Entry(name, module, role, info, label[module], _transposed(name, role, info.shape, facts))
    tied = _tied(entries, checkpoint.config, facts)
    return Census(entries, tied, _shared_inputs(entries), architecture(checkpoint.config))


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The facts of config.json, those of a nested text model first."""
    text: dict[str, Any] = next((config[key] for key in _TEXT_MODELS if isinstance(config.get(key), dict)), {})
    merged = {**config, **text}
    classes = config.get("architectures")
    dtype = merged.get("dtype") or merged.get("torch_dtype")
    return Architecture(
        model_type=str(config.get("model_type", "unknown")),
        classes=tuple(map(str, classes)) if isinstance(classes, list) else (),
        dtype=dtype if isinstance(dtype, str) else None,
        layers=_first(merged, *LAYERS),
        hidden=_first(merged, *_HIDDEN),
        heads=_first(merged, *_HEADS),
        experts=_first(merged, *_EXPERTS),
        vocabulary=_first(merged, "vocab_size", "n_vocab"),
    )


_TEXT_MODELS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_MAX_DEPTH = 6


@dataclass(frozen=True, slots=True)
class _Facts:
    """What of config.json tells tensors apart; sets, because models nest."""

    types: frozenset[str]
    vocabularies: frozenset[int]
    widths: frozenset[int]
    hidden: frozenset[int]
    experts: frozenset[int]
    fused_attention: frozenset[str]


def _configs(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    yield config
    if depth < _MAX_DEPTH:
        for value in config.values():
            if isinstance(value, dict):
                yield from _configs(value, depth + 1)


def _sizes(configs: tuple[Mapping[str, Any], ...], *keys: str) -> frozenset[int]:
    return frozenset(c[key] for c in configs for key in keys if type(c.get(key)) is int and c[key] > 0)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int), None)


def _role(name: str, shape: tuple[int, ...], facts: _Facts) -> Role:
    parts = name.split(".")
    owner = parts[-2] if len(parts) > 1 else ""  # the module, if parts[-1] is its parameter
    if parts[-1].endswith("bias"):
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


def _is_experts(parts: list[str], shape: tuple[int, ...]) -> bool:
    stacked = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    in_experts = any(part in names.EXPERTS for part in parts[:-1]) and "conv" not in stacked
    if len(shape) == 2:
        return in_experts and parts[-1] in names.DBRX_EXPERTS
    return len(shape) == 3 and (in_experts or stacked in names.STACKED_EXPERTS)


def _matrix_role(module: list[str], shape: tuple[int, ...], facts: _Facts) -> Role:
    """The role of a 2-D `<module>.weight`."""
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
    if any(part in names.HEADS for part in module) or (last in names.HEADS_BY_SHAPE and vocabulary):
        return "head"
    if last in names.LINEAR:
        return "linear"
    if any(part.startswith("mtp") for part in module):
        return "other"
    size_is_telling = facts.vocabularies - facts.widths
    return "other" if not size_is_telling.isdisjoint(shape) else "linear"


def _is_embedding(last: str) -> bool:
    if last in names.EMBEDDINGS:
        return True
    return _EMBEDDING.match(last) is not None and last not in names.LINEAR_DESPITE_EMBED


def _transposed(name: str, role: Role, shape: tuple[int, ...], facts: _Facts) -> bool:
    """Whether a matrix is stored [..., in, out]. Shapes decide; for square ones, the family."""
    if role != "experts":
        return role == "conv1d"
    if len(shape) == 2:
        return name.endswith(".w2")
    if len(facts.hidden) == 1 and (shape[1] in facts.hidden) != (shape[2] in facts.hidden):
        writes_hidden = any(part in name.split(".") for part in ("down_proj", "w2", "wo", "output_linear", "w2_weight"))
        return (shape[2] in facts.hidden) == writes_hidden
    return bool(facts.types & names.EXPERTS_IN_OUT)


def _layer_types(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """module -> layer type: what follows the layer's number, other numbers left out.

    Where a model has several stacks (encoder and decoder, vision and text), what tells them apart stays in front.
    """
    split: dict[str, tuple[tuple[str, ...], str]] = {}
    for name in tensors:
        module = name.removesuffix(".weight")
        parts = module.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        tail = [part for part in parts[number + 1 :] if not part.isdigit()]
        if tail:
            split[module] = tuple(parts[:number]), ".".join(tail)
        else:  # not in a stack, or a numbered part of a Sequential
            named = [part for part in parts if not part.isdigit() and part not in names.CONTAINERS]
            split[module] = (), ".".join(named[-3 if named[-1:] == ["bias"] else -2 :]) or module
    stacks = {stack for stack, _ in split.values() if stack}
    begin = _common(stacks)
    end = _common({tuple(reversed(stack[begin:])) for stack in stacks})
    label = {
        stack: [part for part in stack[begin : len(stack) - end] if part not in names.CONTAINERS] for stack in stacks
    }
    return {module: ".".join((*label.get(stack, ()), tail)) for module, (stack, tail) in split.items()}


def _common(stacks: set[tuple[str, ...]]) -> int:
    """Length of the common beginning of all `stacks`."""
    length = 0
    for column in zip(*stacks, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def _tied(entries: Mapping[str, Entry], config: Mapping[str, Any], facts: _Facts) -> dict[str, str]:
    """alias -> owner. The header cannot prove that two tensors are equal; whoever drops one must compare them."""
    said = next((c["tie_word_embeddings"] for c in _configs(config) if "tie_word_embeddings" in c), None)
    tokens = [
        e for e in entries.values()
        if e.role == "embedding" and len(e.info.shape) == 2 and e.module.rsplit(".", 1)[-1] in names.TOKEN_EMBEDDINGS
        and (e.info.shape[0] in facts.vocabularies or not facts.vocabularies)
    ]  # fmt: skip
    if said is False or not tokens:
        return {}
    owner = next((e for e in tokens if e.module.rsplit(".", 1)[-1] == "shared"), tokens[0])
    ties = said is True or bool(facts.types & names.TIED_BY_DEFAULT)
    heads = [e for e in entries.values() if e.role == "head" and e.info.shape[0] == owner.info.shape[0]]
    tied = {}
    for other in (*tokens, *heads):
        same = (other.info.shape, other.info.dtype) == (owner.info.shape, owner.info.dtype)
        if other is not owner and ties and same and other.role in ("head", "embedding"):
            tied[other.name] = owner.name
    classes = config.get("architectures")
    has_head = isinstance(classes, list) and any(_LANGUAGE_HEAD.match(str(c)) for c in classes)
    if has_head and not heads:
        tied[_head_name(owner.module, config)] = owner.name
    return tied


def _head_name(owner: str, config: Mapping[str, Any]) -> str:
    head = names.HEAD_OF.get(str(config.get("model_type")), "lm_head")
    prefix = "language_model." if owner.startswith("language_model.model.") else ""
    return f"{prefix}{head}.weight"


def _shared_inputs(entries: Mapping[str, Entry]) -> tuple[tuple[str, ...], ...]:
    children: dict[str, dict[str, str]] = {}
    for entry in entries.values():
        if entry.role == "linear":
            parent, _, last = entry.module.rpartition(".")
            children.setdefault(parent, {})[last] = entry.module
    groups = []
    for parent, modules in children.items():
        crosses = any(part in names.CROSS_ATTENTION for part in parent.split("."))
        for group in names.SHARED_INPUTS:
            members = group[1:] if crosses and len(group) == 3 else group
            found = tuple(modules[last] for last in members if last in modules)
            if len(found) > 1:
                groups.append(found)
    return tuple(groups)


BY_DEFAULT = frozenset({"linear", "conv1d", "experts"})
ON_REQUEST = frozenset({"embedding", "head", "router"})
