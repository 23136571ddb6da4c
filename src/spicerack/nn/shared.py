"""Layers that share an input (query, key and value; gate and up) run as one call, unseen by the model's own code.

One call rounds the input once and starts its threads once. The model's code calls layer after layer as before: the
first computes for all, the others hand out what was computed. Whether the input is the same is told by the tensor
itself and by torch's count of writes into it.

What is given up. The results of the others are in memory until they are fetched; and whoever calls one of the layers
alone, to look at it, computes all of them once and then parts them for good (`SharedInput.dissolve`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from spicerack.models.families import names
from spicerack.nn.linear import QLinear


class SharedInput:
    """Layers that are called with the same x [..., K].

    The layer that is called first multiplies x by the weights of all; each of the others hands out what it is due.

    x is the same if it is the same tensor and nobody wrote into it since. If a result is not fetched before the next x
    comes, the layers do not share their input after all, and each computes for itself from then on.
    """

    def __init__(self, layers: Sequence[QLinear]) -> None:
        self.layers = tuple(layers)
        self._x: torch.Tensor | None = None
        self._version = 0
        self._due: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            layer.joined = self

    def forward(self, layer: QLinear, x: torch.Tensor) -> torch.Tensor:
        """What `layer`, one of these, makes of x [..., K], a plain tensor of ordinary (not inference) mode: [..., N].

        The first call with an x computes all layers; each of the others takes its result out. A call that comes before
        all results of the last x were taken parts the layers, and computes its own.
        """
        due, place = self._due, self.layers.index(layer)
        if self._x is x and self._version == x._version and place in due:
            y = due.pop(place)
            if not due:
                self._x = None
            return y
        if due:
            self.dissolve()
            return layer.packed.forward(x, layer.bias)
        matrices = [layer.packed.prepared() for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        results = dict(enumerate(self.layers[0].packed.choice.kernel.run(x, matrices, biases, False)))
        y = results.pop(place)
        self._x, self._version, self._due = x, x._version, results
        return y

    def dissolve(self) -> None:
        """Let each layer compute for itself from now on."""
        for layer in self.layers:
            layer.joined = None
        self._x, self._due = None, {}


def share_inputs(model: nn.Module) -> None:
    """Join the quantized layers of `model` that by their names share an input, have one kernel and take x alike.

    The layers are changed in place (`QLinear.joined`). Names: `families.names.SHARED_INPUTS`.
    """
    for name, parent in model.named_modules():
        if not any(type(child) is QLinear for child in parent._modules.values()):
            continue  # most modules of a model, and a group is looked for by a dozen names
        crossed = not names.CROSS_ATTENTION.isdisjoint(name.split("."))
        for group in names.SHARED_INPUTS:
            members = [getattr(parent, member, None) for member in group[crossed:]]
            layers = {id(layer): layer for layer in members if type(layer) is QLinear and _is_native(layer)}
            if len(layers) > 1 and len({_call(layer) for layer in layers.values()}) == 1:
                SharedInput(list(layers.values()))


def _is_native(layer: QLinear) -> bool:
    """Whether a native kernel runs the layer: the reference decodes weight by weight, and gains nothing by one call."""
    return layer.packed.choice.kernel.name != "reference"


def _call(layer: QLinear) -> tuple[object, ...]:
    """What layers must have in common to run in one call: kernel, how x is rounded, and by which scale, and K."""
    fixed = layer.packed.tensors.get("input_scale")
    scale = None if fixed is None else float(fixed)
    return layer.packed.choice.kernel.name, layer.packed.scheme.activations, scale, layer.in_features
