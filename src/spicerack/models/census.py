"""What each tensor of a checkpoint is, from names, shapes and config.json alone: no torch, no weights.

The second opinion is `architecture.modules_of`, which asks transformers. Where this one cannot be sure it says "other",
and what is "other" stays in float: a vocabulary-sized matrix with an unknown name, or a table without `.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from spicerack.models.config import Architecture, architecture, nested
from spicerack.models.families import names
from spicerack.models.roles import Facts, Role, facts_of, is_transposed, role_of
from spicerack.storage.reader import Checkpoint, TensorInfo

BY_DEFAULT = frozenset({"linear", "conv1d", "experts"})
"""Roles that are quantized unless a rule says otherwise."""
ON_REQUEST = frozenset({"embedding", "head", "router"})
"""Roles that are quantized where a rule names them."""
_LANGUAGE_HEAD = re.compile(r".*(ForCausalLM|LMHeadModel|DoubleHeadsModel|ForConditionalGeneration|ForMaskedLM)")
"""Classes that predict tokens: if such a checkpoint has no head, the head is the embedding."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor and what it is.

    name        in the checkpoint
    module      the same without `.weight`: what recipes match
    role        what it does: linear, embedding, norm ...
    info        stored type, shape and place
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
        """The tensor's shape as that of matrices [..., out, in], whatever the stored order."""
        *leading, a, b = self.info.shape
        return (*leading, b, a) if self.transposed else (*leading, a, b)


@dataclass(frozen=True, slots=True)
class Census:
    """All tensors of a checkpoint.

    entries        tensor name -> what it is, in the order of the files
    tied           alias -> owner, tensor names; the alias may be absent from the files (lm_head is the embedding)
    apart          heads and embeddings that are called tied, and hold other numbers than their owner: they are not
    shared_inputs  modules that read the same input and that engines fuse
    architecture   what config.json says of the whole

    Totals are without the aliases: tied tensors count once.
    """

    entries: dict[str, Entry]
    tied: dict[str, str]
    apart: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...]
    architecture: Architecture

    @property
    def parameters(self) -> int:
        """Numbers that the model has, tied ones counted once."""
        return sum(e.info.numel for name, e in self.entries.items() if name not in self.tied)

    @property
    def nbytes(self) -> int:
        """Bytes that they take in the files, headers left out."""
        return sum(e.info.nbytes for name, e in self.entries.items() if name not in self.tied)


def take(checkpoint: Checkpoint, transposed: Mapping[str, bool] = MappingProxyType({})) -> Census:
    """Classify every tensor of `checkpoint`, of which headers and config.json are read already.

    transposed: what is known better than names tell it, of the order in which modules store their matrices.

    It needs no library that knows models, so that `inspect` starts at once, and a folder of a family that nobody knows
    yet is described as far as its names go. Weights are read where config.json, or a family's habit, calls two of them
    tied: two that differ are two.
    """
    facts = facts_of(checkpoint.config, checkpoint.tensors)
    label = _layer_types(checkpoint.tensors)
    entries = {}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        role = role_of(name, info.shape, facts)
        in_out = transposed.get(module, is_transposed(name, role, info.shape, facts))
        entries[name] = Entry(name, module, role, info, label[module], in_out)
    tied = _tied(entries, checkpoint.config, facts)
    apart = tuple(alias for alias, owner in tied.items() if alias in entries and not checkpoint.same(alias, owner))
    tied = {alias: owner for alias, owner in tied.items() if alias not in apart}
    return Census(entries, tied, apart, _shared_inputs(entries), architecture(checkpoint.config))


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
    """Length of the beginning that all `stacks`, names in parts, have in common; 0 of none."""
    length = 0
    for column in zip(*stacks, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def _tied(entries: Mapping[str, Entry], config: Mapping[str, Any], facts: Facts) -> dict[str, str]:
    """alias -> owner, of heads and embeddings that are the embedding of tokens.

    config.json's word counts, or its family's habit where it says nothing. The header cannot prove that two tensors are
    equal: `take` compares them.
    """
    declared = next(
        (c["tie_word_embeddings"] for c in nested(config) if c.get("tie_word_embeddings") is not None), None
    )
    tokens = [
        e for e in entries.values()
        if e.role == "embedding" and len(e.info.shape) == 2 and e.module.rsplit(".", 1)[-1] in names.TOKEN_EMBEDDINGS
        and (e.info.shape[0] in facts.vocabularies or not facts.vocabularies)
    ]  # fmt: skip
    if declared is False or not tokens:
        return {}
    # of an encoder-decoder's three tables the one that is called so has the weights
    owner = next((e for e in tokens if e.module.rsplit(".", 1)[-1] == "shared"), tokens[0])
    ties = declared is True or bool(facts.types & names.TIED_BY_DEFAULT)
    heads = [e for e in entries.values() if e.role == "head" and e.info.shape[0] == owner.info.shape[0]]
    tied = {}
    for other in (*tokens, *heads):
        same = (other.info.shape, other.info.dtype) == (owner.info.shape, owner.info.dtype)
        if other is not owner and ties and same and other.role in ("head", "embedding"):
            tied[other.name] = owner.name
    classes = config.get("architectures")
    has_head = isinstance(classes, list) and any(_LANGUAGE_HEAD.match(str(c)) for c in classes)
    if has_head and not heads:  # it is in no file, but recipes may name it
        tied[_head_name(owner.module, config)] = owner.name
    return tied


def _head_name(owner: str, config: Mapping[str, Any]) -> str:
    """What the tied head of a model would be called, whose embedding is the module `owner`."""
    head = names.HEAD_OF.get(str(config.get("model_type")), "lm_head")
    prefix = "language_model." if owner.startswith("language_model.model.") else ""
    return f"{prefix}{head}.weight"


def _shared_inputs(entries: Mapping[str, Entry]) -> tuple[tuple[str, ...], ...]:
    """Groups of linear modules under one parent that read the same input, by their names (`names.SHARED_INPUTS`).

    Under cross attention queries are left out: they read the decoder, and keys and values the encoder.
    """
    children: dict[str, dict[str, str]] = {}
    for entry in entries.values():
        if entry.role == "linear":
            parent, _, last = entry.module.rpartition(".")
            children.setdefault(parent, {})[last] = entry.module
    groups = []
    for parent, modules in children.items():
        crosses = any(part in names.CROSS_ATTENTION for part in parent.split("."))
        for group in names.SHARED_INPUTS:
            members = group[1:] if crosses and len(group) == 3 else group  # without the queries
            present = tuple(modules[last] for last in members if last in modules)
            if len(present) > 1:
                groups.append(present)
    return tuple(groups)
