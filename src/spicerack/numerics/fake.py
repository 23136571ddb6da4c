"""Fake quantization: what a layer would compute if it were stored now, with gradients to train through.

    w^ = s (q - z),   q = clip(round(w / s + z), lo, hi),   s and z as stored; with half-integer levels z = -1/2

              inside        clipped
    dw^/dw    1             0               always 1 if the scale is not learned but the mean of |w| ("none")
    dw^/ds    q - z - w/s   q - z           times 1 / sqrt(weights in a group * largest level)
    dw^/dz    0             -s              times the same, with hi - lo for the largest level

Rounding and storing pass gradients straight through. A weight is clipped if it lies outside the levels ("levels": LSQ,
Esser et al. 2020, arXiv:1902.08153; with z LSQ+, Bhalgat et al. 2020, arXiv:2004.09576), or half a step farther, where
rounding would leave the levels ("cells": the stretched grid SEQ of ParetoQ, Liu et al. 2025, arXiv:2502.02631, whose
alpha is s times the number of levels over two). All of it is float32, whatever the types around it, with the codec's
operations in the codec's order: the codes are bit for bit those that are stored. Nothing of a weight's size is kept
for the backward pass, which rounds anew. What is here in torch is the specification; on CPUs `native` is its fast path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from spicerack.numerics import fake_native
from spicerack.numerics.activations import quantize_tokens
from spicerack.numerics.dtypes import SOURCES
from spicerack.numerics.fake_native import Needed, Operands
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scales import smallest_scale

Clip = Literal["levels", "cells", "none"]
"""Where a weight counts as clipped: see above. "none": nowhere, because its scale is not learned."""
_INT8 = IntLevels(-127, 127)
"""Codes of activations, as kernels round them: symmetric, so that a token's largest value keeps its sign."""
Parts = tuple[torch.Tensor, torch.Tensor | None]
"""Scale and zero point of each group as they are stored, float32 [N/rows, K/columns]; no zero point is None."""
Gradients = tuple[torch.Tensor | None, ...]
"""Of what was asked for, None for the rest."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Integer levels, the group of weights that shares a scale, and where weights count as clipped.

    levels   the codes and what they stand for
    group    [rows, columns] that share a scale; they divide N and K
    clip     where a weight counts as clipped: see `Clip`

    Places and codes are in tiles, [N/rows, rows, K/columns, columns], so that a scale [N/rows, K/columns] meets its
    group by broadcasting, and no copy of it has a weight's size.
    """

    levels: IntLevels
    group: tuple[int, int]
    clip: Clip = "levels"

    def factor(self, zero: bool) -> float:
        """LSQ's factor of the gradients of scales, and of zero points if there are any: 1 / sqrt(weights in a group *
        largest).

        A scale's gradient sums those of all its weights; without the factor it would move by far more than its own
        size.
        """
        levels = self.levels
        largest = levels.hi - levels.lo if zero else levels.hi + 0.5 * levels.half
        return 1 / math.sqrt(math.prod(self.group) * largest)

    def tiles(self, w: torch.Tensor) -> torch.Tensor:
        """[N, K] -> a view [N/rows, rows, K/columns, columns]."""
        rows, columns = self.group
        return w.view(len(w) // rows, rows, w.shape[1] // columns, columns)

    def places(self, w: torch.Tensor, parts: Parts) -> torch.Tensor:
        """w / s + z of weights [N, K], float32 in tiles: rounded and clipped, that is the codes. No gradient is
        kept."""
        scale, zero = parts
        u = self.tiles(w.detach()).float() * _spread(1 / scale)
        return u.add_(self._zero(zero)) if zero is not None or self.levels.half else u

    def round(self, places: torch.Tensor) -> torch.Tensor:
        """Places -> codes, float32 in tiles: halfway to the even one, as the codec rounds."""
        return torch.round(places).clamp_(self.levels.lo, self.levels.hi)

    def decode(self, codes: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Codes in tiles, float32 -> w^ [N, K] = s (codes - z). The codes' memory becomes the result's: they are
        gone."""
        scale, zero = parts
        if zero is not None or self.levels.half:
            codes = codes.sub_(self._zero(zero))
        return codes.mul_(_spread(scale)).flatten(2).flatten(0, 1)

    def fake(self, w: torch.Tensor, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weights [N, K] of any float type -> w^ [N, K]: computed in float32, then rounded to `dtype`; natively where
        that can be."""
        if dtype in SOURCES and _natively(parts, w):
            return fake_native.fake(Operands(w, self.levels, self.group, *parts), dtype)
        return self.decode(self.round(self.places(w, parts)), parts).to(dtype)

    def gradients(
        self,
        grad: torch.Tensor,
        w: torch.Tensor,
        parts: Parts,
        needed: Needed,
        *,
        rounded: torch.dtype | None = None,
        spare: bool = False,
    ) -> Gradients:
        """The gradients of w [N, K], s and z, where they are needed, from that of w^; and w^ once more.

        grad     of w^, [N, K]
        w, parts what was rounded, and with which scales and zero points
        needed   which of the three are wanted; None comes in place of the others
        rounded  the type in which w^ is wanted too; None for not at all
        spare    grad is of no other use, and may become the gradient of w
        """
        if self.clip == "none":
            return grad if needed[0] else None, None, None, None if rounded is None else self.fake(w, parts, rounded)
        scale, zero = parts
        if _natively(parts, w, grad) and rounded in (None, *SOURCES):
            operands, cells = Operands(w, self.levels, self.group, scale, zero), self.clip == "cells"
            by_weight, by_scale, by_zero, again = fake_native.gradients(
                grad, operands, cells=cells, needed=needed, rounded=rounded, spare=spare
            )
        else:
            again = None if rounded is None else self.fake(w, parts, rounded)
            by_weight, by_scale, by_zero = self._sums(grad, w, parts, needed)
        factor = self.factor(zero is not None)
        by_scale = None if by_scale is None else by_scale.mul_(factor)
        return by_weight, by_scale, None if by_zero is None else by_zero.mul_(scale * factor), again

    def _sums(self, grad: torch.Tensor, w: torch.Tensor, parts: Parts, needed: Needed) -> Gradients:
        """`gradients` without the factors of s and z, in torch's operations: those of w [N, K], and of each group's s
        and z."""
        tiles = self.tiles(grad).float()
        u = self.places(w, parts)
        codes = self.round(u)
        if self.clip == "levels":
            inside = (u >= self.levels.lo).logical_and_(u <= self.levels.hi)
        else:
            inside = (codes - u).abs_() <= 0.5
        by_scale = by_zero = None
        if needed[1]:
            by_scale = codes.sub_(torch.where(inside, u, self._zero(parts[1]))).mul_(tiles).sum((1, 3))
        kept = tiles * inside
        if needed[2]:
            by_zero = (kept - tiles).sum((1, 3))
        return kept.flatten(2).flatten(0, 1) if needed[0] else None, by_scale, by_zero

    def _zero(self, zero: torch.Tensor | None) -> torch.Tensor | float:
        """What stands between codes and w / s, over tiles."""
        return self.levels.offset(0.0 if zero is None else _spread(zero))


def _natively(parts: Parts, *matrices: torch.Tensor) -> bool:
    """Whether C++ computes: torch's operations remain for other devices and types, and where they are watched.

    That is where somebody traces, differentiates once more, or stands in for a tensor.
    """
    tensors = [t for t in (*parts, *matrices) if t is not None]
    return (
        all(type(t) in (torch.Tensor, nn.Parameter) and t.is_cpu and t.dtype in SOURCES for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _spread(part: torch.Tensor) -> torch.Tensor:
    """One value for each group, [N/rows, K/columns] -> a view [N/rows, 1, K/columns, 1] that broadcasts over tiles."""
    return part[:, None, :, None]


class _Fake(torch.autograd.Function):
    """w [N, K] (any float), s, z -> w^ [N, K] in float32.

    Saved are w, s and z themselves, which are there anyway; w^ is made anew for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        ctx.save_for_backward(w, scale, zero)
        ctx.grid = grid
        return grid.fake(w, (scale, zero))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, scale, zero = ctx.saved_tensors
        by_weight, by_scale, by_zero, _ = ctx.grid.gradients(grad, w, (scale, zero), ctx.needs_input_grad[:3])
        return None if by_weight is None else by_weight.to(w.dtype), by_scale, by_zero, None


class _Linear(torch.autograd.Function):
    """y = x^ w^T + b, where x^ is x, or x in int8 with one scale per token; saves x and w, not x^ and w^.

    In a model's memory that is the difference between one copy of each weight and two; the price is rounding twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bias: torch.Tensor | None,
        grid: Grid,
        tokens: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w, scale, zero)
        ctx.grid, ctx.tokens = grid, tokens
        x_hat = fake_tokens(x) if tokens else x
        bias = None if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x_hat, grid.fake(w, (scale, zero), x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, scale, zero = ctx.saved_tensors
        grid: Grid = ctx.grid
        needs = ctx.needs_input_grad
        by_x = by_weight = by_scale = by_zero = by_bias = rounded = None
        again = grad.dtype if needs[0] else None
        rows = grad.flatten(0, -2)
        if any(needs[1:4]):
            x_hat = fake_tokens(x) if ctx.tokens else x
            product = rows.t() @ x_hat.flatten(0, -2)
            by_weight, by_scale, by_zero, rounded = grid.gradients(
                product, w, (scale, zero), needs[1:4], rounded=again, spare=True
            )
            by_weight = None if by_weight is None else by_weight.to(w.dtype)
        elif again is not None:
            rounded = grid.fake(w, (scale, zero), again)
        if rounded is not None:
            by_x = grad @ rounded
        if needs[4]:
            by_bias = rows.sum(0)
        return by_x, by_weight, by_scale, by_zero, by_bias, None, None


class _Stored(torch.autograd.Function):
    """A learned scale -> as it would be stored, float32; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = scale.dtype
        wanted, least = scale.float(), smallest_scale(dtype)
        return wanted.to(dtype).float().abs().clamp_(min=least).copysign_(wanted)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.to(ctx.dtype), None


class _Rounded(torch.autograd.Function):
    """A learned zero point -> the integer that would be stored, float32; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, zero: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        ctx.dtype = zero.dtype
        return torch.round(zero.float()).clamp_(lo, hi)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


_fake: Callable[..., torch.Tensor] = _Fake.apply
_linear: Callable[..., torch.Tensor] = _Linear.apply
_stored: Callable[..., torch.Tensor] = _Stored.apply
_rounded: Callable[..., torch.Tensor] = _Rounded.apply


def fake(w: torch.Tensor, parts: Parts, grid: Grid) -> torch.Tensor:
    """Weights [N, K] of any float type -> w^ [N, K], float32, with gradients for w, scales and zero points.

    parts: scale and zero point of each group as they are stored, see `Parts`; None for no zero point.
    """
    return _fake(w, *parts, grid)


def fake_linear(
    x: torch.Tensor, w: torch.Tensor, parts: Parts, bias: torch.Tensor | None, grid: Grid, *, tokens: bool = False
) -> torch.Tensor:
    """x [..., K], weights w [N, K] -> x^ w^^T + bias [..., N] in x's type, with gradients for all of them.

    x        of any float type, which is that of the product
    w        float weights, of any float type
    parts    scale and zero point of each group as they are stored, see `Parts`
    bias     [N], or None
    grid     the levels, the group, and where weights count as clipped
    tokens   x is rounded too, to int8 with one scale per token; its gradient is that of x as it was

    w^ is in x's type, float16 or bfloat16 included, and is made anew for the backward pass.
    """
    return _linear(x, w, *parts, bias, grid, tokens)


def stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Learned scales -> float32 as `dtype` stores them, with the gradient of what was stored.

    What is nearer to 0 than the smallest that `dtype` stores counts as that, with its sign: from 0 nothing is learned.
    """
    return _stored(scale, dtype)


def rounded(zero: torch.Tensor, levels: IntLevels) -> torch.Tensor:
    """Learned zero points -> the nearest integers within the levels, float32, with the gradient of what was rounded."""
    return _rounded(zero, levels.lo, levels.hi)


def fake_tensor(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., K] in int8 with one scale [1, 1], and back, in x's type, with gradients for both: LSQ for activations.

    What lies beyond 127 scales is clipped and has no gradient; the scale learns from it.
    """
    rows = x.reshape(-1, x.shape[-1])
    return fake(rows, (scale.float(), None), Grid(_INT8, (len(rows), rows.shape[1]))).view(x.shape).to(x.dtype)


def fake_tokens(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] in int8 with one scale per token, as the kernels round it, and back, in x's type.

    It has no gradient of its own: whoever differentiates treats it as x (`fake_linear`).
    """
    codes, scale = quantize_tokens(x.float())
    return codes.mul_(scale).to(x.dtype)
