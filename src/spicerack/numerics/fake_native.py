"""Fake quantization of the native module: `fake.Grid` in C++, on torch's own threads.

The specification is `Grid`, in torch's operations: what is rounded here is equal to it bit for bit, and so are the
gradients of weights; sums over groups, for scales and zero points, are within rounding of it, and the same for any
number of threads. Native code gets addresses alone, so whether tensors lie where their shapes say is checked here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spicerack import _native
from spicerack.errors import ShapeError
from spicerack.numerics.dtypes import SOURCES
from spicerack.numerics.levels import IntLevels

_NUMBERS = {dtype: number for number, dtype in enumerate(SOURCES)}
"""As the native module counts them."""

Needed = tuple[bool, bool, bool]
"""Which gradients: of weights, scales, zero points."""


class Operands(NamedTuple):
    """Weights and what they are rounded with.

    w      [N, K], float32, float16 or bfloat16
    levels the codes
    group  rows and columns that share a scale; they divide N and K
    scale  float32 [N/rows, K/columns], with values as stored
    zero   like scale, with whole values; None for none
    """

    w: torch.Tensor
    levels: IntLevels
    group: tuple[int, int]
    scale: torch.Tensor
    zero: torch.Tensor | None

    def contiguous(self) -> Operands:
        """The same numbers one after the other in memory. Raises ShapeError for scales or zeros of another shape."""
        (rows, columns), w = self.group, self.w
        for part in (self.scale, self.zero):
            shaped = part is None or part.shape == (len(w) // rows, w.shape[1] // columns)
            if part is not None and not (shaped and part.dtype == torch.float32):
                raise ShapeError(
                    f"weights {[*w.shape]} in blocks {[*self.group]}: scales {[*part.shape]} of {part.dtype}"
                )
        zero = None if self.zero is None else self.zero.contiguous()
        return self._replace(w=w.contiguous(), scale=self.scale.contiguous(), zero=zero)

    @property
    def grid(self) -> _native.Levels:
        """The levels in the form that native functions take."""
        return _native.Levels(self.levels.lo, self.levels.hi, self.levels.half, self.zero is not None)


def fake(operands: Operands, dtype: torch.dtype = torch.float32, *, isa: str = "") -> torch.Tensor:
    """w^ [N, K] of `Grid.fake`: rounded in float32, then to `dtype`, bit for bit as in torch.

    operands: on the CPU. dtype: float32, float16 or bfloat16. isa: one of `native.ISAS`; "" is the widest. Raises
    ShapeError for scales or zero points of another shape or type.
    """
    o = operands.contiguous()
    out = _like(o.w, dtype)
    _native.fake(
        o.w.data_ptr(), _NUMBERS[o.w.dtype], (*o.w.shape, *o.group), o.scale.data_ptr(), _address(o.zero), o.grid,
        out.data_ptr(), _NUMBERS[dtype], isa,
    )  # fmt: skip
    return out


def gradients(
    grad: torch.Tensor,
    operands: Operands,
    *,
    cells: bool,
    needed: Needed,
    rounded: torch.dtype | None = None,
    spare: bool = False,
    isa: str = "",
) -> tuple[torch.Tensor | None, ...]:
    """`Grid.gradients` of w, scale and zero, float32, without the factors of the last two; and w^ once more.

    grad     that of w^, [N, K]: float32, float16 or bfloat16
    operands as in `fake`
    cells    whether weights are clipped half a step farther out: `Clip` "cells", else "levels"
    needed   which gradients; None comes in place of the others
    rounded  the type of w^; None for none
    spare    grad is of no other use, and may become the gradient of w
    isa      of `native.ISAS`; "" is the widest

    Raises ShapeError.
    """
    o = operands.contiguous()
    if grad.shape != o.w.shape:
        raise ShapeError(f"weights {[*o.w.shape]}, gradients {[*grad.shape]}")
    reused = spare and grad.dtype == torch.float32 and grad.is_contiguous()
    grad = grad.contiguous()
    by_weight = None if not needed[0] else grad if reused else _like(o.w)
    by_scale = _like(o.scale) if needed[1] else None
    by_zero = _like(o.zero) if needed[2] and o.zero is not None else None
    again = None if rounded is None else _like(o.w, rounded)
    _native.fake_gradients(
        grad.data_ptr(), _NUMBERS[grad.dtype], o.w.data_ptr(), _NUMBERS[o.w.dtype], (*o.w.shape, *o.group),
        o.scale.data_ptr(), _address(o.zero), o.grid, cells, _address(by_weight), _address(by_scale),
        _address(by_zero), _address(again), 0 if rounded is None else _NUMBERS[rounded], isa,
    )  # fmt: skip
    return by_weight, by_scale, by_zero, again


def _like(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of x's shape, contiguous and on the CPU, whatever the defaults are."""
    return torch.empty(x.shape, dtype=dtype, device="cpu")


def _address(x: torch.Tensor | None) -> int:
    """Where a tensor's numbers begin, 0 for None: as native functions take what may be absent."""
    return 0 if x is None else x.data_ptr()
