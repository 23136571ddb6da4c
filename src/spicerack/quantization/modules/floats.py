"""What stays in float in a module in memory although it is a matrix, why, and when people are told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from spicerack.errors import RecipeError, listed
from spicerack.nn import kinds
from spicerack.numerics.dtypes import SOURCES
from spicerack.quantization import staying
from spicerack.quantization.modules.layers import layers_of, theirs
from spicerack.quantization.staying import Staying

_LISTED = 8
"""Layers that a message names before it counts the rest."""
_ADAPTERS = "an adapter's own, which is trained in float"
"""Why what an adapter adds around a layer stays in float, of whatever class it is."""


def nothing(module: nn.Module, problem: str, hint: str) -> RecipeError:
    """What is raised of a module of which nothing is quantized: the problem, and which matrices it has that cannot be,
    with the reason."""
    left = staying.reasons(staying_in(module))
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
    left = staying_in(module)
    if (told := staying.told(left, packed + sum(matrix.numel for matrix in left))) is not None:
        warnings.warn(f"{type(module).__name__}: {told}", stacklevel=stacklevel)


def staying_in(module: nn.Module) -> list[Staying]:
    """Matrices of `module` that have no packed form, each once, by its layer's path (its own, if it is no layer's
    weight). Tables are none of them."""
    prefixes, adapters = theirs(module), kinds.inside_wrappers(module)
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
                why = _ADAPTERS if f"{path}.".startswith(adapters) else _why(path, part, key, parameter, prefixes)
                left.append(Staying(name, parameter.numel(), why))
    return left


def _why(path: str, part: nn.Module, key: str, parameter: torch.Tensor, theirs: tuple[str, ...]) -> str:
    """Why a matrix of `part`, which is no adapter's own, stays in float.

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


def tables_of(module: nn.Module) -> dict[str, str]:
    """Path -> why, of embeddings that have no packed form: subclasses, those of another type, and an adapter's own."""
    inside, adapters = layers_of(module), kinds.inside_wrappers(module)
    return {
        path: _ADAPTERS if f"{path}.".startswith(adapters) else _why(path, part, "weight", part.weight, ())
        for path, part in module.named_modules()
        if isinstance(part, nn.Embedding) and path not in inside
    }
