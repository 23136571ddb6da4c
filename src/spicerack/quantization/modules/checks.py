"""What of a module in memory is refused before a weight is rounded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from spicerack.errors import RecipeError, SchemeError, WeightError
from spicerack.nn import kinds
from spicerack.nn.kinds import Inputs
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import fitting
from spicerack.quantization.modules.layers import shape_of, weight_name

_NO_TOKENS: dict[Inputs, str] = {
    "ids": "an embedding has no activations to quantize",
    "maps": "a convolution has no tokens to find scales of",
}
"""Why inputs of these kinds are not rounded to int8 with a scale per token."""


def check(layers: Mapping[str, nn.Module], schemes: Mapping[str, Scheme]) -> None:
    """Raise for the first layer that cannot have its scheme, and for all at once whose shape no whole groups tile.

    Raises RecipeError (the layer has no packed form), SchemeError (activations that it cannot round), WeightError (it
    has no values), ShapeError.
    """
    misfits = []
    for name, layer in layers.items():
        _check_layer(name, layer, schemes[name])
        if (misfit := fitting.obstacle(name, schemes[name], shape_of(layer))) is not None:
            misfits.append(misfit)
    hopeless = [misfit for misfit in misfits if misfit.nearest is None]
    if hopeless:
        skips = ", ".join(f"'{misfit.module}=skip'" for misfit in hopeless)
        raise fitting.error(hopeless, "it has nothing to pack" if "" in layers else f"skip them: rules=[{skips}]")
    if misfits:
        paste = ", ".join(f"'{rule}'" for rule in fitting.rules(misfits, layers))
        alone = (
            f"use {misfits[0].nearest}"
            if "" in layers
            else f"fit_groups=True (--fit-groups) or, which is the same, rules=[{paste}] (--set)"
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
    weight = kinds.weight_of(layer)
    if weight.is_meta:
        raise WeightError(f"{weight_name(name)} is on the meta device: it has no values", "load the weights first")
    if weight.layout is not torch.strided:
        raise WeightError(f"{weight_name(name)} is sparse ({weight.layout})", "make it dense (weight.to_dense())")


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
