"""Kernels on panels: rows of the table that differ in engine and in how activations enter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from spicerack.kernels import multiply
from spicerack.kernels.kernel import Compute, Kernel, Shape
from spicerack.kernels.multiply import Layout
from spicerack.numerics.packed import Tensors
from spicerack.numerics.scheme import IntLevels, Scheme


def kernel(compute: Compute, engine: str, *, speed: int, layout: Layout = "planes") -> Kernel:
    """The row for `compute` on the engine of that name, which this processor need not have."""
    index = multiply.NAMES.index(engine) if engine in multiply.NAMES else -1  # which never fits
    return Kernel(
        name=f"{compute if layout == 'planes' else 'ternary'}_{engine}",
        speed=speed,
        vector=engine != "scalar",
        compute=compute,
        fits=partial(_fits, compute, engine, layout),
        pack=partial(multiply.pack, layout=layout),
        unpack=partial(multiply.unpack, layout=layout),
        rows=partial(multiply.rows, layout=layout),
        prepare=partial(_prepare, compute, layout),
        run=partial(_run, index),
    )


def _fits(
    compute: Compute,
    engine: str,
    layout: Layout,
    scheme: Scheme,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    if engine not in multiply.NAMES:
        return f"this processor, or this build, has no {engine}"
    if layout == "trits" and (scheme.levels != IntLevels(-1, 1) or scheme.zero):
        return "its levels are not -1, 0 and 1"
    if compute == "float" and scheme.activations is not None:
        return f"{scheme} rounds activations to int8"
    if scheme.activations is not None and scheme.group is None and shape[1] > multiply.MAX_EXACT_COLUMNS:
        return f"sums of more than {multiply.MAX_EXACT_COLUMNS} products may overflow"
    return multiply.unfit(scheme, shape, dtype, device)


def _prepare(compute: Compute, layout: Layout, scheme: Scheme, shape: Shape, tensors: Tensors) -> multiply.Matrix:
    activations = multiply.FLOATS
    if compute == "int8":
        activations = {None: multiply.BLOCKS, "token": multiply.TOKENS, "static": multiply.FIXED}[scheme.activations]
    spec = multiply.spec_of(scheme, shape, layout)
    zero, fixed = tensors.get("zero"), tensors.get("input_scale")
    return multiply.Matrix(tensors["codes"], tensors["scale"], zero, spec, activations, fixed)


def _run(
    engine: int,
    x: torch.Tensor,
    matrices: Sequence[multiply.Matrix],
    biases: Sequence[torch.Tensor | None],
    gelu: bool,
) -> list[torch.Tensor]:
    if x.dtype == torch.float64:  # which no engine has
        return [y.double() for y in _run(engine, x.float(), matrices, biases, gelu)]
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or _wants_gradients(x, biases):
        results = [
            multiply.OPERATOR(x, m.codes, m.scale, m.zero, bias, m.input_scale, *m.spec, engine, m.activations)
            for m, bias in zip(matrices, biases, strict=True)
        ]
        return [torch.nn.functional.gelu(y) for y in results] if gelu else results
    return multiply.multiply(x, matrices, biases, engine, gelu)


def _wants_gradients(x: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(b is not None and b.requires_grad for b in biases))
