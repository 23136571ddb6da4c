"""A copy of a module in memory with quantized layers: what `spicerack.quantize(module, ...)` does.

Each weight is rounded to nearest and packed once, where it is; layers that share it share what comes of it.
"""

from __future__ import annotations

import dataclasses
import os

from torch import nn

from spicerack.kernels.kernel import Compute
from spicerack.nn import kinds
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import rounding
from spicerack.numerics.scheme import Scheme
from spicerack.quantization.modules.checks import check, check_owners
from spicerack.quantization.modules.copies import with_packed
from spicerack.quantization.modules.floats import nothing, warn_of_staying
from spicerack.quantization.modules.layers import key_of, layers_of, weight_name
from spicerack.quantization.modules.schemes import schemes_of
from spicerack.quantization.recipe import Recipe


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
    warn_of_staying(module, stacklevel=7)
    weights: dict[tuple[int, bool], PackedWeight] = {}
    for name in sorted(layers, key=tied.__contains__):  # errors name the owner
        if (key := key_of(layers[name])) not in weights:
            weights[key] = _pack(weight_name(name), layers[name], schemes[name], recipe, compute)
    packed = {name: weights[key_of(layer)] for name, layer in layers.items()}
    return with_packed(module, packed, kinds.of, map(kinds.weight_of, layers.values()))


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
