"""Layers that are trained in few bits: subclasses of torch's, with the same parameters under the same names.

What is learned beside them is `weight_scale` and, with zero points, `weight_zero`, one per group; all are plain
parameters, so that state dicts, optimizers and wrappers see what they saw before. `twins.fake_twin` is the way in,
`qtensor` the way out.

    y = x^ w^^T + b        w^ = s (clip(round(w / s + z)) - z), s and z as they would be stored now

The equations, their gradients and what is kept for the backward pass are told in `numerics/fake.py`. Rounding happens
in float32 whatever the types around it: autocast decides the type of the product only, so that the codes of a forward
pass are those that are frozen. Given up: a pass over each weight in either direction, at every step.

A model may also read a layer's weight and multiply by it itself: a head that is `F.linear(h, emb.weight)`, torch's
encoder layers, `nn.MultiheadAttention`. While a module computes, `.weight` therefore is the rounded one, with its
gradients; at all other times it is the parameter, as optimizers, checkpoints and those who tie weights know it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack.errors import WeightError
from spicerack.nn.embedding import Lookup
from spicerack.numerics import codec
from spicerack.numerics.fake import Grid, Parts, fake, fake_linear, fake_tensor, rounded, stored
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.search import TensorGroups, search
from spicerack.training.qat.trained import TrainedLayer

Quantizer = Literal["lsq", "seq", "absmax", "absmean"]
"""Where scales come from: learned (lsq, seq), or at each step from the range or the mean of |w|."""
Ranges = Literal["lsq", "ema"]
"""How static scales of activations move: learned, or as moving averages."""
LEARNED: tuple[Quantizer, ...] = ("lsq", "seq")
"""Quantizers whose scales are parameters; those of the others follow from the weights at each step."""
LEAST_MEAN = 1e-5
"""BitNet's smallest scale, as transformers clamps it: of a matrix of zeros, 1 / scale must be finite."""
_CALL = nn.Module._call_impl.__code__
"""What is on the stack while any module computes: `module(x)` ends there, with hooks and without."""
_NEW = 0.1
"""Share of the newest step in a moving average of ranges: ten steps forget two thirds of what was before."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How one weight is rounded while it trains, and the layer's inputs.

    scheme      what it will be stored in
    quantizer   where scales come from: learned, or anew from the weights at each step
    grid        the scheme's levels and group, and where weights count as clipped
    dtype       that scales are stored in
    ranges      how the static scale of activations moves: learned, or the average of what would hold the largest
    """

    scheme: Scheme
    quantizer: Quantizer
    grid: Grid
    dtype: torch.dtype
    ranges: Ranges


class FakeLayer(TrainedLayer):
    """What the layers below have in common: they compute as their float class would with the rounded weight.

    weight        the float layer's own parameter
    weight_scale  [N/rows, K/columns] of the groups' scales, in the weight's type; None where they are not learned
    weight_zero   the same of zero points; None where the scheme has none, or they are not learned
    input_scale   [1, 1], of static int8 activations: a parameter, or a buffer that moves; None if they are not static
    """

    weight: Any
    weight_scale: nn.Parameter | None
    weight_zero: nn.Parameter | None
    input_scale: torch.Tensor | None
    rounding: Rounding

    @property
    def scheme(self) -> Scheme:
        """See `TrainedLayer.scheme`."""
        return self.rounding.scheme

    @property
    def tied(self) -> nn.Parameter:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def largest(self) -> torch.Tensor:
        return self.tied

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.tied.dtype

    def matrix(self) -> torch.Tensor:
        """The float weight, the parameter itself, seen as [N, K]."""
        return self.kind.matrix(self.tied)

    def __getattr__(self, name: str) -> Any:
        """Parameters as modules have them, but for `weight` where a module computes: see above."""
        if name == "weight" and (torch.compiler.is_compiling() or _computing()):
            return self.shipped_weight()
        return super().__getattr__(name)

    def shipped_weight(self) -> torch.Tensor:
        """w^ in the shape and the type of the parameter, with gradients: what `.weight` of the frozen layer is."""
        rounded, weight = self.rounded_weight(), self.tied
        return (rounded.t() if self.kind.transposed else rounded.view_as(weight)).to(weight.dtype)

    def parts(self) -> Parts:
        """Scale and zero point of each group as they would be stored now, float32 [N/rows, K/columns].

        They have gradients where they are learned.
        """
        how = self.rounding
        if self.weight_scale is not None:
            zero = self.weight_zero
            return stored(self.weight_scale, how.dtype), None if zero is None else rounded(zero, how.grid.levels)
        w = self.matrix().detach()
        if how.quantizer == "absmean":
            mean = how.grid.tiles(w).float().abs().mean((1, 3)).clamp_(min=LEAST_MEAN)
            return stored(mean, how.dtype), None
        groups = TensorGroups(codec.to_groups(w.float(), how.grid.group), how.scheme)
        scales, zeros = search(groups, how.scheme, how.dtype, "absmax")
        shape = (w.shape[0] // how.grid.group[0], -1)
        return stored(scales.reshape(shape), how.dtype), zeros.reshape(shape) if how.scheme.zero else None

    def rounded_weight(self) -> torch.Tensor:
        """w^ [N, K], the weight as it would be decoded if it were stored now: float32, with gradients."""
        return fake(self.matrix(), self.parts(), self.rounding.grid)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """x, rounded to int8 by the static scale if there is one, with gradients of both.

        A scale that is a moving average moves here, if the layer trains.
        """
        if self.input_scale is None:
            return x
        if self.training and self.rounding.ranges == "ema":
            self.input_scale.lerp_(range_of(x).to(self.input_scale), _NEW)
        return fake_tensor(x, self._static_scale(self.input_scale))

    @staticmethod
    def _static_scale(scale: torch.Tensor) -> torch.Tensor:
        """The scale of activations as it counts, float32: the smallest number of its type where all inputs were 0."""
        return stored(scale, scale.dtype)

    @torch.no_grad()
    def qtensor(self, name: str) -> QTensor:
        """The codes that `forward` computes with, bit for bit, and the scales as they are stored.

        name: of the weight, for errors. Raises WeightError where a weight or a scale is not finite.
        """
        how, w = self.rounding, self.matrix()
        codec.check_finite(w.float(), name)
        scale, zero = self.parts()
        learned = [part for part in (scale, zero, self.input_scale) if part is not None]
        if not all(bool(torch.isfinite(part).all()) for part in learned):
            raise WeightError(
                f"{name}: a scale was learned that is not finite, or too large for {how.dtype}",
                "train with a lower learning rate",
            )
        codes = how.grid.round(how.grid.places(w, (scale, zero))).flatten(2).flatten(0, 1)
        return QTensor(
            scheme=how.scheme,
            codes=codes.to(codes_dtype(how.scheme)).contiguous(),
            scale=scale.to(how.dtype),
            zero=None if zero is None else zero.to(torch.int8),
            transposed=self.kind.transposed,
            input_scale=None if self.input_scale is None else self._static_scale(self.input_scale).reshape(1),
        )

    def extra_repr(self) -> str:
        """As torch's layer, and what it is rounded to."""
        return f"{super().extra_repr()}, {self.rounding.scheme}, {self.rounding.quantizer}"


def _computing() -> bool:
    """Whether whoever reads an attribute is called, at whatever depth, by a module that computes.

    FSDP, which exchanges parameters in hooks around a module's call, is not: it wants the parameters themselves.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _CALL:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed."):
            return False
        frame = frame.f_back
    return frame is not None


def range_of(x: torch.Tensor) -> torch.Tensor:
    """The int8 scale [1, 1], float32, that holds the largest magnitude in x: that over 127."""
    return x.detach().abs().amax().float().reshape(1, 1) / 127


def _tokens(layer: FakeLayer) -> bool:
    """Whether the layer's inputs are rounded to int8 with one scale per token."""
    return layer.rounding.scheme.activations == "token"


def _type_of_products(x: torch.Tensor) -> torch.Tensor:
    """x in the type that autocast would multiply it in; without autocast, x."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class FakeLinear(FakeLayer, nn.Linear):
    """In the place of nn.Linear: x [..., K] -> x^ w^^T + b [..., N], where x^ is x as the scheme rounds it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in the type of the product: x's, or autocast's."""
        x = self.rounded_input(_type_of_products(x))
        return fake_linear(x, self.tied, self.parts(), self.bias, self.rounding.grid, tokens=_tokens(self))


class FakeConv1D(FakeLayer, Conv1D):
    """In the place of transformers' Conv1D, a linear layer with a transposed weight: the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rounded_input(_type_of_products(x))
        return fake_linear(x, self.matrix(), self.parts(), self.bias, self.rounding.grid, tokens=_tokens(self))


class FakeConv2d(FakeLayer, nn.Conv2d):
    """In the place of nn.Conv2d: x [..., I, H, W] -> [..., O, H', W']; a row of the matrix is all an output reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I, H, W] -> [..., O, H', W'] in x's type; the rounded weight is there while the layer computes."""
        weight = self.rounded_weight().view_as(self.tied).to(x.dtype)
        y: torch.Tensor = self._conv_forward(self.rounded_input(x), weight, self.bias)
        return y


class FakeEmbedding(FakeLayer, nn.Embedding):
    """In the place of nn.Embedding: ids [...] -> rows [..., K]; only the rows that are asked for are rounded."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> rows [..., K] in the table's type; a row that is asked for twice is rounded twice."""
        flat = ids.flatten()
        scale, zero = self.parts()
        rows = nn.functional.embedding(flat, self.tied, self.padding_idx)
        groups = flat // self.rounding.grid.group[0]
        grid = Grid(self.rounding.grid.levels, (1, self.rounding.grid.group[1]), self.rounding.grid.clip)
        looked_up = fake(rows, (scale[groups], None if zero is None else zero[groups]), grid)
        return Lookup.of(self).scaled(looked_up.view(*ids.shape, -1).to(self.tied.dtype))
