"""A part of a model as a list of native steps, which one call runs for a batch of sequences.

`Plan` is built step by step, each a method; buffers are numbered, and hold [rows, width] of float32 while a call lasts.
The rows of all sequences lie packed, so that what a mask hides costs nothing, and a sequence's results have the same
bits in every batch, with any number of threads and on every engine. Arithmetic is told in native/kernels/.

Memory of buffers is kept from call to call, at most 64 MB for each call that runs at the same time as others;
`release` gives it back.

What is given up: steps hold addresses of tensors, and so does the caller's promise that they stay (`is_current`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from spicerack import _native
from spicerack.errors import ShapeError
from spicerack.kernels import panels, pool
from spicerack.kernels.multiply import PanelMatrix

Index = Literal["ids", "types", "positions"]
"""What tells the row of a table, for each token."""
_INDEXES: tuple[Index, ...] = ("ids", "types", "positions")


class Plan:
    """Steps over buffers, run in the order in which they are added.

    widths    columns of each buffer
    pad       None: the position of a token is its column; else the padding's id, and positions count the ids that are
              not that one, from pad + 1 on, as RoBERTa does
    engine    of norms and attention, as in `panels.engine_index`
    """

    def __init__(self, widths: Sequence[int], pad: int | None = None, engine: str | None = None) -> None:
        self.widths = tuple(widths)
        self._native = _native.Plan(panels.engine_index(engine), list(widths), -1 if pad is None else pad)
        self._tensors: list[torch.Tensor] = []  # which steps have the addresses of
        self._addresses: list[int] = []

    def look_up(self, tables: Sequence[tuple[torch.Tensor | PanelMatrix, Index]], y: int) -> None:
        """y = the sum of one row of each table [rows, width of y], float32 or in panels, from the first table on."""
        parts: list[tuple[_native.Matrix | None, int, int, int]] = []
        for table, index in tables:
            if isinstance(table, PanelMatrix):
                parts.append((self._matrix(table), 0, table.spec.n, _INDEXES.index(index)))
            else:
                address = self._address(table, (len(table), self.widths[y]))
                parts.append((None, address, len(table), _INDEXES.index(index)))
        self._native.look_up(parts, y)

    def norm(
        self,
        x: int,
        more: int | None,
        y: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        epsilon: float,
        centered: bool = True,
    ) -> None:
        """y = LayerNorm of x, or of x + more; y may be one of them. centered: False is RMSNorm.

        weight, bias: float32 [width]. Statistics are in float32; epsilon is added to the variance.
        """
        shape = (self.widths[y],)
        at = self._address(weight, shape), 0 if bias is None else self._address(bias, shape)
        self._native.norm(x, -1 if more is None else more, y, *at, epsilon, centered)

    def product(
        self, x: int, parts: Sequence[tuple[PanelMatrix, torch.Tensor | None, int]], engine: str, gelu: bool = False
    ) -> None:
        """x W^T + bias, or GELU (by erf) of that, into a buffer for each (W, bias, buffer).

        Matrices take activations alike, as in `multiply`; biases are float32 [N], or None. engine: a name.
        """
        first = parts[0][0]
        products = []
        for matrix, bias, y in parts:
            at = 0 if bias is None else self._address(bias, (matrix.spec.n,))
            products.append((self._matrix(matrix), at, y, gelu))
        scale = first.fixed()
        if first.input_scale is not None:
            self._hold(first.input_scale)
        self._native.product(panels.engine_index(engine), x, first.activations, scale, products)

    def attention(self, q: int, k: int, v: int, y: int, heads: int, scale: float, kv_heads: int | None = None) -> None:
        """y = softmax(q k^T * scale) v for each head, over all tokens of a sequence.

        heads: of q; kv_heads: of k and v, None for as many. Widths of heads are multiples of 16.
        """
        self._native.attention(q, k, v, y, heads, heads if kv_heads is None else kv_heads, scale)

    def add(self, x: int, more: int, y: int) -> None:
        """y = x + more; y may be one of them."""
        self._native.add(x, more, y)

    def run(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        types: torch.Tensor | None,
        positions: torch.Tensor | None,
        result: int,
    ) -> torch.Tensor:
        """Buffer `result` [batch, length, width] for ids [batch, length]; zeros where the mask is 0.

        ids, mask, types, positions: int64, contiguous, on the CPU, all of one shape. mask None hides none,
        types None are 0, positions None are as the plan says. As many threads as torch uses. Raises IndexError, which
        names the place, for what is no row of its table, hidden or not; ShapeError for other tensors.
        """
        for t in (ids, mask, types, positions):
            if t is not None and (
                t.shape != ids.shape or t.dtype != torch.int64 or not (t.is_contiguous() and t.is_cpu)
            ):
                raise ShapeError(f"an index is {t.dtype} {list(t.shape)}", "pass contiguous int64 of the ids' shape")
        batch, length = ids.shape
        shape = (batch, length, self.widths[result])
        if math.prod(shape) >= pool.LARGE:
            y = pool.empty(shape, torch.float32)
        else:
            y = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults
        if not ids.numel():
            return y
        hidden, kinds, places = (0 if t is None else t.data_ptr() for t in (mask, types, positions))
        self._native.run(ids.data_ptr(), hidden, kinds, places, batch, length, result, y.data_ptr())
        return y

    def is_current(self) -> bool:
        """Whether the tensors that steps were given still have the memory that they had then: whoever cannot rule out
        that `data` of one was set, or a storage moved, asks before each run."""
        return [t.data_ptr() for t in self._tensors] == self._addresses

    def _matrix(self, matrix: PanelMatrix) -> _native.Matrix:
        for t in (matrix.codes, matrix.scale, matrix.zero):
            if t is not None:
                self._hold(t)
        return matrix.native()

    def _address(self, t: torch.Tensor, shape: tuple[int, ...]) -> int:
        """Where a tensor lies. Raises ShapeError unless it is float32 of this shape, contiguous and on the CPU."""
        if t.shape != shape or t.dtype != torch.float32 or not (t.is_contiguous() and t.is_cpu):
            raise ShapeError(f"{t.dtype} {list(t.shape)} where float32 {list(shape)} is needed", "pass that")
        return self._hold(t)

    def _hold(self, t: torch.Tensor) -> int:
        self._tensors.append(t)
        self._addresses.append(t.data_ptr())
        return self._addresses[-1]
