"""Quantized layers into a module in memory: what `spicerack.quantize(module, ...)` does."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spicerack.errors import RecipeError, SchemeError, ShapeError, WeightError, listed
from spicerack.kernels.kernel import Compute
from spicerack.models import census
from spicerack.models.families import names
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.fused import fuse
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import rounding
from spicerack.numerics.dtypes import SOURCES, safetensors_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import recipe
from spicerack.quantization.recipe import Recipe
from spicerack.runtime.hf import tell_transformers
from spicerack.storage.reader import Checkpoint, TensorInfo

Layer = nn.Linear | nn.Embedding | Conv1D
_HEADS = ("lm_head", "embed_out")
_LISTED = 8


def quantize_module(module: nn.Module, what: Recipe, compute: Compute | None = None) -> nn.Module:
    """A copy of `module` with quantized layers; `module` itself is not changed, floats that stay are copied.

    Layers are exactly nn.Linear, nn.Embedding and transformers' Conv1D, of 16 or 32 bits; subclasses may compute
    something else and stay as they are. Rules match the layers' paths in the module, which for a layer on its own is
    empty. Raises RecipeError, SchemeError, ShapeError (all layers at once), WeightError.
    """
    found = dict(layers_of(module))
    if not found:
        raise RecipeError(
            f"{type(module).__name__} has no layer with a packed form", "it needs nn.Linear or nn.Embedding layers"
        )
    chosen, tied = chosen_of(module, what, found, roles_of(module, found))
    check(found, chosen)
    check_owners(module, found, chosen)
    packed: dict[tuple[int, bool], PackedWeight] = {}
    for name in sorted(chosen, key=tied.__contains__):  # errors name the owner
        if (key := _key(found[name])) not in packed:
            packed[key] = _pack(weight_of(name), found[name], chosen[name], what, compute)
    shared = {id(found[name].weight): found[name].weight for name in chosen}
    small = copy.deepcopy(module, dict(shared))  # these the copy shares for a moment: they are never there twice
    old = {name: small.get_submodule(name) for name in chosen}
    new: dict[int, nn.Module] = {}
    for name, layer in old.items():
        if id(layer) not in new:
            new[id(layer)] = _quantized(layer, packed[_key(layer)])
        if not name:
            return new[id(layer)]
        small.set_submodule(name, new[id(layer)])
    fuse(small)
    for model in small.modules():
        if isinstance(model, PreTrainedModel):
            tell_transformers(model)
    return small


# ---- what there is ---------------------------------------------------------------------------------------------------


def layers_of(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Under all their names, those of tied and repeated layers too."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, (nn.Linear, nn.Embedding, Conv1D)) and layer.weight.dtype in SOURCES:
            exact = type(layer) in (nn.Linear, nn.Embedding, Conv1D)
            if exact or type(layer).__name__ in names.PLAIN_LINEAR:
                yield name, layer


def roles_of(module: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """What recipes go by. Inside a transformers model it is what the command would say of the model's folder."""
    roles = {name: _role(name, layer) for name, layer in layers.items()}
    seen: set[str] = set()
    for path, model in module.named_modules(remove_duplicate=False):
        if isinstance(model, PreTrainedModel):
            prefix = f"{path}." if path else ""
            inside = {n.removeprefix(prefix): n for n in layers if n.startswith(prefix) and n not in seen}
            seen.update(inside.values())  # the outermost model knows best
            tensors = {weight_of(n): _info(weight_of(n), layers[full].weight) for n, full in inside.items()}
            entries = census.take(Checkpoint(Path(), model.config.to_dict(), tensors, (), ())).entries
            for name, full in inside.items():
                role = entries[weight_of(name)].role
                if roles[full] == "linear" and role not in ("linear", "conv1d", "experts"):
                    roles[full] = "router" if role == "router" else "head"
    return roles


def _role(name: str, layer: Layer) -> str:
    if not name:
        return "linear"  # a layer on its own is what was asked for, whatever its kind
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, Conv1D):
        return "conv1d"
    return "head" if name.rsplit(".", 1)[-1] in _HEADS else "linear"


def _info(name: str, weight: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, safetensors_dtype(weight.dtype), tuple(weight.shape), weight.nbytes, "")


def chosen_of(
    module: nn.Module, what: Recipe, layers: Mapping[str, Layer | nn.Conv2d], roles: Mapping[str, str]
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Path -> scheme, for the layers that the recipe quantizes, and alias -> owner. Raises RecipeError for none."""
    tied = ties_of(layers, roles)
    decisions = recipe.resolve(what, {name: role for name, role in roles.items() if name not in tied}, tied)
    chosen = {name: scheme for name in layers if (scheme := decisions[name].scheme) is not None}
    if not chosen:
        raise RecipeError(
            f"{type(module).__name__} has no layer that the recipe quantizes",
            f"embeddings and heads must be named by a rule, such as '{next(iter(layers))}={what.scheme.name}'",
        )
    return chosen, tied


def ties_of(layers: Mapping[str, Layer | nn.Conv2d], roles: Mapping[str, str]) -> dict[str, str]:
    """alias -> owner, for layers that share their weight; an embedding or head is the owner, whatever comes first."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.weight), []).append(name)
    owners = [(min(group, key=lambda name: roles[name] not in census.ON_REQUEST), group) for group in groups.values()]
    return {name: owner for owner, group in owners for name in group if name != owner}


def weight_of(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _key(layer: nn.Module) -> tuple[int, bool]:
    """Layers with one key share a PackedWeight: a Conv1D reads the same numbers the other way round."""
    return id(layer.weight), isinstance(layer, Conv1D)


# ---- what is refused -------------------------------------------------------------------------------------------------


def check(layers: Mapping[str, Layer], chosen: Mapping[str, Scheme]) -> None:
    problems = []
    for name, scheme in chosen.items():
        layer = layers[name]
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
            raise RecipeError(
                f"{name}: an embedding with max_norm, scale_grad_by_freq or sparse stays in float", "skip it"
            )
        if isinstance(layer, nn.Embedding) and scheme.activations is not None:
            raise SchemeError(f"{name}: an embedding has no activations to quantize", "use the scheme without a8")
        if scheme.activations == "static":
            raise SchemeError(
                f"{name or 'the layer'}: static activation scales ({scheme}) are found by calibration, from a folder",
                f"use {scheme.dynamic}: a scale per token; or save the model, and quantize the folder with calibration",
            )
        if "weight" not in dict(layer.named_parameters(recurse=False)):
            raise RecipeError(
                f"{weight_of(name)} is computed from other parameters, by weight_norm or pruning",
                "make it permanent first (remove_weight_norm, prune.remove), or skip it",
            )
        if layer.weight.is_meta:
            raise WeightError(f"{weight_of(name)} is on the meta device: it has no values", "load the weights first")
        shape = tuple(layer.weight.shape)
        try:
            scheme.check_shape(weight_of(name), shape[::-1] if isinstance(layer, Conv1D) else shape)
        except ShapeError as error:
            problems.append(error)
    if problems:
        raise ShapeError(
            listed([p.message for p in problems], _LISTED, between="\n  "),
            "; ".join(sorted({p.hint for p in problems})) + ": rules=['PATTERN=SCHEME']",
        )


def check_owners(module: nn.Module, layers: Mapping[str, Layer | nn.Conv2d], chosen: Mapping[str, Scheme]) -> None:
    """Raise RecipeError if something else holds a chosen weight: it would stay behind in float, no longer tied."""
    weights = {id(layers[name].weight): name for name in chosen}
    for name, owner in module.named_modules(remove_duplicate=False):
        for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in weights and name not in chosen:
                place = f"{name}.{key}" if name else key
                raise RecipeError(
                    f"{weight_of(weights[id(parameter)])} is tied to {place} of a {type(owner).__name__}, "
                    "which has no packed form",
                    "skip it",
                )


# ---- what is made ----------------------------------------------------------------------------------------------------


def _pack(name: str, layer: Layer, scheme: Scheme, what: Recipe, compute: Compute | None) -> PackedWeight:
    weight = layer.weight.detach()
    transposed = isinstance(layer, Conv1D)
    matrix = (weight.t() if transposed else weight).contiguous().cpu()
    q = rounding.to_nearest(matrix, scheme, range_=what.range_, name=name, threads=os.cpu_count() or 1)
    return PackedWeight(dataclasses.replace(q, transposed=transposed), weight.dtype, weight.device, compute)


def _quantized(old: nn.Module, packed: PackedWeight) -> nn.Module:
    """The layer that takes the place of `old`, with its bias."""
    if isinstance(old, nn.Embedding):
        return as_before(QEmbedding(packed, old.padding_idx), old)
    assert isinstance(old, (nn.Linear, Conv1D))
    return as_before(QLinear(packed, old.bias), old)


def as_before(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new`, with the mode and the hooks of `old`."""
    for key, value in vars(old).items():
        if key.startswith(("_forward_", "_backward_", "_is_full_backward_hook")):
            vars(new)[key] = value
    return new.train(old.training)
