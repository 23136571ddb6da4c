"""The multiplying kernels of the native module: panels of packed weights, and y = x W^T + b on them.

Layout, arithmetic and bounds are told in native/kernels/. All engines give the same bits, for any number of rows and
threads. Threads are those of torch's own OpenMP team.

    spicerack::linear               the same as a torch operator, for torch.compile, torch.export and autograd
    spicerack::linear_transposed    its gradient with respect to x
"""

from __future__ import annotations

import math
import mmap
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import torch

from spicerack import _native
from spicerack.errors import ShapeError
from spicerack.numerics import native
from spicerack.numerics.packed import Rows, Tensors
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import IntLevels, Scheme

NAMES: tuple[str, ...] = tuple(_native.engines())
"""Engines that this processor runs, fastest first; "scalar" is always the last."""
ALL = ("avx512vbmi", "avx512vnni", "avx512vlvnni", "avxvnni", "avx2", "neon", "scalar")
PANEL, BLOCK, UNIT = 16, 32, 64
"""Rows of a panel, columns of a tile, bytes of a tile for each bit: native/kernels/kernel.h."""
TRITS, BUNDLE, TRITS_BYTES = 1, 5, 512
"""Instead of a number of bits: ternary codes in 1.6 bits; panels that share a tile of them; bytes of such a tile."""
FLOATS, BLOCKS, TOKENS, FIXED = range(4)
"""How activations enter: float32; int8 with a scale for 32 columns of a row, for a row, or one that is given."""
MAX_EXACT_COLUMNS = 1 << 16
"""Columns whose products are summed in int32 without overflow: 255 * 127 * 2^16 < 2^31."""

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Of x, y, bias and scales, as the native module counts them."""
_HUGE = 2 << 20
"""Bytes of a huge page."""
_CHUNK = 1 << 22
"""Weights decoded at once for a gradient."""


class Spec(NamedTuple):
    """A matrix [N, K]: w = scale * (u - offset or zero + half / 2), u below 2^bits. group: columns, 0 for the row.

    bits may be TRITS: u is 0, 1 or 2.
    """

    n: int
    k: int
    group: int
    bits: int
    offset: int
    half: bool

    @property
    def tiles(self) -> tuple[int, int, int]:
        """The shape of the packed codes."""
        if self.bits == TRITS:
            return -(-self.n // (BUNDLE * PANEL)), -(-self.k // BLOCK), TRITS_BYTES
        return -(-self.n // PANEL), -(-self.k // BLOCK), UNIT * self.bits


Layout = Literal["planes", "trits"]
"""Of codes: planes of bits for any scheme, or five ternary codes to a byte."""


def spec_of(scheme: Scheme, shape: tuple[int, int], layout: Layout = "planes") -> Spec:
    """The scheme's integer levels for a matrix of this shape."""
    assert isinstance(scheme.levels, IntLevels)
    levels = scheme.levels
    group = scheme.group or 0
    bits = scheme.bits if layout == "planes" else TRITS
    return Spec(*shape, 0 if group == shape[1] else group, bits, -levels.lo, levels.half)


def unfit(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a weight has no panels, or None if it has."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype not in TYPES:
        return f"takes float32, float16 and bfloat16, not {dtype}"
    if not isinstance(scheme.levels, IntLevels):
        return "its levels are a table, not integers"
    if scheme.bits < 2:
        return "codes have 2 to 8 bits"
    if scheme.min is not None or isinstance(scheme.scale, Scheme) or scheme.scale == "float8_e8m0fnu":
        return "scales are plain floats and there are no minima"
    rows, columns = scheme.block
    if rows != (1 if columns is not None else rows) or rows not in (1, None):
        return f"a scale belongs to one row or to the whole matrix, not to {rows} rows"
    if columns is not None and columns != shape[1] and columns % BLOCK:
        return f"groups are multiples of {BLOCK}, not {columns}"
    return None


# ---- panels ----------------------------------------------------------------------------------------------------------


def pack(q: QTensor, layout: Layout = "planes") -> dict[str, torch.Tensor]:
    """codes uint8 [N/16, K/32, 64 bits], scale [N/16, groups, 16] as stored, zero uint8 like scale; N, K rounded up.

    Trits: codes uint8 [N/80, K/32, 512]. input_scale as it is.
    """
    n, k = q.shape
    spec = spec_of(q.scheme, (n, k), layout)
    assert isinstance(q.scale, torch.Tensor)
    tiles = _zeros(math.prod(spec.tiles)).view(spec.tiles)
    height = PANEL * (BUNDLE if layout == "trits" else 1)
    codes = q.codes.cpu().contiguous().view(torch.uint8)

    def work(first: int, last: int) -> None:
        _native.to_panels(codes[first * height : last * height], spec.bits, spec.offset, tiles[first:last])

    with native.team(torch.get_num_threads()) as workers:
        workers.run(work, len(tiles))
    tensors = {"codes": tiles, "scale": _to_lanes(q.scale.cpu(), n)}
    if q.zero is not None:
        tensors["zero"] = _to_lanes((q.zero.cpu().to(torch.int16) + spec.offset).to(torch.uint8), n)
    if q.input_scale is not None:
        tensors["input_scale"] = q.input_scale.cpu()
    return tensors


def unpack(scheme: Scheme, shape: tuple[int, int], tensors: Tensors, layout: Layout = "planes") -> QTensor:
    """Inverse of `pack`."""
    n, k = shape
    spec = spec_of(scheme, shape, layout)
    signed = spec.offset > 0
    codes = torch.empty((n, k), dtype=torch.uint8)
    _native.from_panels(tensors["codes"].cpu(), spec.bits, spec.offset, codes)
    scale = _from_lanes(tensors["scale"], n)
    if scheme.block == (None, None):
        scale = scale[:1]
    zero = None
    if scheme.zero:
        zero = _from_lanes(tensors["zero"], n).to(torch.int16).sub_(spec.offset)
        zero = zero.to(torch.int8 if signed else torch.uint8)
    codes = codes.view(torch.int8) if signed else codes
    return QTensor(scheme, codes, scale, zero, input_scale=tensors.get("input_scale"))


def _zeros(nbytes: int) -> torch.Tensor:
    """uint8 zeros, on huge pages where Linux gives them: with small ones memory reads a fifth to a third slower."""
    if sys.platform != "linux" or nbytes < _HUGE:
        return torch.zeros(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE * _HUGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)


def _to_lanes(values: torch.Tensor, n: int) -> torch.Tensor:
    """[N or 1, groups] -> [N/16, groups, 16]; rows beyond N are zeros."""
    padded = values.new_zeros((-(-n // PANEL) * PANEL, values.shape[1]))
    padded[:n] = values
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _from_lanes(lanes: torch.Tensor, n: int) -> torch.Tensor:
    return lanes.transpose(1, 2).reshape(-1, lanes.shape[1])[:n].contiguous()


def rows(
    scheme: Scheme, shape: tuple[int, int], tensors: Tensors, which: Rows, layout: Layout = "planes"
) -> torch.Tensor:
    """float32 [R, K]: the chosen rows, equal to `codec.decode` bit for bit. Raises IndexError."""
    codes, scale, zero = tensors["codes"], tensors["scale"], tensors.get("zero")
    return _rows(codes, scale, zero, spec_of(scheme, shape, layout), which)


def _rows(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: Spec, which: Rows) -> torch.Tensor:
    if isinstance(which, slice):
        which = torch.arange(*which.indices(spec.n))
    which = which.to(torch.int64).contiguous()
    if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < spec.n:
        raise IndexError(f"row {int(which.max())} of a table with {spec.n} rows (least: {int(which.min())})")
    out = torch.empty((len(which), spec.k))
    matrix = Matrix(codes, scale, zero, spec, FLOATS).native()
    with native.team(torch.get_num_threads() if out.numel() > _CHUNK // 16 else 1) as workers:
        workers.run(lambda first, last: _native.rows(matrix, which[first:last], out[first:last]), len(which))
    return out


# ---- products --------------------------------------------------------------------------------------------------------


class Matrix:
    """Packed tensors as `pack` made them, how activations enter, and the native module's view of it all.

    input_scale: float32 [1], of FIXED activations.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        spec: Spec,
        activations: int,
        input_scale: torch.Tensor | None = None,
    ) -> None:
        self.codes, self.scale, self.zero, self.spec, self.activations = codes, scale, zero, spec, activations
        self.input_scale = input_scale
        self._addresses = (0, 0, 0)
        self._native: _native.Matrix  # since its first use

    def native(self) -> _native.Matrix:
        """Made when it is first needed, and again when a tensor has other memory. Raises ShapeError."""
        zero = self.zero
        addresses = (self.codes.data_ptr(), self.scale.data_ptr(), 0 if zero is None else zero.data_ptr())
        if addresses != self._addresses:
            self._check()
            self._native = _native.Matrix(*addresses, TYPES[self.scale.dtype], *self.spec)  # type: ignore[arg-type]
            self._addresses = addresses
        return self._native

    def _check(self) -> None:
        """The tensors have the size that the numbers say."""
        codes, scale, zero = self.codes, self.scale, self.zero
        n, k, group, bits, _, _ = self.spec
        panels = -(-n // PANEL)
        scales = panels * PANEL * (k // group if group else 1)
        if (
            codes.dtype != torch.uint8
            or codes.numel() != math.prod(self.spec.tiles)
            or scale.numel() != scales
            or (zero is not None and (zero.numel() != scales or zero.dtype != torch.uint8))
            or not (codes.is_contiguous() and scale.is_contiguous() and (zero is None or zero.is_contiguous()))
            or not codes.is_cpu
            or not scale.is_cpu
            or scale.dtype not in TYPES
        ):
            raise ShapeError(f"packed tensors do not make a [{n}, {k}] matrix of {bits} bits", "pack the weight again")

    def fixed(self) -> int:
        """Address of the scale of FIXED activations, else 0. Raises ShapeError."""
        x = self.input_scale
        if (x is not None) != (self.activations == FIXED) or (
            x is not None and (x.dtype != torch.float32 or x.numel() != 1 or not x.is_cpu)
        ):
            raise ShapeError("static activations need one float32 scale, and others none", "pack the weight again")
        return 0 if x is None else x.data_ptr()


def multiply(
    x: torch.Tensor,
    matrices: Sequence[Matrix],
    biases: Sequence[torch.Tensor | None],
    engine: int,
    gelu: bool = False,
) -> list[torch.Tensor]:
    """x [..., K] -> x W^T + b [..., N] for each matrix, in x's type; x is quantized once, as for the first.

    gelu: of that, x (1 + erf(x / sqrt 2)) / 2, as torch's GELU to 4e-7 before it is rounded to x's type.

    No gradients; as many threads as torch uses. NaN and infinities in a row of x give what float arithmetic gives for
    that row. Raises ShapeError and TypeError.
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
    outputs, products = [], []
    for matrix, bias in zip(matrices, biases, strict=True):
        shape[-1] = n = matrix.spec.n
        y = x.new_empty(*shape)  # faster than of a list
        address = 0
        if bias is not None:
            if bias.dtype != x.dtype or not bias.is_contiguous() or bias.numel() != n:
                bias = bias.to(x.dtype).reshape(n).contiguous()
            address = bias.data_ptr()
        outputs.append(y)
        products.append((matrix.native(), address, y.data_ptr(), gelu))
    rows = x.numel() // k
    if rows:
        _native.linear(engine, at, kind, rows, matrices[0].activations, matrices[0].fixed(), products)
    return outputs


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
    engine: int = 0,
) -> torch.Tensor:
    """softmax(q k^T * scale) v, in float32 whatever the type -> [B, L, H, V], contiguous, in q's type.

    q [B, H, L, D], k [B, G, S, D], v [B, G, S, V]: H / G heads of q share one of k and v. mask: bool, broadcast to
    [B, H, L, S]; False hides a key. causal: query i sees keys 0..i. A query that sees no key gets zeros. No gradients;
    as many threads as torch uses. Raises ShapeError and TypeError; `fits_attention` tells beforehand.
    """
    reason = fits_attention(q, k, v, mask)
    if reason is not None:
        raise ShapeError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: {reason}", "use torch's attention")
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, queries, width = q.shape
    kv_heads, keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    y = q.new_empty(batch, queries, heads, value_width)
    if not y.numel():
        return y
    if not keys:
        return y.zero_()
    hidden = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask if mask.stride(3) == 1 or keys == 1 else mask.contiguous()
        hidden = _place(mask)
    sizes = (batch, heads, kv_heads, queries, keys, width, value_width)
    _native.attention(
        engine, TYPES[q.dtype], _place(q), _place(k), _place(v), hidden, y.data_ptr(), sizes, causal, scale
    )
    return y


def fits_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why `attention` cannot run these, or None."""
    if not (q.dim() == k.dim() == v.dim() == 4 and q.is_cpu and k.is_cpu and v.is_cpu):
        return "it takes three tensors of four axes, on the CPU"
    if q.dtype not in TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return "it takes one type: float32, float16 or bfloat16"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return "shapes do not belong together"
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        return "heads of k do not divide those of q"
    if not q.shape[3] or q.shape[3] % PANEL or not v.shape[3] or v.shape[3] % PANEL:
        return f"widths are no multiples of {PANEL}"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu):
        return "it takes boolean masks of four axes"
    return None


def _place(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Address and the steps of the first three axes, in elements."""
    batch, head, row, _ = t.stride()
    return t.data_ptr(), batch, head, row


# ---- as a torch operator ---------------------------------------------------------------------------------------------

_PLAIN = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU).add(torch._C.DispatchKey.AutogradCPU).raw_repr()
"""Dispatch keys of ordinary tensors on the CPU, with no mode that watches."""
_LIBRARY = torch.library.Library("spicerack", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, Tensor? input_scale, SymInt n, SymInt k, "
    "int group, int bits, int offset, bool half, int engine, int activations) -> Tensor"
)
_LIBRARY.define(
    "linear_transposed(Tensor grad, Tensor codes, Tensor scale, Tensor? zero, SymInt n, SymInt k, int group, int bits, "
    "int offset, bool half) -> Tensor"
)


def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    bits: int,
    offset: int,
    half: bool,
    engine: int,
    activations: int,
) -> torch.Tensor:
    matrix = Matrix(codes, scale, zero, Spec(n, k, group, bits, offset, half), activations, input_scale)
    return multiply(x, (matrix,), (bias,), engine)[0]


def _fake(
    x: torch.Tensor, _codes: object, _scale: object, _zero: object, _bias: object, _fixed: object, n: int, *_: object
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _transposed(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    bits: int,
    offset: int,
    half: bool,
) -> torch.Tensor:
    """grad [..., N] -> grad W [..., K], some rows of W at a time."""
    spec = Spec(n, k, group, bits, offset, half)
    total = grad.new_zeros((*grad.shape[:-1], k))
    step = max(_CHUNK // k, 1)
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        total += grad[..., some] @ _rows(codes, scale, zero, spec, some).to(grad.dtype)
    return total


def _fake_transposed(
    grad: torch.Tensor, _codes: object, _scale: object, _zero: object, _n: int, k: int, *_: object
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _keep_transposed(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[object, ...],
    output: torch.Tensor,  # noqa: ARG001
) -> None:
    ctx.save_for_backward(*inputs[1:4])  # type: ignore[arg-type]
    ctx.spec = Spec(*inputs[4:])  # type: ignore[attr-defined, arg-type]


def _gradients_transposed(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[object, ...]:
    y = OPERATOR(grad, *ctx.saved_tensors, None, None, *ctx.spec, 0, FLOATS)  # type: ignore[attr-defined]
    return (y, *[None] * 9)


class _Differentiable(torch.autograd.Function):
    """The operator where a gradient is wanted: for x and bias."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, keys: torch._C.DispatchKeySet, *inputs: object
    ) -> torch.Tensor:
        _, codes, scale, zero, bias, _, *numbers = inputs
        ctx.save_for_backward(codes, scale, zero)  # type: ignore[arg-type]
        ctx.spec, ctx.bias = Spec(*numbers[:6]), bias is not None  # type: ignore[attr-defined, arg-type]
        return _redispatch(keys, inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scale, zero = ctx.saved_tensors  # type: ignore[attr-defined]
        spec: Spec = ctx.spec  # type: ignore[attr-defined]
        for_x = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            for_x = TRANSPOSED(grad, codes, scale, zero, *spec)
        for_bias = grad.reshape(-1, spec.n).sum(0) if ctx.bias else None  # type: ignore[attr-defined]
        return (None, for_x, None, None, None, for_bias, *[None] * 9)


def _autograd(keys: torch._C.DispatchKeySet, *inputs: Any) -> torch.Tensor:
    """What torch's dispatcher calls first. Where nothing but `_linear` is left to call, it is called at once.

    register_autograd would go through the dispatcher a second time, which costs as much as all of `multiply`.
    """
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _Differentiable.apply(keys, *inputs)  # type: ignore[no-any-return, no-untyped-call]
    if keys.raw_repr() == _PLAIN:
        return _linear(*inputs)
    return _redispatch(keys, inputs)


def _redispatch(keys: torch._C.DispatchKeySet, inputs: Sequence[object]) -> torch.Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return OPERATOR.redispatch(keys & torch._C._after_autograd_keyset, *inputs)  # type: ignore[no-any-return]


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("linear_transposed", _transposed, "CPU")
torch.library.register_fake("spicerack::linear", _fake, lib=_LIBRARY)
torch.library.register_fake("spicerack::linear_transposed", _fake_transposed, lib=_LIBRARY)
torch.library.register_autograd(
    "spicerack::linear_transposed", _gradients_transposed, setup_context=_keep_transposed, lib=_LIBRARY
)
OPERATOR = torch.ops.spicerack.linear.default
TRANSPOSED = torch.ops.spicerack.linear_transposed.default


# ---- measured limits -------------------------------------------------------------------------------------------------


def dot_peak(threads: int, *, engine: int = 0, seconds: float = 0.3) -> float:
    """Operations per second (2 for a multiply-add) of integer dot products that touch registers only; the best turn."""
    best, rounds, end = 0.0, 200_000, time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or not best:
        done = _native.spin(engine, rounds, threads)
        best = max(best, done / (time.perf_counter() - begin))
    return best


def read_bandwidth(nbytes: int, threads: int, *, engine: int = 0, turns: int = 5) -> float:
    """Bytes per second that `threads` threads read together from nbytes of memory, in order; the best turn."""
    data = _zeros(nbytes).fill_(1)
    best = 0.0
    for _ in range(turns):
        begin = time.perf_counter()
        _native.read_all(engine, data, threads)
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best
