"""A block in float32 whose linear layers keep what their weights are made of: each is made for a call, and forgotten.

A float weight of 16 bits, mapped from its file, costs no memory of the process until then, and codes a quarter of what
float32 would. The rest of the block (norms, biases, routers) is copied. All of it is computed on one device.

The model's own code runs the block, and knows of nothing: hooks around each linear layer make its weight and forget it.
What is given up is time, a conversion or a decoding for each call; a call has thousands of tokens, which take longer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from spicerack.nn import kinds
from spicerack.nn.decoded import DecodedWeight
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor, moved


class LentWeight:
    """The weight of one layer, which has it only while it is called: hooks make it before a call, and forget it behind.

    source: what it is made of: float, in the layer's own order, wherever it lies, or codes [N, K] on
    the device. Between calls the layer's parameter is a placeholder that is decoded for whoever reads it.
    """

    source: torch.Tensor | QTensor

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.layer, self.device = layer, device
        self.source = source = layer.get_parameter("weight").detach()
        # some families' code multiplies with `layer.weight` and never calls the layer: that must be the same weight
        lent = DecodedWeight(source.shape, source.stride(), torch.float32, device, self.weight)
        self.placeholder = layer.weight = nn.Parameter(lent, requires_grad=False)
        layer.register_forward_pre_hook(self.make)
        layer.register_forward_hook(self.forget, always_call=True)

    def weight(self) -> torch.Tensor:
        """The weight itself, float32 on the device, in the layer's own order."""
        if not isinstance(self.source, QTensor):
            return moved(self.source, self.device).float()
        decoded = codec.decode(self.source)
        return decoded.t() if kinds.of(self.layer).transposed else decoded

    def own(self) -> None:
        """Keep the weight in memory, float32, as the layer's parameter, which may be written to from now on."""
        self.placeholder = nn.Parameter(self.weight().clone(), requires_grad=False)
        self.layer.weight, self.source = self.placeholder, self.placeholder.detach()

    def make(self, *_: Any) -> None:
        """The hook before a call: the parameter is the weight."""
        if "forward" not in vars(self.layer):  # something else computes, and does not ask for the weight
            self.layer.weight = nn.Parameter(self.weight(), requires_grad=False)

    def forget(self, *_: Any) -> None:
        """The hook behind a call, come what may: the parameter is the placeholder again."""
        self.layer.weight = self.placeholder


def float_copy(block: nn.Module, device: torch.device) -> tuple[nn.Module, dict[str, LentWeight]]:
    """A copy of `block` that computes in float32 on `device`, and the weights of its linear layers, by path.

    These are shared with `block`, and stay where they are between calls; all other parameters are the copy's own.
    """
    weights = [kinds.weight_of(layer) for layer in kinds.linear_layers(block).values()]
    shared = {id(weight): weight for weight in weights}
    twin = copy.deepcopy(block, dict(shared))
    for module in twin.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if id(value) not in shared:
                setattr(module, name, nn.Parameter(moved(value.detach(), device).float(), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            here = moved(buffer, device)
            setattr(module, name, here.float() if here.is_floating_point() else here)
    return twin, {path: LentWeight(layer, device) for path, layer in kinds.linear_layers(twin).items()}


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(N, K), outputs and columns of inputs of a linear layer. A weight that is lent is not made for it."""
    rows, columns = (
        kinds.of(layer).matrix(torch.empty(kinds.weight_of(layer).shape, dtype=torch.float32, device="meta")).shape
    )
    return rows, columns


def columns_of(layer: nn.Module) -> int:
    """K, how many columns the inputs of a linear layer have."""
    return shape_of(layer)[1]
