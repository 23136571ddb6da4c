"""Kernels on panels: rows of the table that differ in engine and in how activations enter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from spicerack import engines
from spicerack.kernel import Compute, Kernel, Operand, Shape
from spicerack.scheme import Scheme


def kernel(compute: Compute, engine: str, *, speed: int) -> Kernel:
    """The row for `compute` on the engine of that name, which this processor need not have."""
    index = engines.NAMES.index(engine) if engine in engines.NAMES else -1  # which never fits
    return Kernel(
        name=f"{compute}_{engine}",
        speed=speed,
        vector=engine != "scalar",
        compute=compute,
        fits=partial(_fits, compute, engine),
        pack=engines.pack,
        unpack=engines.unpack,
        rows=engines.rows,
        run=partial(_run, compute, index),
    )


def _fits(
    compute: Compute, engine: str, scheme: Scheme, shape: Shape, dtype: torch.dtype, device: torch.device
) -> str | None:
    if engine not in engines.NAMES:
        return f"this processor, or this build, has no {engine}"
    if compute == "float" and scheme.activations is not None:
        return f"{scheme} rounds activations to int8"
    if scheme.activations is not None and scheme.group is None and shape[1] > engines.MAX_EXACT_COLUMNS:
        return f"sums of more than {engines.MAX_EXACT_COLUMNS} products may overflow"
    return engines.unfit(scheme, shape, dtype, device)


def _run(compute: Compute, engine: int, x: torch.Tensor, operands: Sequence[Operand]) -> list[torch.Tensor]:
    activations = engines.FLOATS
    if compute == "int8":
        activations = engines.BLOCKS if operands[0].scheme.activations is None else engines.TOKENS
    plain = [
        engines.Operand(o.tensors["codes"], o.tensors["scale"], o.tensors.get("zero"), o.bias, _spec(o))
        for o in operands
    ]
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or _wants_gradients(x, operands):
        return [engines.OPERATOR(x, *o[:4], *o.spec, engine, activations) for o in plain]
    if x.dtype not in engines.TYPES:
        return [y.to(x.dtype) for y in engines.multiply(x.float(), plain, engine, activations)]
    return engines.multiply(x, plain, engine, activations)


def _spec(operand: Operand) -> engines.Spec:
    return engines.spec_of(operand.scheme, operand.shape)


def _wants_gradients(x: torch.Tensor, operands: Sequence[Operand]) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or any(o.bias is not None and o.bias.requires_grad for o in operands)
    )
