"""Quantized layers into a module in memory: what `spicerack.quantize(module, ...)` does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack import recipe
from spicerack.algorithms import rtn
from spicerack.errors import RecipeError, ShapeError
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.linear import QLinear
from spicerack.nn.packed import PackedWeight
from spicerack.recipe import Recipe
from spicerack.scheme import Scheme

_HEADS = ("lm_head", "embed_out")


def quantize_module(module: nn.Module, what: Recipe) -> nn.Module:
    """A copy of `module` with quantized layers; `module` itself is not changed, floats that stay are copied.

    Rules match the layers' paths in the module. Raises RecipeError, ShapeError (all at once), WeightError.
    """
    found = dict(_layers(module))
    owners = {name: layer for name, layer in found.items() if name not in (tied := _tied(found))}
    decisions = recipe.resolve(what, {name: _role(name, layer) for name, layer in owners.items()}, tied)
    if not found or all(decision.scheme is None for decision in decisions.values()):
        raise RecipeError(f"{type(module).__name__} has no layer that the recipe quantizes", "it needs nn.Linear layers")
    chosen = {name: d.scheme for name, d in decisions.items() if d.scheme is not None}
    _check(found, chosen)
    packed: dict[int, PackedWeight] = {}
    weights: dict[int, object] = {}
    for name, scheme in chosen.items():
        weight = found[name].weight
        if id(weight) not in packed:
            packed[id(weight)] = _pack(name, found[name], scheme, what)
            weights[id(weight)] = weight
    small = copy.deepcopy(module, dict(weights))  # the big float weights are shared for a moment, not copied
    for name in chosen:
        old = small.get_submodule(name)
        small.set_submodule(name, _quantized(old, packed[id(found[name].weight)]))
    return small


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding | Conv1D]]:
    for name, layer in module.named_modules(remove_duplicate=False):
        if name and type(layer) in (nn.Linear, nn.Embedding, Conv1D):
            assert isinstance(layer, (nn.Linear, nn.Embedding, Conv1D))
            yield name, layer


def _tied(layers: dict[str, nn.Linear | nn.Embedding | Conv1D]) -> dict[str, str]:
    """alias -> owner, for layers that share their weight."""
    first: dict[int, str] = {}
    return {name: owner for name, layer in layers.items() if (owner := first.setdefault(id(layer.weight), name)) != name}


def _role(name: str, layer: nn.Module) -> str:
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, Conv1D):
        return "conv1d"
    return "head" if name.rsplit(".", 1)[-1] in _HEADS else "linear"


def _check(layers: dict[str, nn.Linear | nn.Embedding | Conv1D], chosen: dict[str, Scheme]) -> None:
    problems = []
    for name, scheme in chosen.items():
        layer = layers[name]
        shape = tuple(layer.weight.shape)
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
            raise RecipeError(f"{name}: an embedding with max_norm, scale_grad_by_freq or sparse stays in float", "skip it")
        try:
            scheme.check_shape(name, shape[::-1] if isinstance(layer, Conv1D) else shape)
        except ShapeError as error:
            problems.append(error)
    if problems:
        raise ShapeError("\n  ".join(p.message for p in problems[:8]), "; ".join(sorted({p.hint for p in problems})))


def _pack(name: str, layer: nn.Linear | nn.Embedding | Conv1D, scheme: Scheme, what: Recipe) -> PackedWeight:
    weight = layer.weight.detach()
    transposed = isinstance(layer, Conv1D)
    matrix = (weight.t() if transposed else weight).contiguous().cpu()
    q = rtn.solve(matrix, scheme, range_=what.range_, name=name)
    q = dataclasses.replace(q, transposed=transposed)
    return PackedWeight(q, weight.dtype, weight.device)


def _quantized(old: nn.Module, packed: PackedWeight) -> nn.Module:
    if isinstance(old, nn.Embedding):
        return QEmbedding(packed, old.padding_idx)
    assert isinstance(old, (nn.Linear, Conv1D))
    return QLinear(packed, old.bias).train(old.training)
