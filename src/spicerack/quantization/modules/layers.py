"""Which layers of a module in memory have a packed form, and what they are called."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from spicerack.nn import kinds
from spicerack.numerics.dtypes import SOURCES


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer with a packed form, under all their names: those of tied and of repeated layers too.

    Of a float type that weights are quantized from; convolutions only outside of transformers models; of an adapter the
    layer that it is around, and not what it adds.
    """
    adapters = kinds.inside_wrappers(module)
    prefixes = theirs(module)
    layers: dict[str, nn.Module] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        kind = kinds.find(layer)
        if kind is None or kinds.weight_of(layer).dtype not in SOURCES or f"{name}.".startswith(adapters):
            continue
        if not (kind.plain_only and name.startswith(prefixes)):
            layers[name] = layer
    return layers


def theirs(module: nn.Module) -> tuple[str, ...]:
    """What paths inside of transformers' models begin with."""
    modules = module.named_modules(remove_duplicate=False)
    return tuple(f"{path}." if path else "" for path, part in modules if isinstance(part, PreTrainedModel))


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """[N, K] of a layer's weight as a matrix."""
    return tuple(kinds.of(layer).matrix(kinds.weight_of(layer)).shape)


def weight_name(name: str) -> str:
    """What the weight of the layer `name` is called; a layer on its own has no name."""
    return f"{name}.weight" if name else "weight"


def key_of(layer: nn.Module) -> tuple[int, bool]:
    """Layers with one key share a PackedWeight.

    A Conv1D that is tied to a linear layer does not: it reads the same numbers the other way round.
    """
    return id(layer.weight), kinds.of(layer).transposed
