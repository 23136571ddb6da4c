"""Training's columns of the table of kinds: which layers train in the place of a float one, and of a packed one.

    kind        float              trains as       packed          trains as
    linear      nn.Linear          FakeLinear      QLinear         TunedLinear
    conv1d      Conv1D             FakeConv1D      QConv1D         TunedLinear
    conv2d      nn.Conv2d          FakeConv2d      QConv2d         TunedConv2d
    embedding   nn.Embedding       FakeEmbedding   QEmbedding      TunedEmbedding

A kind of `nn/kinds.py` that has no row here is quantized, saved and loaded, and is not trained in few bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from spicerack.errors import RecipeError
from spicerack.nn import kinds
from spicerack.nn.kinds import LayerKind
from spicerack.nn.weight import PackedLayer
from spicerack.training.qat.fake_layers import FakeConv1D, FakeConv2d, FakeEmbedding, FakeLayer, FakeLinear, Rounding
from spicerack.training.qat.tuned_layers import SharedWeight, TunedConv2d, TunedEmbedding, TunedLayer, TunedLinear


@dataclass(frozen=True, slots=True)
class Twins:
    """What trains in the place of a layer of one kind.

    fake    in the place of the float layer, a subclass of its class
    tuned   in the place of the packed one
    """

    fake: type[FakeLayer]
    tuned: type[TunedLayer]


TWINS: Mapping[str, Twins] = {
    "linear": Twins(FakeLinear, TunedLinear),
    "conv1d": Twins(FakeConv1D, TunedLinear),
    "conv2d": Twins(FakeConv2d, TunedConv2d),
    "embedding": Twins(FakeEmbedding, TunedEmbedding),
}
"""By the name of the kind."""

Learned = tuple[nn.Parameter | None, nn.Parameter | None]
"""Scale and zero point of each group, [N/rows, K/columns]; None if they are not learned."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where the training of one float layer begins.

    layer         the layer itself, whose parameters train on
    rounding      how its weight and its inputs are rounded
    learned       scale and zero point, the same parameters for layers that are tied
    input_scale   the first scale [1, 1] of static activations; None if they are not static
    """

    layer: nn.Module
    rounding: Rounding
    learned: Learned
    input_scale: torch.Tensor | None = None


def of(name: str, kind: LayerKind) -> Twins:
    """What trains in the place of the layer `name`. Raises RecipeError for a kind that is not trained."""
    if kind.name not in TWINS:
        raise RecipeError(f"{name}: a {kind.float_class.__name__} is not trained in few bits", "skip it")
    return TWINS[kind.name]


def fake_twin(name: str, start: Start) -> FakeLayer:
    """The layer that trains in the place of a float one: the same parameters, mode and hooks, and what is learned.

    name: its path, for errors. Raises RecipeError for a kind that is not trained.
    """
    layer, (scale, zero) = start.layer, start.learned
    kind = kinds.of(layer)
    cls = of(name, kind).fake
    # Not by its constructor, which would make parameters anew: all that the float layer had is in its attributes.
    new = cls.__new__(cls)
    vars(new).update(vars(layer))
    new._parameters = dict(layer._parameters)
    new.kind, new.rounding = kind, start.rounding
    new.register_parameter("weight_scale", scale)
    new.register_parameter("weight_zero", zero)
    if start.input_scale is not None and start.rounding.ranges == "ema":
        new._buffers = {**layer._buffers, "input_scale": start.input_scale}
    else:
        static = start.input_scale
        new.register_parameter("input_scale", None if static is None else nn.Parameter(static))
    return new


def tuned_twin(name: str, layer: PackedLayer, shared: SharedWeight) -> TunedLayer:
    """The layer whose scales train in the place of a packed one, with its bias.

    name: its path, for errors. shared: of its packed weight, the same for layers that are tied. Raises RecipeError for
    a kind that is not trained.
    """
    kind = kinds.of_packed(layer)
    return of(name, kind).tuned(kind, shared, kind.options(layer), layer.bias)
