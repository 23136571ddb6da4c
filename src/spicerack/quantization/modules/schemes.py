"""Which scheme each layer of a module in memory gets, by the rules and the defaults that the command has, and which
layers are tied to which.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from spicerack.errors import RecipeError, listed
from spicerack.models import census
from spicerack.models.families import names
from spicerack.models.roles import classifiers_of
from spicerack.nn import kinds
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import fitting
from spicerack.quantization.modules.floats import nothing, staying_in, tables_of
from spicerack.quantization.modules.layers import shape_of, weight_name
from spicerack.quantization.recipe import Recipe, resolve
from spicerack.storage.reader import Checkpoint, TensorInfo

_HEADS = ("lm_head", "embed_out")
"""What heads are called in modules that are not transformers'."""
_LISTED = 8
"""Layers that a message names before it counts the rest."""


def schemes_of(
    module: nn.Module, recipe: Recipe, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Path -> scheme, for the layers that the recipe quantizes; and alias -> owner, for all that share a weight.

    layers: of `layers_of`. What is tied is one tensor: a rule on either name decides for both. Raises RecipeError if
    that is no layer, and for a rule that names none.
    """
    _refuse_vain(module, recipe, layers)
    roles = _roles(module, layers)
    tied = _ties(layers, roles)
    decisions = resolve(recipe, {name: role for name, role in roles.items() if name not in tied}, tied)
    schemes = {
        name: scheme
        for name, layer in layers.items()
        if (scheme := decisions[name].scheme) is not None and not _is_empty(layer)
    }  # a layer without numbers has nothing to pack, and stays as it is
    if recipe.fit_groups:
        schemes |= _fitted(schemes, layers)
    if not schemes:
        raise nothing(
            module,
            "has no layer that the recipe quantizes",
            f"embeddings and heads must be named by a rule, such as '{next(iter(layers))}={recipe.scheme.name}'",
        )
    return schemes, tied


def _is_empty(layer: nn.Module) -> bool:
    """Whether a layer's weight has no numbers; one whose shape is not known yet has none that could be told."""
    weight = kinds.weight_of(layer)
    return not nn.parameter.is_lazy(weight) and not weight.numel()


def _fitted(schemes: Mapping[str, Scheme], layers: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """Path -> the nearest scheme that fits, for layers that no whole groups of theirs tile; warned of."""
    fitted = fitting.fitted(schemes, {name: shape_of(layers[name]) for name in schemes})
    if fitted:
        kinds_of_layers = list(dict.fromkeys(f"{schemes[name]} -> {new}" for name, new in fitted.items()))
        names = listed(list(fitted), _LISTED, "layers")
        warnings.warn(f"groups do not tile {names}: {', '.join(kinds_of_layers)}", stacklevel=8)
    return fitted


def _refuse_vain(module: nn.Module, recipe: Recipe, layers: Mapping[str, nn.Module]) -> None:
    """Raise RecipeError for a rule that asks for a scheme of what stays in float, and of nothing else."""
    others = {**tables_of(module), **{matrix.name: matrix.why for matrix in staying_in(module)}}
    for rule in recipe.rules:
        if rule.scheme is not None and not any(rule.matches(name) for name in layers):
            for name, why in others.items():
                if rule.matches(name):
                    raise RecipeError(f"rule {rule}: {name or 'the layer'} stays in float: {why}", "leave the rule out")


def _roles(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path -> role, which recipes go by. Inside a transformers model it is what the command would say of its folder.

    That is, `census` goes by names and shapes alone: it is asked with a folder that has no files.
    """
    roles = {name: _role(name, layer) for name, layer in layers.items()}
    classifiers = classifiers_of(vars(module).get("pretrained_cfg"))
    roles |= {name: "head" for name in classifiers if roles.get(name) == "linear"}
    covered: set[str] = set()
    for path, model in module.named_modules(remove_duplicate=False):
        if not isinstance(model, PreTrainedModel):
            continue
        prefix = f"{path}." if path else ""
        inside = {
            _unwrapped(name.removeprefix(prefix)): name
            for name in layers
            if name.startswith(prefix) and name not in covered
        }
        covered.update(inside.values())  # the outermost model knows best
        tensors = {weight_name(n): _info(weight_name(n), layers[full]) for n, full in inside.items()}
        entries = census.take(Checkpoint(Path(), model.config.to_dict(), tensors, (), ())).entries
        for name, full in inside.items():
            role = entries[weight_name(name)].role
            if roles[full] == "linear" and role not in ("linear", "conv1d", "experts"):
                roles[full] = "router" if role == "router" else "head"
    return roles


def _unwrapped(name: str) -> str:
    """The path that a layer had before an adapter was put around it."""
    return ".".join(part for part in name.split(".") if part not in names.WRAPPED)


def _role(name: str, layer: nn.Module) -> str:
    """The role of a layer by its kind and the last part of its name alone.

    A layer on its own, without a name, is what was asked for, whatever its kind: it counts as linear.
    """
    role = kinds.of(layer).role if name else "linear"
    return "head" if role == "linear" and _unwrapped(name).rsplit(".", 1)[-1] in _HEADS else role


def _info(name: str, layer: nn.Module) -> TensorInfo:
    """The layer's weight as a folder's header would tell of it, under `name`: type and shape, and no file."""
    weight = kinds.weight_of(layer)
    return TensorInfo(name, safetensors_dtype(weight.dtype), tuple(weight.shape), weight.nbytes, "")


def _ties(layers: Mapping[str, nn.Module], roles: Mapping[str, str]) -> dict[str, str]:
    """alias -> owner, for layers that share their weight; an embedding or head is the owner, whatever comes first."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.weight), []).append(name)
    owners = [(min(group, key=lambda name: roles[name] not in census.ON_REQUEST), group) for group in groups.values()]
    return {name: owner for owner, group in owners for name in group if name != owner}
