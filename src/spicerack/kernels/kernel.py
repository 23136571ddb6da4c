"""How packed weights multiply: `Kernel`, a row of plain data, and `pick`, which chooses a row and can say why.

A file in `kernels/table/` declares its rows as KERNELS; nothing else names it. A kernel lays a QTensor out for itself
in memory (`pack`); that layout never reaches the disk, so no folder depends on a processor, and `unpack` gives the
QTensor back to whoever saves, merges or moves a model. What a weight goes through:

    QTensor -> pick -> pack -> tensors, the buffers of a module (nn.weight) -> prepare, once -> run, at each forward

The choice is made for each weight alone, by its scheme, its shape, the type of its inputs and the device: a row that
cannot run it says why (`obstacle`), and of those that can the fastest is taken. The reference, in torch, has no
obstacles but for types that are no floats; it is what the others are tested against, and the slowest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spicerack import plugins
from spicerack.errors import SchemeError, UsageError
from spicerack.kernels import panels
from spicerack.kernels.panels import Room, Staged
from spicerack.numerics.packed import Rows, Tensors
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Undecoded

Shape = tuple[int, int]
"""[N, K]: outputs, inputs."""

Compute = Literal["int8", "float"]
"""What weight-only schemes multiply with: activations rounded to int8 on the fly, in spans of 32, or floats.

A scheme that names its activations (a8) has them so with either."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to multiply by packed weights: data and functions that know each other's layout, and nothing else does.

    name     for people, and for `get`; no two rows share it
    speed    of the rows that run a weight, the one with the highest is taken; only the order counts, and no two are
             equal
    vector   it has vector instructions made for its activations
    compute  "int8" if it rounds the activations of weight-only schemes; such rows run only where that is asked for
    obstacle (scheme, [N, K], type of x, device) -> why it cannot run these, as the end of a sentence, or None if it
             can; the functions below are called with what has no obstacle only
    pack     QTensor [N, K], on any device -> tensors by name, in the kernel's own layout. They become buffers of a
             module: "rows", "shape" and other names that a PackedWeight has of its own are taken
    stage    (Undecoded [N, K] on the CPU, where its codes will be) -> the same tensors, which `panels.fill` fills from
             the stored bits, many matrices at once; None for kernels that take QTensors alone
    unpack   its exact inverse: (scheme, [N, K], tensors) -> QTensor, codes and scales bit for bit
    rows     (scheme, [N, K], tensors, rows) -> float32 [R, K], the chosen rows decoded, equal to `codec.decode`
    prepare  (scheme, [N, K], tensors) -> the weight as `run` takes it: made once for these tensors
    run      (x [..., K], weights as `prepare` made them, biases [N]) -> for each x W^T + b [..., N] in x's type;
             differentiable in x and b. All weights have the same K and activations
    engine   the instruction set of the CPU that it is compiled for; None where it is for no certain one
    """

    name: str
    speed: int
    vector: bool
    compute: Compute
    obstacle: Callable[[Scheme, Shape, torch.dtype, torch.device], str | None]
    pack: Callable[[QTensor], dict[str, torch.Tensor]]
    unpack: Callable[[Scheme, Shape, Tensors], QTensor]
    rows: Callable[[Scheme, Shape, Tensors, Rows], torch.Tensor]
    prepare: Callable[[Scheme, Shape, Tensors], Any]
    run: Callable[[torch.Tensor, Sequence[Any], Sequence[torch.Tensor | None]], list[torch.Tensor]]
    engine: str | None = None
    stage: Callable[[Undecoded, Room], Staged] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What `pick` chose.

    kernel        the one that will run
    passed_over   the faster ones, fastest first: name -> the reason, as the end of a sentence
    compute       as it was asked for, and asked again where the weight is moved to
    engine        the same of the instruction set
    """

    kernel: Kernel
    passed_over: dict[str, str]
    compute: Compute | None = None
    engine: str | None = None


def get(name: str) -> Kernel:
    """The kernel of this name ("int8_avx2", "reference" ...), whether or not this machine runs it. Raises KeyError."""
    return {kernel.name: kernel for kernel in table()}[name]


def table() -> list[Kernel]:
    """All kernels, fastest first, whether or not this machine runs them: the rows of every file in `kernels/table/`.

    The order is that of `Kernel.speed`, which is written down and not measured: a choice that depended on how busy a
    machine was could give one folder other numbers each time it is loaded.
    """
    files = (plugins.get("kernels.table", name, "KERNELS") for name in plugins.names("kernels.table"))
    return sorted((kernel for rows in files for kernel in rows), key=lambda kernel: -kernel.speed)


def check_engine(engine: str | None, device: str | torch.device = "cpu") -> None:
    """Raise UsageError for an engine that cannot compute on a device, and return for one that can.

    engine: a name, or None, which is always right. device: where the weights will be. The error names the engines of
    this processor; an engine is refused beside a GPU, because it is an instruction set of the CPU, and beside a name
    that torch does not know.
    """
    if engine is None:
        return
    panels.engine_index(engine)
    if str(device).partition(":")[0] != "cpu":
        raise UsageError(f"engine {engine} is an instruction set of CPUs, not of {device}", "leave one of them out")


def pick(
    scheme: Scheme,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    compute: Compute | None = None,
    engine: str | None = None,
) -> Choice:
    """The fastest kernel that runs a weight, and why each faster one does not.

    scheme   what the weight's numbers are
    shape    [N, K]
    dtype    the type of the inputs
    device   where they and the weight are
    compute  what weight-only schemes multiply with; None is int8 on a processor with vector instructions for it, else
             float
    engine   one of `panels.NAMES`: the choice is then that of a processor whose fastest engine it is

    Raises SchemeError, with every kernel's reason, if none runs it; UsageError for another `compute`, and for an
    `engine` that this processor has not.
    """
    if compute not in (None, "int8", "float"):
        raise UsageError(f"compute={compute!r}", 'use "int8" or "float"')
    check_engine(engine, device)
    faster = panels.NAMES[: panels.engine_index(engine)]
    passed_over: dict[str, str] = {}
    for kernel in table():
        reason = kernel.obstacle(scheme, shape, dtype, device)  # first: no other choice of compute would change it
        if reason is None and kernel.engine in faster:
            reason = f"computes with {kernel.engine}, and {engine} was asked for"
        if reason is None and kernel.compute == "int8" and scheme.activations is None:
            if compute == "float":
                reason = "rounds activations to int8, and float was asked for"
            elif compute is None and not kernel.vector:
                reason = "int8 is the default only with vector instructions for it"
        if reason is None:
            return Choice(kernel, passed_over, compute, engine)
        passed_over[kernel.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise SchemeError(f"no kernel runs {scheme} here: {reasons}", "use another scheme, or skip the layer")
