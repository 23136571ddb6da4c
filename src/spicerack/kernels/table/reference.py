"""The kernel that defines the others: plain torch, any device, every scheme.

Weights stay bit-packed. Each call decodes them some rows at a time, so that no more than `CHUNK` weights exist in float
at once, however large the layer, and forgets them again; the gradient with respect to x decodes them anew.

    y = x W^T                                 weight-only schemes, in the type of x
    y = s (c u^T) * scale                     w8a8: s = max|x| / 127 per token, c = round(x / s), u the weight's codes;
                                              the integer product is exact, and the gradient that of y = x W^T
                                              w8a8s: the same with the one s that is stored, c within -127 ... 127
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from spicerack.kernels.kernel import Kernel, Shape
from spicerack.numerics import packed
from spicerack.numerics.activations import quantize_fixed, quantize_tokens
from spicerack.numerics.packed import Tensors
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme

CHUNK = 1 << 22
"""Weights decoded at once: 16 MiB of float32."""
_EXACT = 1024
"""Products of int8 with int8 that float32 sums without rounding, in any order: 1024 * 127 * 128 < 2^24."""


def obstacle(_scheme: Scheme, _shape: Shape, dtype: torch.dtype, _device: torch.device) -> str | None:
    """None, but for inputs that are no floats: it runs every scheme, shape and device."""
    if not dtype.is_floating_point:
        return f"x would be {dtype}, not a float"
    return None


def rows(scheme: Scheme, shape: Shape, tensors: Tensors, which: packed.Rows) -> torch.Tensor:
    """The chosen rows decoded, float32 [R, K], equal to `codec.decode` bit for bit: see `Kernel.rows`."""
    return packed.decode_rows(scheme, shape, tensors, which)


def unpack(scheme: Scheme, shape: Shape, tensors: Tensors) -> QTensor:
    """See `Kernel.unpack`."""
    return packed.unpack(scheme, shape, tensors)


PackedMatrix = tuple[Scheme, Shape, Tensors]
"""All that `run` needs of a weight: its scheme, [N, K], and tensors as `numerics.packed` has them."""


def prepare(scheme: Scheme, shape: Shape, tensors: Tensors) -> PackedMatrix:
    """See `Kernel.prepare`: nothing is left to do."""
    return scheme, shape, tensors


def run(x: torch.Tensor, matrices: Sequence[PackedMatrix], biases: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """See `Kernel.run`: one product after the other."""
    products = zip((_product(x, *matrix) for matrix in matrices), biases, strict=True)
    return [y if bias is None else y + bias.to(y.dtype) for y, bias in products]


class _Product(torch.autograd.Function):
    """y [..., N] = x [..., K] W^T without keeping W: it is decoded some rows at a time, forward and backward.

    Activations are rounded as the scheme says: not at all, by a scale for each token, or by the stored one. The
    gradient with respect to x is that of the product with the decoded weight, as if nothing had been rounded; the
    weight has none.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, scheme: Scheme, shape: Shape, tensors: Tensors
    ) -> torch.Tensor:
        ctx.weight = (scheme, shape, tensors)  # type: ignore[attr-defined]
        if scheme.activations is None:
            return _linear(x, scheme, shape, tensors)
        if scheme.activations == "static":
            scale = tensors["input_scale"]
            codes = quantize_fixed(x.float(), scale)
        else:
            codes, scale = quantize_tokens(x.float())
        if _is_integer(scheme):
            y = _integer_linear(codes, scheme, shape, tensors)
        else:
            y = _linear(codes, scheme, shape, tensors)
        return (y * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        scheme, shape, tensors = ctx.weight  # type: ignore[attr-defined]
        total = grad.new_zeros((*grad.shape[:-1], shape[1]))
        for some in _chunks(shape):
            total += grad[..., some] @ rows(scheme, shape, tensors, some).to(grad.dtype)
        return total, None, None, None


_product: Callable[[torch.Tensor, Scheme, Shape, Tensors], torch.Tensor] = _Product.apply


def _linear(x: torch.Tensor, scheme: Scheme, shape: Shape, tensors: Tensors) -> torch.Tensor:
    """x [..., K] -> x W^T [..., N] in x's type, `CHUNK` weights decoded at a time; the parts are joined along N."""
    parts = [torch.nn.functional.linear(x, rows(scheme, shape, tensors, some).to(x.dtype)) for some in _chunks(shape)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _integer_linear(codes: torch.Tensor, scheme: Scheme, shape: Shape, tensors: Tensors) -> torch.Tensor:
    """codes [..., K], integers as float32 -> (codes W_codes^T) * scale, float32 [..., N], the product exact in int32.

    float32 multiplies, because torch has no integer product on every device; sums of `_EXACT` terms are exact in it.
    """
    y = codes.new_empty((*codes.shape[:-1], shape[0]))
    for some in _chunks(shape):
        weight = packed.code_rows(scheme, shape, tensors, some)
        product = torch.zeros((*codes.shape[:-1], len(weight)), dtype=torch.int32, device=codes.device)
        for start in range(0, shape[1], _EXACT):
            part = slice(start, start + _EXACT)
            product += torch.nn.functional.linear(codes[..., part], weight[:, part]).to(torch.int32)
        scale = tensors["scale"].float()
        y[..., some] = product * (scale[some, 0] if len(scale) == shape[0] else scale[0, 0])
    return y


def _is_integer(scheme: Scheme) -> bool:
    """Whether all products of a row share one scale and are integers."""
    plain = scheme.plain_obstacle is None and scheme.group_columns is None and not scheme.zero
    return plain and not scheme.integers.half


def _chunks(shape: Shape) -> Iterator[slice]:
    """Slices of a matrix's rows, of `CHUNK` weights or less each, one row at least. shape: [N, K]."""
    step = max(CHUNK // shape[1], 1)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


KERNELS = (Kernel("reference", 0, False, "float", obstacle, packed.pack, unpack, rows, prepare, run),)
