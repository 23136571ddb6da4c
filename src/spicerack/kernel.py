"""How packed weights multiply: `Kernel`, a row of plain data, and `pick`, which chooses a row and can say why.

A kernel is one file in `kernels/`. It lays a QTensor out for itself in memory; that layout never reaches the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spicerack import registry
from spicerack.errors import SchemeError
from spicerack.packed import Rows, Tensors
from spicerack.qtensor import QTensor
from spicerack.scheme import Scheme

Shape = tuple[int, int]
"""[N, K]: outputs, inputs."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """
    fits    (scheme, [N, K], type of x, device) -> why it cannot run these, or None if it can
    pack    QTensor [N, K] -> tensors by name, in the kernel's own layout
    unpack  its exact inverse: (scheme, [N, K], tensors) -> QTensor
    rows    (scheme, [N, K], tensors, rows) -> float32 [R, K], the chosen rows decoded
    run     (x [..., K], scheme, [N, K], tensors) -> x W^T [..., N] in x's type; differentiable in x
    """

    name: str
    fits: Callable[[Scheme, Shape, torch.dtype, torch.device], str | None]
    pack: Callable[[QTensor], dict[str, torch.Tensor]]
    unpack: Callable[[Scheme, Shape, Tensors], QTensor]
    rows: Callable[[Scheme, Shape, Tensors, Rows], torch.Tensor]
    run: Callable[[torch.Tensor, Scheme, Shape, Tensors], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that will run, and the ones passed over: name -> reason."""

    kernel: Kernel
    passed_over: dict[str, str]


def get(name: str) -> Kernel:
    """The kernel in `kernels/<name>.py`; KeyError if there is no such file."""
    found: Kernel = registry.get("kernels", name, "KERNEL")
    return found


def pick(scheme: Scheme, shape: Shape, dtype: torch.dtype, device: torch.device) -> Choice:
    """The first kernel that fits; the reference, which runs everything it can anywhere, is asked last.

    Raises SchemeError if none fits.
    """
    passed_over: dict[str, str] = {}
    for name in sorted(registry.names("kernels"), key=lambda name: (name == "reference", name)):
        kernel = get(name)
        reason = kernel.fits(scheme, shape, dtype, device)
        if reason is None:
            return Choice(kernel, passed_over)
        passed_over[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise SchemeError(f"no kernel runs {scheme} here: {reasons}", "use another scheme, or skip the layer")
