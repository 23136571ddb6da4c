"""Layers whose codes stay what they are while their scales train: what `prepare_qat` makes of packed ones.

    w^ = s (level[code] - z)      s as stored
    dw^/ds = level[code] - z      times LSQ's factor, 1 / sqrt(weights in a block * largest level), as in `fake`

Codes stay bit-packed, and are decoded in the forward pass and again in the backward pass, a layer at a time; nothing of
a weight's size is kept between them (EfficientQAT's second half, Chen et al. 2024, arXiv:2407.11062). `tuned` is the
way in, `qtensor` the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spicerack.errors import SchemeError, WeightError
from spicerack.nn.conv import Geometry, QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import packed
from spicerack.numerics.dtypes import SOURCES
from spicerack.numerics.fake import Grid, fake_tensor, fake_tokens, stored
from spicerack.numerics.packed import Rows
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a matrix [N, K] is beside its numbers. dtype: that scales are stored in; weight_dtype: that `weight` has.

    factor: of the gradients of scales. words, below: codes as `packed` has them; zero: [N/rows, K/columns] or None.
    """

    scheme: Scheme
    shape: tuple[int, int]
    transposed: bool
    dtype: torch.dtype
    weight_dtype: torch.dtype
    block: tuple[int, int]
    factor: float

    def levels(self, words: torch.Tensor, zero: torch.Tensor | None, rows: Rows = _ALL) -> torch.Tensor:
        """float32 level - zero of the chosen rows, [R, K/columns, columns]."""
        codes = packed.code_rows(self.scheme, self.shape, {"codes": words}, rows)
        codes = codes.view(len(codes), -1, self.block[1])
        offset = 0.0 if zero is None else self.spread(zero, rows)
        return self.scheme.levels.decode(codes, offset)

    def decode(
        self, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, rows: Rows = _ALL
    ) -> torch.Tensor:
        """The chosen rows of w^ [R, K], float32."""
        return self.levels(words, zero, rows).mul_(self.spread(scale, rows)).flatten(1)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What is multiplied: x, or x in int8 with one scale per token."""
        return fake_tokens(x) if self.scheme.activations == "token" else x

    def spread(self, part: torch.Tensor, rows: Rows = _ALL) -> torch.Tensor:
        """One per block -> one per row's piece of it, [R, K/columns, 1]."""
        place = torch.arange(self.shape[0], device=part.device)[rows] // self.block[0]
        return part[place][..., None]

    def gathered(self, part: torch.Tensor, rows: Rows = _ALL) -> torch.Tensor:
        """Its transpose: [R, K/columns] -> sums over the rows of each block, [N/rows, K/columns]."""
        place = torch.arange(self.shape[0], device=part.device)[rows] // self.block[0]
        return part.new_zeros((self.shape[0] // self.block[0], part.shape[1])).index_add_(0, place, part)


class _Rows(torch.autograd.Function):
    """s -> rows [R, K] of w^, float32."""

    @staticmethod
    def forward(
        ctx: Any, scale: torch.Tensor, words: torch.Tensor, zero: torch.Tensor | None, layout: Layout, rows: Rows
    ) -> torch.Tensor:
        ctx.save_for_backward(words, zero)
        ctx.layout, ctx.rows = layout, rows
        return layout.decode(words, scale, zero, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        words, zero = ctx.saved_tensors
        return _by_scale(grad, words, zero, ctx.layout, ctx.rows), None, None, None, None


class _Linear(torch.autograd.Function):
    """y = x^ w^^T + b, where x^ is x, or x in int8 with one scale per token; saves x, not x^ and w^."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        words: torch.Tensor,
        zero: torch.Tensor | None,
        bias: torch.Tensor | None,
        layout: Layout,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, words, zero)
        ctx.layout = layout
        weight = layout.decode(words, scale, zero).to(x.dtype)
        return nn.functional.linear(layout.seen(x), weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, words, zero = ctx.saved_tensors
        layout: Layout = ctx.layout
        needs = ctx.needs_input_grad
        by_x = by_scale = by_bias = None
        rows = grad.flatten(0, -2)
        if needs[0]:
            by_x = grad @ layout.decode(words, scale, zero).to(grad.dtype)
        if needs[1]:
            by_scale = _by_scale(rows.t() @ layout.seen(x).flatten(0, -2), words, zero, layout)
        if needs[4]:
            by_bias = rows.sum(0)
        return by_x, by_scale, None, None, by_bias, None


def _by_scale(
    grad: torch.Tensor, words: torch.Tensor, zero: torch.Tensor | None, layout: Layout, rows: Rows = _ALL
) -> torch.Tensor:
    """The gradient of s from that of w^'s rows [R, K]."""
    levels = layout.levels(words, zero, rows)
    return layout.gathered(levels.mul_(grad.float().view_as(levels)).sum(2), rows).mul_(layout.factor)


_rows: Callable[..., torch.Tensor] = _Rows.apply
_linear: Callable[..., torch.Tensor] = _Linear.apply


class Shared:
    """The tensors of one packed weight, which layers that are tied have in common."""

    def __init__(self, name: str, weight: PackedWeight) -> None:
        """Raises SchemeError for scales that are quantized themselves, or powers of two."""
        q, device = weight.qtensor(), next(iter(weight.tensors.values())).device
        scheme, block = q.scheme, q.scheme.block_shape(*q.shape)
        if scheme.scale_obstacle is not None or q.plain_scale.dtype not in SOURCES:
            raise SchemeError(f"{name}: {scheme} is not trained: its scales are no plain floats", "leave it packed")
        integers, levels = scheme.levels.integers, scheme.levels
        if integers is not None:
            factor = Grid(integers, block).factor(scheme.zero)
        else:
            factor = 1 / math.sqrt(math.prod(block) * max(-levels.lowest, levels.highest))
        self.layout = Layout(scheme, weight.shape, q.transposed, q.plain_scale.dtype, weight.dtype, block, factor)
        self.scale = nn.Parameter(q.plain_scale.float().to(device))
        self.codes = packed.pack(q)["codes"].to(device)
        self.zero = None if q.zero is None else q.zero.to(device)
        self.input_scale = None if q.input_scale is None else q.input_scale.to(device)


class TunedLayer(nn.Module):
    """What the layers below have in common.

    weight_scale: float32 whatever the model's type, where small steps would vanish. codes: int32 words.
    """

    weight_scale: nn.Parameter
    codes: torch.Tensor
    zero: torch.Tensor | None
    input_scale: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, shared: Shared, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.layout = shared.layout
        self.register_parameter("weight_scale", shared.scale)
        self.register_buffer("codes", shared.codes)
        self.register_buffer("zero", shared.zero)
        self.register_buffer("input_scale", shared.input_scale)
        self.register_parameter("bias", bias)

    def scale(self) -> torch.Tensor:
        """As it would be stored now, float32, with gradients."""
        return stored(self.weight_scale, self.layout.dtype)

    def matrix(self, rows: Rows = _ALL) -> torch.Tensor:
        """The chosen rows of w^, float32, with gradients."""
        return _rows(self.scale(), self.codes, self.zero, self.layout, rows)

    @property
    def weight(self) -> torch.Tensor:
        """The float weight in the order of the layer that was quantized, decoded anew at each access."""
        matrix = self.matrix().detach().to(self.layout.weight_dtype)
        return matrix.t() if self.layout.transposed else matrix

    @torch.no_grad()
    def qtensor(self, name: str) -> QTensor:
        """The codes that there were, with the scales that were learned. Raises WeightError where one is not finite."""
        layout, scale = self.layout, self.scale()
        if not bool(torch.isfinite(scale).all()):
            raise WeightError(
                f"{name}: a scale was learned that is not finite, or too large for {layout.dtype}",
                "train with a lower learning rate",
            )
        codes = packed.code_rows(layout.scheme, layout.shape, {"codes": self.codes}, _ALL)
        return QTensor(
            scheme=layout.scheme,
            codes=codes.to(codes_dtype(layout.scheme)),
            scale=scale.to(layout.dtype),
            zero=None if self.zero is None else self.zero.to(torch.int8),
            transposed=layout.transposed,
            input_scale=None if self.input_scale is None else self.input_scale.float(),
        )

    def extra_repr(self) -> str:
        return f"{self.layout.scheme}, shape={list(self.layout.shape)}, scales train"


class TunedLinear(TunedLayer):
    """In the place of `QLinear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.input_scale is not None:
            x = fake_tensor(x, self.input_scale.float().reshape(1, 1))
        return _linear(x, self.scale(), self.codes, self.zero, self.bias, self.layout)


class TunedEmbedding(TunedLayer):
    """In the place of `QEmbedding`; only the rows that are asked for are decoded, each once."""

    def __init__(self, shared: Shared, padding_idx: int | None) -> None:
        super().__init__(shared)
        self.padding_idx = padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found, place = torch.unique(ids, return_inverse=True)
        rows = self.matrix(found)
        if self.padding_idx is not None:
            rows = torch.where((found == self.padding_idx)[:, None], rows.detach(), rows)
        return rows.to(self.layout.weight_dtype)[place]


class TunedConv2d(TunedLayer):
    """In the place of `QConv2d`."""

    def __init__(self, shared: Shared, geometry: Geometry, bias: nn.Parameter | None) -> None:
        super().__init__(shared, bias)
        self.geometry = geometry

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, bias = self.geometry, None if self.bias is None else self.bias.to(x.dtype)
        weight = self.matrix().view(self.layout.shape[0], -1, *g.kernel_size).to(x.dtype)
        return nn.functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


Packed = QLinear | QEmbedding | QConv2d


def tuned(layer: Packed, shared: Shared) -> TunedLayer:
    """The layer that trains in the place of `layer`, with its bias."""
    if isinstance(layer, QEmbedding):
        return TunedEmbedding(shared, layer.padding_idx)
    if isinstance(layer, QConv2d):
        return TunedConv2d(shared, layer.geometry, layer.bias)
    return TunedLinear(shared, layer.bias)
