"""GELU computed where a quantized layer makes its result, unseen by the model's own code.

A result of N numbers is written once instead of written, read and written again. The model's code still calls layer and
activation one after the other: that the activation was called with the layer's result, and with nothing done to it
between, is seen once at run time; from then on the layer applies it, and the activation hands on what it gets.

How that is known. The layer puts an attribute on the tensor that it returns; the activation looks for it on the tensor
that it is called with, and for torch's count of writes, which must be 0. Any operation between them makes another
tensor, without the attribute. Given up: a hook on the layer that looks at its result sees it behind the activation.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from transformers.activations import GELUActivation

from spicerack.models.families import names
from spicerack.nn.linear import QLinear


class Producer:
    """A layer whose result an activation of the same parent may be called with.

    applies: it was, so that the layer applies the activation from then on. A result carries who made it and whether the
    activation is in it, and the activation looks there: whatever else it is called with is computed as always.
    """

    def __init__(self) -> None:
        self.applies = False

    def forward(self, layer: QLinear, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> x W^T + bias [..., N], or GELU of that, as the result itself says."""
        if torch.is_inference_mode_enabled():  # writes into its tensors are not counted
            return layer.packed.forward(x, layer.bias)
        applies = self.applies
        y = layer.packed.forward(x, layer.bias, applies)
        y.spicerack_producer = (self, applies)  # type: ignore[attr-defined]
        return y


class JoinedGELU(nn.Module):
    """In the place of the activation that it holds: applies it to what does not have it yet, and hands on what has.

    A tensor that no joined layer made, or that somebody wrote into since, is computed as always.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        producer, joined = getattr(x, "spicerack_producer", (None, False))
        if joined:
            return x
        if producer is not None and x._version == 0:
            producer.applies = True
        result: torch.Tensor = self.activation(x)
        return result


def join_gelus(model: nn.Module) -> None:
    """Let the quantized layers of `model` that by their names are followed by a GELU find out whether they are.

    The model is changed in place: the activation is held by a `JoinedGELU`. Only the exact GELU, and only layers that
    are joined with no others.
    """
    for parent in list(model.modules()):
        if not any(type(child) is QLinear for child in parent._modules.values()):
            continue  # most modules of a model
        for layer_name, name in names.THEN_ACTIVATION:
            layer, activation = getattr(parent, layer_name, None), getattr(parent, name, None)
            if type(layer) is QLinear and layer.joined is None and is_gelu(activation):
                setattr(parent, name, JoinedGELU(activation))
                layer.joined = Producer()


def is_gelu(module: object) -> TypeGuard[nn.Module]:
    """Whether it is GELU by the error function: what the kernels compute, and not one of its approximations."""
    return type(module) is GELUActivation or (type(module) is nn.GELU and module.approximate == "none")
