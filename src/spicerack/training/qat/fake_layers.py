"""Layers that are trained in few bits: subclasses of torch's, with the same parameters under the same names.

What is learned beside them is `weight_scale` and, with zero points, `weight_zero`, one per block; all are plain
parameters. `convert` is the way in, `qtensor` the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack.errors import WeightError
from spicerack.numerics import codec
from spicerack.numerics.fake import Grid, Parts, fake, fake_linear, fake_tensor, rounded, stored
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.search import TensorBlocks, search

Quantizer = Literal["lsq", "seq", "absmax", "absmean"]
Ranges = Literal["lsq", "ema"]
LEARNED: tuple[Quantizer, ...] = ("lsq", "seq")
"""Quantizers whose scales are parameters; those of the others follow from the weights at each step."""
LEAST_MEAN = 1e-5
"""BitNet's smallest scale."""
_NEW = 0.1
"""Share of the newest step in a moving average."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one weight is rounded, and the layer's inputs. dtype: that scales are stored in.

    ranges: how the static scale of activations moves, learned or the moving average of what would hold the largest.
    """

    scheme: Scheme
    quantizer: Quantizer
    grid: Grid
    dtype: torch.dtype
    ranges: Ranges


class FakeLayer(nn.Module):
    """What the layers below have in common."""

    weight: Any
    weight_scale: nn.Parameter | None
    weight_zero: nn.Parameter | None
    input_scale: torch.Tensor | None
    plan: Plan

    def matrix(self) -> torch.Tensor:
        """The float weight as [N, K], a view."""
        matrix: torch.Tensor = self.weight.flatten(1)
        return matrix

    def parts(self) -> Parts:
        """Scale and zero point of each block as they would be stored now."""
        plan = self.plan
        if self.weight_scale is not None:
            zero = self.weight_zero
            return stored(self.weight_scale, plan.dtype), None if zero is None else rounded(zero, plan.grid.levels)
        w = self.matrix().detach()
        if plan.quantizer == "absmean":
            mean = plan.grid.tiles(w).float().abs().mean((1, 3)).clamp_(min=LEAST_MEAN)
            return stored(mean, plan.dtype), None
        blocks = TensorBlocks(codec.to_blocks(w.float(), plan.grid.block), plan.scheme)
        found, zeros = search(blocks, plan.scheme, plan.dtype, "absmax")
        shape = (w.shape[0] // plan.grid.block[0], -1)
        return stored(found.reshape(shape), plan.dtype), zeros.reshape(shape) if plan.scheme.zero else None

    def rounded_weight(self) -> torch.Tensor:
        """w^ [N, K], float32, with gradients."""
        return fake(self.matrix(), self.parts(), self.plan.grid)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """x, rounded to int8 by the static scale if there is one."""
        if self.input_scale is None:
            return x
        if self.training and self.plan.ranges == "ema":
            self.input_scale.lerp_(range_of(x).to(self.input_scale), _NEW)
        return fake_tensor(x, self.input_scale)

    @torch.no_grad()
    def qtensor(self, name: str) -> QTensor:
        """The codes that `forward` computes with; name: of the weight, for errors.

        Raises WeightError where a weight or a scale is not finite.
        """
        plan, w = self.plan, self.matrix()
        codec.check_finite(w.float(), name)
        scale, zero = self.parts()
        learned = [part for part in (scale, zero, self.input_scale) if part is not None]
        if not all(bool(torch.isfinite(part).all()) for part in learned):
            raise WeightError(
                f"{name}: a scale was learned that is not finite, or too large for {plan.dtype}",
                "train with a lower learning rate",
            )
        codes = plan.grid.round(plan.grid.places(w, (scale, zero))).flatten(2).flatten(0, 1)
        return QTensor(
            scheme=plan.scheme,
            codes=codes.to(codes_dtype(plan.scheme)).contiguous(),
            scale=scale.to(plan.dtype),
            zero=None if zero is None else zero.to(torch.int8),
            transposed=isinstance(self, Conv1D),
            input_scale=None if self.input_scale is None else self.input_scale.detach().float().reshape(1),
        )

    def extra_repr(self) -> str:
        """As torch's layer, and what it is rounded to."""
        return f"{super().extra_repr()}, {self.plan.scheme}, {self.plan.quantizer}"


def range_of(x: torch.Tensor) -> torch.Tensor:
    """The int8 scale [1, 1] that holds the largest of x, float32."""
    return x.detach().abs().amax().float().reshape(1, 1) / 127


def _tokens(layer: FakeLayer) -> bool:
    return layer.plan.scheme.activations == "token"


def _type_of_products(x: torch.Tensor) -> torch.Tensor:
    """x in the type that autocast would multiply it in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class FakeLinear(FakeLayer, nn.Linear):
    """nn.Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rounded_input(_type_of_products(x))
        return fake_linear(x, self.weight, self.parts(), self.bias, self.plan.grid, tokens=_tokens(self))


class FakeConv1D(FakeLayer, Conv1D):
    """transformers' Conv1D, a linear layer with a transposed weight."""

    def matrix(self) -> torch.Tensor:
        matrix: torch.Tensor = self.weight.t()
        return matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rounded_input(_type_of_products(x))
        return fake_linear(x, self.matrix(), self.parts(), self.bias, self.plan.grid, tokens=_tokens(self))


class FakeConv2d(FakeLayer, nn.Conv2d):
    """nn.Conv2d; its matrix is [out, in / groups * height * width]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.rounded_weight().view_as(self.weight).to(x.dtype)
        y: torch.Tensor = self._conv_forward(self.rounded_input(x), weight, self.bias)
        return y


class FakeEmbedding(FakeLayer, nn.Embedding):
    """nn.Embedding; only the rows that are asked for are rounded."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.flatten()
        scale, zero = self.parts()
        rows = nn.functional.embedding(flat, self.weight, self.padding_idx)
        blocks = flat // self.plan.grid.block[0]
        grid = Grid(self.plan.grid.levels, (1, self.plan.grid.block[1]), self.plan.grid.clip)
        looked_up = fake(rows, (scale[blocks], None if zero is None else zero[blocks]), grid)
        return looked_up.view(*ids.shape, -1).to(self.weight.dtype)


Convertible = nn.Linear | Conv1D | nn.Conv2d | nn.Embedding
_KINDS: tuple[tuple[type[nn.Module], type[FakeLayer]], ...] = (
    (nn.Linear, FakeLinear), (Conv1D, FakeConv1D), (nn.Conv2d, FakeConv2d), (nn.Embedding, FakeEmbedding),
)  # fmt: skip


def convert(
    layer: Convertible,
    plan: Plan,
    scale: nn.Parameter | None,
    zero: nn.Parameter | None,
    static: torch.Tensor | None = None,
) -> FakeLayer:
    """The layer that trains in the place of `layer`: the same parameters, mode, hooks.

    scale, zero: None if not learned. static: the first scale [1, 1] of its activations, None if that is not static.
    """
    cls = next(fake for kind, fake in _KINDS if isinstance(layer, kind))
    new = cls.__new__(cls)
    vars(new).update(vars(layer))
    new._parameters = dict(layer._parameters)
    new.plan = plan
    new.register_parameter("weight_scale", scale)
    new.register_parameter("weight_zero", zero)
    if static is not None and plan.ranges == "ema":
        new._buffers = {**layer._buffers, "input_scale": static}
    else:
        new.register_parameter("input_scale", None if static is None else nn.Parameter(static))
    return new
