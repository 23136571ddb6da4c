"""y = x W^T + b on panels: the calls of the native module's products.

Arithmetic and bounds are told in native/kernels/. All engines give the same bits, for any number of rows and threads.
Threads are those of torch's own OpenMP team.

A call from Python costs microseconds that small layers notice (docs/kernels.md counts them), so what can be done once
is done once: `PanelMatrix` checks its tensors when their memory changes and not at each product, and the native module
gets addresses and numbers, never tensors. What is given up for that is torch's care for lifetimes: whatever an address
is taken of must be held by a name until the native call has returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spicerack import _native
from spicerack.errors import ShapeError
from spicerack.kernels import pool
from spicerack.kernels.panels import FIXED, FLOATS, PANEL, SCALE_TYPES, TYPES, Spec, Tiling, spec_of
from spicerack.numerics import native
from spicerack.numerics.packed import Rows, Tensors
from spicerack.numerics.scheme import Scheme

_MANY = 1 << 18
"""Weights from which on threads share the decoding of rows."""


class PanelMatrix:
    """A matrix [N, K] in panels: tensors as `panels.pack` made them, how activations enter, and the native view of it.

    codes, scale        see `panels.pack`; on the CPU
    zero, outer         the same, or None for none
    spec                their numbers
    activations         FLOATS, SPANS, TOKENS or FIXED
    input_scale         float32 [1], of FIXED activations, else None

    Whether they belong together is checked when they are first used.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        outer: torch.Tensor | None,
        spec: Spec,
        activations: int,
        input_scale: torch.Tensor | None = None,
    ) -> None:
        self.codes, self.scale, self.zero, self.outer, self.spec = codes, scale, zero, outer, spec
        self.activations, self.input_scale = activations, input_scale
        self._addresses = (0, 0, 0, 0)
        self._native: _native.Matrix  # since its first use

    def native(self) -> _native.Matrix:
        """What the native module takes: made when it is first needed, and again when a tensor has other memory.

        A layer that is moved, loaded into or shared has other addresses afterwards, which are compared at each call.
        Raises ShapeError for tensors that do not make this matrix: native code would read beyond their ends.
        """
        zero, outer = self.zero, self.outer
        addresses = (
            self.codes.data_ptr(),
            self.scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            0 if outer is None else outer.data_ptr(),
        )
        if addresses != self._addresses:
            self._check()
            types = SCALE_TYPES[self.scale.dtype], 0 if outer is None else TYPES[outer.dtype]
            self._native = _native.Matrix(*addresses, *types, *self.spec)  # type: ignore[arg-type]
            self._addresses = addresses
        return self._native

    def _check(self) -> None:
        """Raise ShapeError unless the tensors have the sizes and types that the numbers say, and lie on the CPU."""
        spec, zero, outer = self.spec, self.zero, self.outer
        lanes = -(-spec.n // PANEL) * PANEL * (2 if spec.minima else 1)
        scales = lanes * (spec.k // spec.group if spec.group else 1)
        blocks = lanes * (spec.k // spec.block if spec.block else 1)
        parts = [t for t in (self.codes, self.scale, zero, outer) if t is not None]
        if (
            self.codes.dtype != torch.uint8
            or self.codes.numel() != math.prod(spec.tiles)
            or self.scale.numel() != scales
            or self.scale.dtype not in (TYPES if outer is None else SCALE_TYPES.keys() - TYPES.keys())
            or (zero is not None and (zero.numel() != scales or zero.dtype != torch.uint8))
            or (outer is not None and (outer.numel() != blocks or outer.dtype not in TYPES))
            or not all(t.is_contiguous() and t.is_cpu for t in parts)
        ):
            raise ShapeError(
                f"packed tensors do not make a [{spec.n}, {spec.k}] matrix of {spec.bits} bits", "pack the weight again"
            )

    def fixed(self) -> int:
        """Address of the scale of FIXED activations, else 0.

        The scale is float32 [1], on the CPU. Raises ShapeError for one too many, none at all, or one of another type:
        native code takes the address as it is.
        """
        x = self.input_scale
        if (x is not None) != (self.activations == FIXED) or (
            x is not None and (x.dtype != torch.float32 or x.numel() != 1 or not x.is_cpu)
        ):
            raise ShapeError("static activations need one float32 scale, and others none", "pack the weight again")
        return 0 if x is None else x.data_ptr()


def multiply(
    x: torch.Tensor,
    matrices: Sequence[PanelMatrix],
    biases: Sequence[torch.Tensor | None],
    engine: int,
) -> list[torch.Tensor]:
    """x [..., K] -> x W^T + b [..., N] for each matrix, in x's type; x is quantized once, as for the first.

    x         float32, float16 or bfloat16, on the CPU; copied if it is not contiguous
    matrices  of the same K, whose activations enter in the same way
    biases    [N] for each, or None; of another type than x they are converted at each call
    engine    a place in `panels.NAMES`

    No gradients; as many threads as torch uses. NaN and infinities in a row of x give what float arithmetic gives for
    that row. Raises ShapeError for x or tensors of another shape, TypeError for x of another type or device.
    """
    k = matrices[0].spec.k
    shape = list(x.shape)
    kind = TYPES.get(x.dtype)
    if kind is None:
        raise TypeError(f"x is {x.dtype}; kernels take float32, float16 and bfloat16")
    if not shape or shape[-1] != k:
        raise ShapeError(f"x has shape {shape}, the layer takes [..., {k}]", "check the layer's input")
    if not x.is_cpu:
        raise TypeError(f"x is on {x.device}; this layer was packed for the CPU")
    at = x.data_ptr()
    if not x.is_contiguous() or at % x.itemsize:
        x = x.clone(memory_format=torch.contiguous_format)
        at = x.data_ptr()
    outputs, products, held = [], [], []
    rows = x.numel() // k
    for matrix, bias in zip(matrices, biases, strict=True):
        shape[-1] = n = matrix.spec.n
        # new_empty of numbers is faster than of a list
        y = x.new_empty(*shape) if rows * n < pool.LARGE else pool.empty(shape, x.dtype)
        address = 0
        if bias is not None:
            if bias.dtype != x.dtype or not bias.is_contiguous() or bias.numel() != n:
                bias = bias.to(x.dtype).reshape(n).contiguous()
                held.append(bias)  # nobody else keeps it until its address is read
            address = bias.data_ptr()
        outputs.append(y)
        products.append((matrix.native(), address, y.data_ptr(), False))
    if rows:
        _native.linear(engine, at, kind, rows, matrices[0].activations, matrices[0].fixed(), products)
    return outputs


def rows(
    scheme: Scheme, shape: tuple[int, int], tensors: Tensors, which: Rows, tiling: Tiling = "planes"
) -> torch.Tensor:
    """Chosen rows of a matrix [N, K] in panels, decoded: float32 [R, K], equal to `codec.decode` bit for bit.

    scheme    of the matrix
    shape     [N, K]
    tensors   as `panels.pack` made them, by name
    which     indices [R] of any integer type, in any order and repeated at will, or a slice
    tiling    how codes lie in a tile

    Raises IndexError for rows that there are not, ShapeError for tensors that do not make this matrix.
    """
    codes, scale, zero, outer = tensors["codes"], tensors["scale"], tensors.get("zero"), tensors.get("outer")
    return rows_of(PanelMatrix(codes, scale, zero, outer, spec_of(scheme, shape, tiling), FLOATS), which)


def rows_of(matrix: PanelMatrix, which: Rows) -> torch.Tensor:
    """The same as `rows`, of a matrix that was made already: float32 [R, K].

    Few rows, as an embedding of one token asks for, are decoded by one thread: to start a team takes longer.
    """
    spec = matrix.spec
    if isinstance(which, slice):
        which = torch.arange(*which.indices(spec.n), device="cpu")
    which = which.to(torch.int64).contiguous()
    if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < spec.n:
        raise IndexError(f"row {int(which.max())} of a table with {spec.n} rows (least: {int(which.min())})")
    out = torch.empty((len(which), spec.k), dtype=torch.float32, device="cpu")
    packed = matrix.native()
    with native.team(torch.get_num_threads() if out.numel() > _MANY else 1) as workers:
        workers.run(lambda first, last: _native.rows(packed, which[first:last], out[first:last]), len(which))
    return out
