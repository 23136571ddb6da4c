"""The product as a torch operator, for torch.compile, torch.export and autograd.

    spicerack::linear              y = x W^T + b on panels
    spicerack::linear_transposed   its gradient with respect to x

Operators take tensors and numbers alone, so that what records a graph can keep them: a matrix is its tensors and the
numbers of its Spec, one after the other. That makes eighteen arguments, which no other function here has. Gradients are
those of y = x W^T with the decoded weight, as if activations had not been rounded; the weight itself has none.

Ordinary calls do not come here (`table.cpu` calls `multiply` at once), only those that somebody traces, compiles or
differentiates: the dispatcher costs as much as all of `multiply`.

What is given up. Some names of torch that are private (`torch._C`) are used to find out that nobody watches; a new
version may move them, and the tests of tests/kernels/test_operator.py would say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spicerack.kernels.multiply import PanelMatrix, multiply, rows_of
from spicerack.kernels.panels import FLOATS, Spec

_CHUNK = 1 << 22
"""Weights decoded at once for a gradient: 16 MiB of float32."""
_PLAIN = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU).add(torch._C.DispatchKey.AutogradCPU).raw_repr()
"""Dispatch keys of ordinary tensors on the CPU, with no mode that watches: nothing is left to dispatch to."""
_LIBRARY = torch.library.Library("spicerack", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? outer, Tensor? bias, Tensor? input_scale, "
    "SymInt n, SymInt k, int group, int bits, int offset, bool half, bool minima, int block, int[] table, "
    "int engine, int activations) -> Tensor"
)
_LIBRARY.define(
    "linear_transposed(Tensor grad, Tensor codes, Tensor scale, Tensor? zero, Tensor? outer, SymInt n, SymInt k, "
    "int group, int bits, int offset, bool half, bool minima, int block, int[] table) -> Tensor"
)


def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    outer: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    bits: int,
    offset: int,
    half: bool,
    minima: bool,
    block: int,
    table: Sequence[int],
    engine: int,
    activations: int,
) -> torch.Tensor:
    """x [..., K] -> [..., N], in x's type: `multiply` of one matrix, as the operator's own code on the CPU.

    x, bias              as in `multiply`
    codes, scale, zero, outer   a matrix in panels, see `panels.pack`
    input_scale          float32 [1] of FIXED activations, else None
    n, k, group, bits, offset, half, minima, block, table   the numbers of its `Spec`
    engine               a place in `panels.NAMES`
    activations          FLOATS, SPANS, TOKENS or FIXED
    """
    spec = Spec(n, k, group, bits, offset, half, minima, block, tuple(table))
    matrix = PanelMatrix(codes, scale, zero, outer, spec, activations, input_scale)
    return multiply(x, (matrix,), (bias,), engine)[0]


def _fake(
    x: torch.Tensor,
    _codes: object,
    _scale: object,
    _zero: object,
    _outer: object,
    _bias: object,
    _fixed: object,
    n: int,
    *_: object,
) -> torch.Tensor:
    """The shape and type of what `_linear` returns, for tensors without values: all that tracing needs to know
    of it."""
    return x.new_empty((*x.shape[:-1], n))


def _transposed(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    outer: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    bits: int,
    offset: int,
    half: bool,
    minima: bool,
    block: int,
    table: Sequence[int],
) -> torch.Tensor:
    """grad [..., N] -> grad W [..., K], in grad's type: the gradient of `_linear` with respect to x.

    grad                 of y
    codes, scale, zero, outer   a matrix in panels, see `panels.pack`
    n, k, group, bits, offset, half, minima, block, table   the numbers of its `Spec`

    Some rows of W are decoded at a time, `_CHUNK` numbers at most, so that W is never there as a whole.
    """
    spec = Spec(n, k, group, bits, offset, half, minima, block, tuple(table))
    total = grad.new_zeros((*grad.shape[:-1], k))
    step = max(_CHUNK // k, 1)
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        total += grad[..., some] @ rows_of(PanelMatrix(codes, scale, zero, outer, spec, FLOATS), some).to(grad.dtype)
    return total


def _fake_transposed(
    grad: torch.Tensor, _codes: object, _scale: object, _zero: object, _outer: object, _n: int, k: int, *_: object
) -> torch.Tensor:
    """The shape and type of what `_transposed` returns."""
    return grad.new_empty((*grad.shape[:-1], k))


def _keep_transposed(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[object, ...],
    output: torch.Tensor,  # noqa: ARG001
) -> None:
    """What `_gradients_transposed` needs: the matrix, and not its input."""
    ctx.save_for_backward(*inputs[1:5])  # type: ignore[arg-type]
    ctx.spec = Spec(*inputs[5:])  # type: ignore[attr-defined, arg-type]


def _gradients_transposed(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[object, ...]:
    """The gradient of the gradient: W is linear in both, so this is the product itself, with floats."""
    y = OPERATOR(grad, *ctx.saved_tensors, None, None, *ctx.spec, 0, FLOATS)  # type: ignore[attr-defined]
    return (y, *[None] * 13)


class _Differentiable(torch.autograd.Function):
    """The operator where a gradient is wanted: for x, as `_transposed` of it, and for the bias, as its sum over rows.

    Arguments beside x and the bias get None: codes have no gradient, and scales of packed weights are not trained here.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, keys: torch._C.DispatchKeySet, *inputs: object
    ) -> torch.Tensor:
        _, codes, scale, zero, outer, bias, _, *numbers = inputs
        ctx.save_for_backward(codes, scale, zero, outer)  # type: ignore[arg-type]
        ctx.spec, ctx.bias = Spec(*numbers[:9]), bias is not None  # type: ignore[attr-defined, arg-type]
        return _redispatch(keys, inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scale, zero, outer = ctx.saved_tensors  # type: ignore[attr-defined]
        spec: Spec = ctx.spec  # type: ignore[attr-defined]
        for_x = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            for_x = TRANSPOSED(grad, codes, scale, zero, outer, *spec)
        for_bias = grad.reshape(-1, spec.n).sum(0) if ctx.bias else None  # type: ignore[attr-defined]
        return (None, for_x, None, None, None, None, for_bias, *[None] * 12)


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
    """On to whoever comes behind autograd: a mode that records, another device, or `_linear`."""
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
