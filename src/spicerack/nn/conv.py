"""`QConv2d`: nn.Conv2d with packed weights, which are decoded at each call.

There is no kernel that convolves packed weights yet. What is gained is memory: the packed weight, and one float weight
while its layer computes; what is lost is the time to decode it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spicerack.nn.weight import PackedLayer, PackedWeight


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a convolution is beside its numbers, as nn.Conv2d's arguments of the same names; it pads with zeros.

    padding: "same", "valid", or rows and columns on either side. groups: inputs and outputs fall into so many groups,
    and each output reads its own group's inputs.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """That of a float convolution which pads with zeros, or of a layer in its place, which carries it."""
        if isinstance(geometry := vars(layer).get("geometry"), Geometry):
            return geometry
        return cls(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)


class QConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc]  # its weight is no attribute
    """x [..., I, H, W] -> [..., O, H', W'] in x's type; differentiable in x and b, not in W.

    packed     the matrix [O, I / groups * height * width]: a row is all that an output reads
    geometry   how the kernel is moved, see `Geometry`
    bias       [O], or None; computed with in x's type

    The whole float weight is there while the layer computes, and goes afterwards.
    """

    def __init__(self, packed: PackedWeight, geometry: Geometry, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed, bias)
        self.geometry = g = geometry
        self.out_channels, self.padding_mode = packed.shape[0], "zeros"
        self.in_channels = packed.shape[1] // math.prod(g.kernel_size) * g.groups
        self.kernel_size, self.stride, self.padding, self.dilation, self.groups = (
            g.kernel_size, g.stride, g.padding, g.dilation, g.groups
        )  # fmt: skip

    def decode(self) -> torch.Tensor:
        """The float weight [O, I / groups, height, width], decoded anew at each call."""
        return self.packed.decode().view(self._strided()[0])

    def _strided(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        (rows, columns), (height, width) = self.packed.shape, self.geometry.kernel_size
        inputs = columns // (height * width)
        return (rows, inputs, height, width), (columns, height * width, width, 1)

    def extra_repr(self) -> str:
        return str(self.geometry)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, bias = self.geometry, None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.conv2d(x, self.decode().to(x.dtype), bias, g.stride, g.padding, g.dilation, g.groups)
