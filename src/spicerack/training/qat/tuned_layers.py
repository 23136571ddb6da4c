"""Layers whose codes stay what they are while their scales train: what `prepare_qat` makes of packed ones.

    w^ = s (level[code] - z)      s as stored
    dw^/ds = level[code] - z      times LSQ's factor, 1 / sqrt(weights in a group * largest level), as in `fake`

Codes stay bit-packed, and are decoded in the forward pass and again in the backward pass, a layer at a time; nothing of
a weight's size is kept between them (EfficientQAT's second half, Chen et al. 2024, arXiv:2407.11062). What is given up
for that: a weight is decoded twice a step, and neither codes nor zero points move. `twins.tuned_twin` is the way in,
`qtensor` the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spicerack.errors import SchemeError, WeightError
from spicerack.nn.conv import Geometry
from spicerack.nn.embedding import Lookup
from spicerack.nn.kinds import Bias, LayerKind
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import packed
from spicerack.numerics.dtypes import SOURCES
from spicerack.numerics.fake import Grid, fake_tensor, fake_tokens, stored
from spicerack.numerics.packed import Rows
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.training.qat.trained import TrainedLayer

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Decoding:
    """What a matrix [N, K] is beside its numbers, and how it comes of them.

    scheme         what its codes stand for
    shape          [N, K]
    transposed     the float layer has it as [K, N]
    dtype          that scales are stored in
    weight_dtype   of the float weight
    group          (rows, columns) that share a scale
    factor         LSQ's, of the gradients of scales

    words, below, are codes as `numerics.packed` has them, int32; scale and zero are float32 [N/rows, K/columns], and
    zero is None where the scheme has none.
    """

    scheme: Scheme
    shape: tuple[int, int]
    transposed: bool
    dtype: torch.dtype
    weight_dtype: torch.dtype
    group: tuple[int, int]
    factor: float

    def levels(self, words: torch.Tensor, zero: torch.Tensor | None, rows: Rows = _ALL) -> torch.Tensor:
        """level - zero of the chosen rows, float32 [R, K/columns, columns]."""
        codes = packed.code_rows(self.scheme, self.shape, {"codes": words}, rows)
        codes = codes.view(len(codes), -1, self.group[1])
        offset = 0.0 if zero is None else self.spread(zero, rows)
        return self.scheme.levels.decode(codes, offset)

    def decode(
        self, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, rows: Rows = _ALL
    ) -> torch.Tensor:
        """The chosen rows of w^, float32 [R, K]."""
        return self.levels(words, zero, rows).mul_(self.spread(scale, rows)).flatten(1)

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] as it is multiplied: as it is, or in int8 with one scale per token."""
        return fake_tokens(x) if self.scheme.activations == "token" else x

    def spread(self, part: torch.Tensor, rows: Rows = _ALL) -> torch.Tensor:
        """One number a group, [N/rows, K/columns] -> one for each chosen row's piece of a group, [R, K/columns, 1]."""
        place = torch.arange(self.shape[0], device=part.device)[rows] // self.group[0]
        return part[place][..., None]

    def gathered(self, part: torch.Tensor, rows: Rows = _ALL) -> torch.Tensor:
        """The transpose of `spread`: [R, K/columns] -> sums over the rows of each group, [N/rows, K/columns]."""
        place = torch.arange(self.shape[0], device=part.device)[rows] // self.group[0]
        return part.new_zeros((self.shape[0] // self.group[0], part.shape[1])).index_add_(0, place, part)


class _Rows(torch.autograd.Function):
    """s -> rows [R, K] of w^, float32; keeps codes and zero points for the backward pass, and no row."""

    @staticmethod
    def forward(
        ctx: Any, scale: torch.Tensor, words: torch.Tensor, zero: torch.Tensor | None, decoding: Decoding, rows: Rows
    ) -> torch.Tensor:
        ctx.save_for_backward(words, zero)
        ctx.decoding, ctx.rows = decoding, rows
        return decoding.decode(words, scale, zero, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        words, zero = ctx.saved_tensors
        return _by_scale(grad, words, zero, ctx.decoding, ctx.rows), None, None, None, None


class _Linear(torch.autograd.Function):
    """y = x^ w^^T + b, where x^ is x, or x in int8 with one scale per token; saves x, not x^ and w^.

    x [..., K], bias [N] or None -> y [..., N] in x's type. Backward: dx = dy w^ (straight through the rounding of x),
    ds from dw^ = dy^T x^, db the sum of dy; codes and zero points have no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        words: torch.Tensor,
        zero: torch.Tensor | None,
        bias: torch.Tensor | None,
        decoding: Decoding,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, words, zero)
        ctx.decoding = decoding
        weight = decoding.decode(words, scale, zero).to(x.dtype)
        return nn.functional.linear(decoding.multiplied(x), weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, words, zero = ctx.saved_tensors
        decoding: Decoding = ctx.decoding
        needs = ctx.needs_input_grad
        by_x = by_scale = by_bias = None
        rows = grad.flatten(0, -2)
        if needs[0]:
            by_x = grad @ decoding.decode(words, scale, zero).to(grad.dtype)
        if needs[1]:
            by_scale = _by_scale(rows.t() @ decoding.multiplied(x).flatten(0, -2), words, zero, decoding)
        if needs[4]:
            by_bias = rows.sum(0)
        return by_x, by_scale, None, None, by_bias, None


def _by_scale(
    grad: torch.Tensor, words: torch.Tensor, zero: torch.Tensor | None, decoding: Decoding, rows: Rows = _ALL
) -> torch.Tensor:
    """The gradient of s [N/rows, K/columns], with LSQ's factor, from that of w^'s rows [R, K]."""
    levels = decoding.levels(words, zero, rows)
    return decoding.gathered(levels.mul_(grad.float().view_as(levels)).sum(2), rows).mul_(decoding.factor)


_rows: Callable[..., torch.Tensor] = _Rows.apply
_linear: Callable[..., torch.Tensor] = _Linear.apply


class SharedWeight:
    """The tensors of one packed weight, which layers that are tied have in common.

    name: of a layer, for errors. Codes are packed bit by bit, as on disk, whatever the kernel's layout was; scales
    become a float32 parameter. Raises SchemeError for scales that are quantized themselves, or powers of two.
    """

    def __init__(self, name: str, weight: PackedWeight) -> None:
        q, device = weight.qtensor(), next(iter(weight.tensors.values())).device
        scheme, group = q.scheme, q.scheme.group_shape(*q.shape)
        if scheme.scale_obstacle is not None or q.plain_scale.dtype not in SOURCES:
            raise SchemeError(f"{name}: {scheme} is not trained: its scales are no plain floats", "leave it packed")
        if scheme.codes_obstacle is not None:
            raise SchemeError(f"{name}: {scheme} is not trained: {scheme.codes_obstacle}", "leave it packed")
        integers, levels = scheme.levels.integers, scheme.levels
        if integers is not None:
            factor = Grid(integers, group).factor(scheme.zero)
        else:
            factor = 1 / math.sqrt(math.prod(group) * max(-levels.lowest, levels.highest))
        self.decoding = Decoding(scheme, weight.shape, q.transposed, q.plain_scale.dtype, weight.dtype, group, factor)
        self.scale = nn.Parameter(q.plain_scale.float().to(device))
        self.codes = packed.pack(q)["codes"].to(device)
        self.zero = None if q.zero is None else q.zero.to(device)
        self.input_scale = None if q.input_scale is None else q.input_scale.to(device)


class TunedLayer(TrainedLayer):
    """What the layers below have in common.

    weight_scale  [N/rows, K/columns], float32 whatever the model's type, in which small steps would vanish
    codes         int32 words
    zero          int8 [N/rows, K/columns] of schemes with zero points, else None
    input_scale   float32 [1] of static int8 activations, else None
    bias          the packed layer's own
    """

    weight_scale: nn.Parameter
    codes: torch.Tensor
    zero: torch.Tensor | None
    input_scale: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, kind: LayerKind, shared: SharedWeight, options: Any, bias: Bias) -> None:
        super().__init__()
        self.kind, self.decoding = kind, shared.decoding
        self.register_parameter("weight_scale", shared.scale)
        self.register_buffer("codes", shared.codes)
        self.register_buffer("zero", shared.zero)
        self.register_buffer("input_scale", shared.input_scale)
        self.register_parameter("bias", bias)

    @property
    def scheme(self) -> Scheme:
        return self.decoding.scheme

    @property
    def tied(self) -> nn.Parameter:
        return self.weight_scale

    @property
    def largest(self) -> torch.Tensor:
        return self.codes

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.decoding.weight_dtype

    def scale(self) -> torch.Tensor:
        """s as it would be stored now, float32, with gradients that go straight through the rounding."""
        return stored(self.weight_scale, self.decoding.dtype)

    def matrix(self, rows: Rows = _ALL) -> torch.Tensor:
        """The chosen rows of w^, float32 [R, K], with gradients of s."""
        return _rows(self.scale(), self.codes, self.zero, self.decoding, rows)

    @property
    def weight(self) -> torch.Tensor:
        """The float weight as a matrix, in the order of the layer that was quantized, decoded anew at each access."""
        matrix = self.matrix().detach().to(self.decoding.weight_dtype)
        return matrix.t() if self.decoding.transposed else matrix

    @torch.no_grad()
    def qtensor(self, name: str) -> QTensor:
        """The codes that there were, with the scales that were learned, as they are stored.

        name: of the weight, for errors. Raises WeightError where a scale is not finite in its stored type.
        """
        decoding, scale = self.decoding, self.scale()
        if not bool(torch.isfinite(scale).all()):
            raise WeightError(
                f"{name}: a scale was learned that is not finite, or too large for {decoding.dtype}",
                "train with a lower learning rate",
            )
        integers = packed.code_rows(decoding.scheme, decoding.shape, {"codes": self.codes}, _ALL)
        return QTensor(
            scheme=decoding.scheme,
            codes=integers.to(codes_dtype(decoding.scheme)),
            scale=scale.to(decoding.dtype),
            zero=None if self.zero is None else self.zero.to(torch.int8),
            transposed=decoding.transposed,
            input_scale=None if self.input_scale is None else self.input_scale.float(),
        )

    def extra_repr(self) -> str:
        return f"{self.decoding.scheme}, shape={list(self.decoding.shape)}, scales train"


class TunedLinear(TunedLayer):
    """In the place of `QLinear`: x [..., K] -> x^ w^^T + b [..., N], where x^ is x as the scheme rounds it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.input_scale is not None:
            x = fake_tensor(x, self.input_scale.float().reshape(1, 1))
        return _linear(x, self.scale(), self.codes, self.zero, self.bias, self.decoding)


class TunedEmbedding(TunedLayer):
    """In the place of `QEmbedding`: ids [...] -> rows [..., K] in the weight's type, each decoded once.

    The row of padding_idx adds nothing to the gradient, as in nn.Embedding.
    """

    def __init__(self, kind: LayerKind, shared: SharedWeight, options: Lookup, bias: Bias) -> None:
        super().__init__(kind, shared, options, bias)
        self.lookup, self.padding_idx = options, options.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        different, place = torch.unique(ids, return_inverse=True)
        rows = self.matrix(different)
        if self.padding_idx is not None:
            rows = torch.where((different == self.padding_idx)[:, None], rows.detach(), rows)
        return self.lookup.scaled(rows.to(self.decoding.weight_dtype))[place]


class TunedConv2d(TunedLayer):
    """In the place of `QConv2d`: x [..., I, H, W] -> [..., O, H', W'] in x's type."""

    def __init__(self, kind: LayerKind, shared: SharedWeight, options: Geometry, bias: Bias) -> None:
        super().__init__(kind, shared, options, bias)
        self.geometry = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, bias = self.geometry, None if self.bias is None else self.bias.to(x.dtype)
        weight = self.matrix().view(self.decoding.shape[0], -1, *g.kernel_size).to(x.dtype)
        return nn.functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)
