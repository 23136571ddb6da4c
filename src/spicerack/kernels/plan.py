"""A part of a model as a list of native steps, which one call runs for a batch of sequences.

`Plan` is built step by step, each a method; buffers are numbered, and hold [rows, width] of float32 while a call lasts.
The rows of all sequences lie packed, so that what a mask hides costs nothing, and a sequence's results have the same
bits in every batch, with any number of threads and on every engine. Arithmetic is told in native/kernels/.

Tensors of a model may be float32, float16 or bfloat16: they are widened, all is computed in float32, and the result is
rounded once.

Memory of buffers is kept from call to call, at most 64 MB for each call that runs at the same time as others;
`release` gives it back.

What is given up: steps hold addresses of tensors, and so does the caller's promise that they stay (`is_current`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch

from spicerack import _native
from spicerack.errors import ShapeError
from spicerack.kernels import panels, pool
from spicerack.kernels.multiply import PanelMatrix

Index = Literal["ids", "types", "positions"]
"""What tells the row of a table, for each token."""
_INDEXES: tuple[Index, ...] = ("ids", "types", "positions")
Function = Literal["gelu", "gelu_tanh", "gelu_quick", "silu"]
"""Of one number: GELU by the error function, by a tanh, by a sigmoid of 1.702 x; and x times its sigmoid."""
_FUNCTIONS: tuple[Function, ...] = ("gelu", "gelu_tanh", "gelu_quick", "silu")


class Columns(NamedTuple):
    """Some columns of a buffer: `width` of them, from `first` on."""

    buffer: int
    first: int
    width: int


class Inputs(NamedTuple):
    """What a plan is run on: int64 [batch, length] each, contiguous, on the CPU; None where there is none.

    ids        rows of tables, unless nothing asks for them
    mask       0 hides; None hides none
    types      None: all are 0
    positions  None: as the plan says
    states     [batch, length, width] in the plan's type, for plans that `take` them
    """

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    types: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    states: torch.Tensor | None = None


class Plan:
    """Steps over buffers, run in the order in which they are added.

    widths    columns of each buffer
    pad       None: the position of a token is its column; else the padding's id, and positions count the ids that are
              not that one, from pad + 1 on, as RoBERTa does
    engine    of all steps but products, as in `panels.engine_index`
    dtype     of states and results: float32, float16 or bfloat16
    """

    def __init__(
        self,
        widths: Sequence[int],
        pad: int | None = None,
        engine: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.widths, self.dtype = tuple(widths), dtype
        number = panels.engine_index(engine)
        self._native = _native.Plan(number, panels.TYPES[dtype], list(widths), -1 if pad is None else pad)
        self._tensors: list[torch.Tensor] = []  # which steps have the addresses of
        self._addresses: list[int] = []
        self._takes: int | None = None  # columns of states

    def look_up(self, tables: Sequence[tuple[torch.Tensor | PanelMatrix, Index]], y: int) -> None:
        """y = the sum of one row of each table [rows, width of y], floats or in panels, from the first table on."""
        parts = [(self._table(table, self.widths[y]), _INDEXES.index(index)) for table, index in tables]
        self._native.look_up(parts, y)

    def take(self, y: int) -> None:
        """y = the states that the plan is run on."""
        self._native.take(y)
        self._takes = self.widths[y]

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

        weight, bias: [width]. Statistics are in float32; epsilon is added to the variance.
        """
        parameters = self._parameter(weight, self.widths[y]), self._parameter(bias, self.widths[y])
        self._native.norm(x, -1 if more is None else more, y, *parameters, epsilon, centered)

    def product(
        self, x: int, parts: Sequence[tuple[PanelMatrix, torch.Tensor | None, int]], engine: str, gelu: bool = False
    ) -> None:
        """x W^T + bias, or GELU (by erf) of that, into a buffer for each (W, bias, buffer).

        Matrices take activations alike, as in `multiply`; biases are [N], or None. engine: a name.
        """
        first = parts[0][0]
        products = [(self._matrix(matrix), self._parameter(b, matrix.spec.n), y, gelu) for matrix, b, y in parts]
        scale = first.fixed()
        if first.input_scale is not None:
            self._hold(first.input_scale)
        self._native.product(panels.engine_index(engine), x, first.activations, scale, products)

    def dense(self, x: int, weight: torch.Tensor, bias: torch.Tensor | None, y: int, gelu: bool = False) -> None:
        """y = x W^T + bias, or GELU (by erf) of that, for a W [N, K] that stayed float; bias: [N], or None."""
        n, k = self.widths[y], self.widths[x]
        self._native.dense(x, self._parameter(weight, n, k), self._parameter(bias, n), y, gelu)

    def bias(self, table: torch.Tensor | PanelMatrix, heads: int, buckets: Sequence[int]) -> int:
        """Bias of attention by distance, as `attention` takes it.

        table     [rows, heads]
        buckets   its row for a key that is -reach, ..., reach behind its query; what is farther has that of the reach
        """
        return self._native.bias(self._table(table, heads), heads, list(buckets))

    def attention(
        self,
        q: Columns,
        k: Columns,
        v: Columns,
        y: int,
        heads: int,
        scale: float,
        *,
        kv_heads: int | None = None,
        window: int | None = None,
        bias: int | None = None,
    ) -> None:
        """y = softmax(q k^T * scale + bias) v for each head, over the tokens of a sequence.

        Widths of heads are multiples of 16. With a window or a bias distances count, and a mask may have no holes.

        kv_heads   of k and v; None for as many as q has
        window     a token sees those that are at most so far away; None: all
        bias       a `bias`, or None
        """
        group = heads if kv_heads is None else kv_heads
        self._native.attention(
            q, k, v, y, heads, group, scale, -1 if window is None else window, -1 if bias is None else bias
        )

    def turns(self, frequencies: torch.Tensor, scale: float, y: int) -> None:
        """y = cosines, then sines, of the position times each frequency [width of y / 2], times scale."""
        self._native.turns(self._parameter(frequencies, self.widths[y] // 2), scale, y)

    def rotate(self, x: Columns, heads: int, turns: int) -> None:
        """Rotary positions, in place: in each head of x the columns i and i + n are turned as a pair, for n = the
        number of frequencies of `turns`; columns from 2 n on stay."""
        self._native.rotate(x, heads, turns)

    def gate(self, x: Columns, more: Columns | None, y: int, function: Function) -> None:
        """y = the function of x, times more if there is one; y may be a buffer that is all of x or of more."""
        self._native.gate(x, more, y, _FUNCTIONS.index(function))

    def add(self, x: int, more: int, y: int, factor: torch.Tensor | None = None) -> None:
        """y = x + more, or x + more * factor [width]; y may be one of them."""
        self._native.add(x, more, y, self._parameter(factor, self.widths[y]))

    def run(self, inputs: Inputs, result: int) -> torch.Tensor | None:
        """Buffer `result` [batch, length, width] in the plan's type; zeros where the mask is 0.

        None, and nothing was computed, where distances count and the mask hides what is between tokens of a sequence.
        As many threads as torch uses. Raises IndexError, which names the place, for what is no row of its table, hidden
        or not; ShapeError for other tensors.
        """
        batch, length = self._shape(inputs)
        shape = (batch, length, self.widths[result])
        if math.prod(shape) >= pool.LARGE:
            y = pool.empty(shape, self.dtype)
        else:
            y = torch.empty(shape, dtype=self.dtype, device="cpu")  # whatever the defaults
        if not batch * length:
            return y
        ids, mask, types, positions, states = (0 if t is None else t.data_ptr() for t in inputs)
        computed = self._native.run(ids, mask, types, positions, states, batch, length, result, y.data_ptr())
        return y if computed else None

    def is_current(self) -> bool:
        """Whether the tensors that steps were given still have the memory that they had then: whoever cannot rule out
        that `data` of one was set, or a storage moved, asks before each run."""
        return [t.data_ptr() for t in self._tensors] == self._addresses

    def is_of(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether all tensors that steps were given have the memory of some of these."""
        return {t.data_ptr() for t in tensors}.issuperset(self._addresses)

    def columns(self, buffer: int) -> Columns:
        """All of a buffer."""
        return Columns(buffer, 0, self.widths[buffer])

    def _shape(self, inputs: Inputs) -> tuple[int, int]:
        """[batch, length] of inputs that are as they must be. Raises ShapeError for others."""
        states = inputs.states
        shape = next((t.shape[:2] for t in inputs if t is not None), torch.Size())
        for t in inputs[:-1]:
            if t is not None and (t.shape != shape or t.dtype != torch.int64 or not (t.is_contiguous() and t.is_cpu)):
                raise ShapeError(f"an index is {t.dtype} {list(t.shape)}", "pass contiguous int64 of the ids' shape")
        if len(shape) != 2 or (states is None) != (self._takes is None):
            raise ShapeError("ids, or states, are missing", "pass what the plan reads")
        if states is not None and (
            states.shape != (*shape, self._takes)
            or states.dtype != self.dtype
            or not (states.is_contiguous() and states.is_cpu)
        ):
            raise ShapeError(f"states are {states.dtype} {list(states.shape)}", f"pass {self.dtype} {self._takes} wide")
        return shape[0], shape[1]

    def _table(self, table: torch.Tensor | PanelMatrix, width: int) -> tuple[_native.Matrix | None, int, int, int]:
        """A table [rows, width] as native code takes it."""
        if isinstance(table, PanelMatrix):
            return self._matrix(table), 0, 0, table.spec.n
        address, type_, _ = self._parameter(table, len(table), width)
        return None, address, type_, len(table)

    def _matrix(self, matrix: PanelMatrix) -> _native.Matrix:
        for t in (matrix.codes, matrix.scale, matrix.zero, matrix.outer):
            if t is not None:
                self._hold(t)
        return matrix.native()

    def _parameter(self, t: torch.Tensor | None, *shape: int) -> tuple[int, int, int]:
        """Address, type and size of a tensor; zeros for none.

        Raises ShapeError unless it is float32, float16 or bfloat16 of this shape, contiguous and on the CPU.
        """
        if t is None:
            return 0, 0, 0
        if t.shape != shape or t.dtype not in panels.TYPES or not (t.is_contiguous() and t.is_cpu):
            raise ShapeError(f"{t.dtype} {list(t.shape)} where floats {list(shape)} are needed", "pass those")
        return self._hold(t), panels.TYPES[t.dtype], t.numel()

    def _hold(self, t: torch.Tensor) -> int:
        self._tensors.append(t)
        self._addresses.append(t.data_ptr())
        return self._addresses[-1]
