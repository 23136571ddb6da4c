"""Quantized layers into a module in memory: what `spicerack.quantize(module, ...)` does.

    layers_of        path -> layer, of all kinds that have a packed form (`nn/kinds.py`)
    warn_of_staying  what stays in float beside them although it is a matrix, and why
    schemes_of       path -> scheme, by the rules and the defaults that the command has; who is tied to whom
    check            all that can be refused is, before a weight is rounded
    _pack            each weight once, rounded to nearest and packed where it is
    with_packed      a copy of the module, with packed layers in the places of those

`prepare_qat` decides by the same functions which layers it trains, so that what is trained is what would be quantized.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from spicerack.errors import RecipeError, SchemeError, UsageError, WeightError, listed
from spicerack.kernels.kernel import Compute
from spicerack.models import census
from spicerack.models.families import names
from spicerack.nn import kinds
from spicerack.nn.fused import fuse
from spicerack.nn.kinds import Inputs, LayerKind
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import rounding
from spicerack.numerics.dtypes import SOURCES, safetensors_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import fitting, staying
from spicerack.quantization.recipe import Recipe, resolve
from spicerack.quantization.staying import Staying
from spicerack.runtime.hf import tell_transformers
from spicerack.storage.reader import Checkpoint, TensorInfo

_HEADS = ("lm_head", "embed_out")
"""What heads are called in modules that are not transformers'."""
_LISTED = 8
"""Layers that a message names before it counts the rest."""
_NO_TOKENS: dict[Inputs, str] = {
    "ids": "an embedding has no activations to quantize",
    "maps": "a convolution has no tokens to find scales of",
}
"""Why inputs of these kinds are not rounded to int8 with a scale per token."""


def quantize_module(module: nn.Module, recipe: Recipe, compute: Compute | None = None) -> nn.Module:
    """A copy of `module` with quantized layers; `module` itself is not changed, floats that stay are copied.

    Layers are exactly the classes of `nn/kinds.py` (nn.Linear, nn.Embedding, nn.Conv2d, transformers' Conv1D), of 16 or
    32 bits; subclasses may compute something else and stay as they are, and so do convolutions in transformers models.
    Rules match the layers' paths in the module, which for a layer on its own is empty; then the quantized layer is what
    comes back. compute: as in `load`.

    What stays in float is warned of from a twentieth of the weights on. Raises RecipeError, SchemeError, ShapeError
    (all layers at once), WeightError.
    """
    layers = layers_of(module)
    if not layers:
        hint = "it needs nn.Linear, nn.Embedding or nn.Conv2d layers"
        raise nothing(module, "has no layer with a packed form", hint)
    schemes, tied = schemes_of(module, recipe, layers)
    layers = {name: layers[name] for name in schemes}
    check(layers, schemes)
    check_owners(module, layers)
    warn_of_staying(module, stacklevel=5)
    weights: dict[tuple[int, bool], PackedWeight] = {}
    for name in sorted(layers, key=tied.__contains__):  # errors name the owner
        if (key := _key(layers[name])) not in weights:
            weights[key] = _pack(weight_name(name), layers[name], schemes[name], recipe, compute)
    packed = {name: weights[_key(layer)] for name, layer in layers.items()}
    return with_packed(module, packed, kinds.of, map(kinds.weight_of, layers.values()))


# ---- what there is ---------------------------------------------------------------------------------------------------


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer with a packed form, under all their names: those of tied and of repeated layers too.

    Of a float type that weights are quantized from; convolutions only outside of transformers models; of an adapter the
    layer that it is around, and not what it adds.
    """
    adapters = kinds.inside_wrappers(module)
    theirs = _theirs(module)
    layers: dict[str, nn.Module] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        kind = kinds.find(layer)
        if kind is None or kinds.weight_of(layer).dtype not in SOURCES or f"{name}.".startswith(adapters):
            continue
        if not (kind.plain_only and name.startswith(theirs)):
            layers[name] = layer
    return layers


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
    schemes = {name: scheme for name in layers if (scheme := decisions[name].scheme) is not None}
    if recipe.fit_groups:
        schemes |= _fitted(schemes, layers)
    if not schemes:
        raise nothing(
            module,
            "has no layer that the recipe quantizes",
            f"embeddings and heads must be named by a rule, such as '{next(iter(layers))}={recipe.scheme.name}'",
        )
    return schemes, tied


def _fitted(schemes: Mapping[str, Scheme], layers: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """Path -> the nearest scheme that fits, for layers that no whole groups of theirs tile; warned of."""
    fitted = fitting.fitted(schemes, {name: _shape(layers[name]) for name in schemes})
    if fitted:
        kinds_of_layers = list(dict.fromkeys(f"{schemes[name]} -> {new}" for name, new in fitted.items()))
        names = listed(list(fitted), _LISTED, "layers")
        warnings.warn(f"groups do not tile {names}: {', '.join(kinds_of_layers)}", stacklevel=6)
    return fitted


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """[N, K] of a layer's weight as a matrix."""
    return tuple(kinds.of(layer).matrix(kinds.weight_of(layer)).shape)


def _refuse_vain(module: nn.Module, recipe: Recipe, layers: Mapping[str, nn.Module]) -> None:
    """Raise RecipeError for a rule that asks for a scheme of what stays in float, and of nothing else."""
    others = {**_tables_of(module), **{matrix.name: matrix.why for matrix in _staying(module)}}
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


def weight_name(name: str) -> str:
    """What the weight of the layer `name` is called; a layer on its own has no name."""
    return f"{name}.weight" if name else "weight"


def _key(layer: nn.Module) -> tuple[int, bool]:
    """Layers with one key share a PackedWeight.

    A Conv1D that is tied to a linear layer does not: it reads the same numbers the other way round.
    """
    return id(layer.weight), kinds.of(layer).transposed


# ---- what stays in float ---------------------------------------------------------------------------------------------


def nothing(module: nn.Module, problem: str, hint: str) -> RecipeError:
    """What is raised of a module of which nothing is quantized: the problem, and which matrices it has that cannot be,
    with the reason."""
    left = staying.reasons(_staying(module))
    message = f"{type(module).__name__} {problem}"
    if not left:
        return RecipeError(message, hint)
    return RecipeError(f"{message}: " + listed(left, _LISTED, between="; "), _remedy(left))


def _remedy(reasons: Sequence[str]) -> str:
    """What helps where nothing is quantized for these reasons."""
    if any("float64" in reason for reason in reasons):
        return "convert the module first: module.float()"
    return "give the layers the exact classes nn.Linear, nn.Embedding or nn.Conv2d, if they compute no more than those"


def warn_of_staying(module: nn.Module, stacklevel: int) -> None:
    """Warn of what stays in float in `module` although it is a matrix, if it is much: the same as the command's note.

    stacklevel: as in `warnings.warn`, of the call in somebody's program.
    """
    weights = {id(layer.weight): layer for layer in layers_of(module).values() if kinds.of(layer).role != "embedding"}
    packed = sum(kinds.weight_of(layer).numel() for layer in weights.values())
    left = _staying(module)
    if (told := staying.told(left, packed + sum(matrix.numel for matrix in left))) is not None:
        warnings.warn(f"{type(module).__name__}: {told}", stacklevel=stacklevel)


def _staying(module: nn.Module) -> list[Staying]:
    """Matrices of `module` that have no packed form, each once, by its layer's path (its own, if it is no layer's
    weight). Tables are none of them."""
    theirs = _theirs(module)
    known = {id(layer.weight) for layer in layers_of(module).values()}
    left: list[Staying] = []
    for path, part in module.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            routes = "Router" in type(part).__name__  # stays unless a rule names it, like heads and tables
            if id(parameter) in known or parameter.dim() < 2 or routes or isinstance(part, nn.Embedding):
                continue
            known.add(id(parameter))
            name = path if key == "weight" else f"{path}.{key}" if path else key
            if key == "weight" or not staying.is_table(name):
                left.append(Staying(name, parameter.numel(), _why(path, part, key, parameter, theirs)))
    return left


def _why(path: str, part: nn.Module, key: str, parameter: torch.Tensor, theirs: tuple[str, ...]) -> str:
    """Why a matrix of `part` stays in float.

    path       of the module
    key        what the parameter is called in it
    parameter  the matrix
    theirs     what paths inside of transformers' models begin with
    """
    cls = type(part).__name__
    if parameter.dtype not in SOURCES:
        word = str(parameter.dtype).removeprefix("torch.")
        return f"{word} weights are not quantized, only float32, float16 and bfloat16"
    if key != "weight":
        if parameter.dim() == 3 and "expert" in f"{path}.{key}.{cls}".lower():
            return f"experts in one parameter of {cls}, which are quantized in a folder only: save the model first"
        return f"a parameter of {cls}, which is no layer that can be packed"
    kind = kinds.find(part)
    if kind is not None and kind.plain_only and path.startswith(theirs):
        return "convolutions of transformers models stay in float"
    base = next((k.float_class.__name__ for k in kinds.KINDS if isinstance(part, k.float_class)), None)
    if base is None:
        return f"{cls} has no packed form"
    return f"{type(part).__module__}.{cls} is a subclass of {base}, which may compute something else"


def _tables_of(module: nn.Module) -> dict[str, str]:
    """Path -> why, of embeddings that have no packed form: subclasses, and those of another type."""
    inside = layers_of(module)
    return {
        path: _why(path, part, "weight", part.weight, ())
        for path, part in module.named_modules()
        if isinstance(part, nn.Embedding) and path not in inside
    }


def _theirs(module: nn.Module) -> tuple[str, ...]:
    """What paths inside of transformers' models begin with."""
    modules = module.named_modules(remove_duplicate=False)
    return tuple(f"{path}." if path else "" for path, part in modules if isinstance(part, PreTrainedModel))


# ---- what is refused -------------------------------------------------------------------------------------------------


def check(layers: Mapping[str, nn.Module], schemes: Mapping[str, Scheme]) -> None:
    """Raise for the first layer that cannot have its scheme, and for all at once whose shape no whole groups tile.

    Raises RecipeError (the layer has no packed form), SchemeError (activations that it cannot round), WeightError (it
    has no values), ShapeError.
    """
    misfits = []
    for name, layer in layers.items():
        _check_layer(name, layer, schemes[name])
        if (misfit := fitting.obstacle(name, schemes[name], _shape(layer))) is not None:
            misfits.append(misfit)
    if misfits:
        paste = ", ".join(f"'{rule}'" for rule in fitting.rules(misfits, layers))
        alone = (
            f"use {misfits[0].nearest}"
            if "" in layers
            else f"fit_groups=True or, which is the same, rules=[{paste}] (--set)"
        )
        raise fitting.error(misfits, alone)


def _check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    """Raise for a layer that cannot have its scheme, whatever its shape."""
    kind = kinds.of(layer)
    if reason := kinds.obstacle(layer):
        raise RecipeError(f"{name}: {reason}", "skip it")
    if scheme.activations is not None and kind.inputs in _NO_TOKENS:
        raise SchemeError(f"{name}: {_NO_TOKENS[kind.inputs]}", "use the scheme without a8")
    if scheme.activations == "static":
        raise SchemeError(
            f"{name or 'the layer'}: static activation scales ({scheme}) are found by calibration, from a folder",
            f"use {scheme.dynamic}: a scale per token; or save the model, and quantize the folder with calibration",
        )
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        raise RecipeError(
            f"{weight_name(name)} is computed from other parameters, by weight_norm or pruning",
            "make it permanent first (remove_weight_norm, prune.remove), or skip it",
        )
    if kinds.weight_of(layer).is_meta:
        raise WeightError(f"{weight_name(name)} is on the meta device: it has no values", "load the weights first")


def check_owners(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise RecipeError if something beside `layers` holds a weight of theirs: it would stay float, tied no longer.

    module: the whole model, in which such an owner is looked for. layers: path -> layer that will be replaced.
    """
    weights = {id(layer.weight): name for name, layer in layers.items()}
    for name, owner in module.named_modules(remove_duplicate=False):
        for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in weights and name not in layers:
                place = f"{name}.{key}" if name else key
                raise RecipeError(
                    f"{weight_name(weights[id(parameter)])} is tied to {place} of a {type(owner).__name__}, "
                    "which has no packed form",
                    "skip it",
                )


# ---- what comes of it ------------------------------------------------------------------------------------------------


def _pack(name: str, layer: nn.Module, scheme: Scheme, recipe: Recipe, compute: Compute | None) -> PackedWeight:
    """A layer's weight, rounded to nearest on the CPU, packed on its own device.

    name      of the weight, for errors
    layer     of a kind that has a packed form
    scheme    its numbers
    recipe    says how scales are chosen
    compute   as in `load`

    Raises WeightError for what is not finite or beyond its scale's type.
    """
    kind, weight = kinds.of(layer), kinds.weight_of(layer).detach()
    matrix = kind.matrix(weight).contiguous().cpu()
    q = rounding.to_nearest(matrix, scheme, range_=recipe.range_, name=name, threads=os.cpu_count() or 1)
    return PackedWeight(dataclasses.replace(q, transposed=kind.transposed), weight.dtype, weight.device, compute)


def with_packed(
    model: nn.Module,
    packed: Mapping[str, PackedWeight],
    kind_of: Callable[[nn.Module], LayerKind],
    leaving: Iterable[torch.Tensor],
    copied: Callable[[nn.Module, dict[int, Any]], nn.Module] = copy.deepcopy,
) -> nn.Module:
    """A copy of `model` with packed layers in its places, which are one where layers are one.

    packed   path of a layer -> the weight that takes its place; a model that is such a layer itself is at ""
    kind_of  such a layer -> its kind
    leaving  tensors of the model that leave it with those layers: they are not copied, so are never there twice
    copied   makes the copy, as `copy.deepcopy` does, with a memo of what is shared
    """
    small = _copy(model, {id(tensor): tensor for tensor in leaving}, copied)
    places = {name: small.get_submodule(name) for name in packed}
    new: dict[int, nn.Module] = {}
    for name, layer in places.items():
        if id(layer) not in new:
            kind = kind_of(layer)
            new[id(layer)] = as_before(kind.pack(packed[name], kind.options(layer), kinds.bias_of(layer)), layer)
        if not name:
            return new[id(layer)]
        small.set_submodule(name, new[id(layer)])
    fuse(small)
    for part in small.modules():
        if isinstance(part, PreTrainedModel):
            tell_transformers(part)
    return small


class _WithoutHistory(TorchFunctionMode):
    """Within this, copies of tensors that were computed are of their numbers alone.

    torch refuses to copy a tensor with a history, which a module holds that keeps its last output or loss, say.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch calls it, in place of any function of tensors."""
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _copy(
    model: nn.Module, memo: dict[int, Any], copied: Callable[[nn.Module, dict[int, Any]], nn.Module]
) -> nn.Module:
    """A copy of `model`, by `copied`; what is in `memo` is shared with it.

    Raises UsageError that names the attribute that cannot be copied: a generator, a lock, an open file.
    """
    try:
        with _WithoutHistory():
            return copied(model, dict(memo))
    except (TypeError, RuntimeError) as error:
        for path, part in model.named_modules():
            for key, value in vars(part).items():
                if key in ("_parameters", "_buffers", "_modules"):
                    continue
                try:
                    copy.deepcopy(value, {**memo, id(model): model})
                except (TypeError, RuntimeError):
                    name = f"{path}.{key}" if path else key
                    raise UsageError(
                        f"{name} of {type(part).__name__} is a {type(value).__name__}, which cannot be copied: {error}",
                        "remove it, quantize, and put it back",
                    ) from error
        raise


def as_before(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new`, changed in place to have the mode and the hooks of `old`, whose place it takes."""
    for key, value in vars(old).items():
        if key.startswith(("_forward_", "_backward_", "_is_full_backward_hook")):
            vars(new)[key] = value
    return new.train(old.training)
