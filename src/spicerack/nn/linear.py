"""`QLinear`: nn.Linear, or transformers' Conv1D, with packed weights, computed by the kernel they are packed for.

The layer itself computes nothing: it hands x to its weight, or to what joins it with other layers. A forward costs
microseconds beside the product, which small models notice, so that attributes are looked up as plainly as torch allows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from spicerack.kernels.kernel import Compute
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.qtensor import QTensor


class Joined(Protocol):
    """What computes a layer's result where the layer is one of several that are worth computing together.

    `shared.SharedInput` and `gelu.Producer` do; a layer has at most one of them.
    """

    def forward(self, layer: QLinear, x: torch.Tensor) -> torch.Tensor:
        """x [..., K], a plain tensor of ordinary (not inference) mode -> what `layer` makes of it, [..., N]."""


class QLinear(PackedLayer):
    """y = x W^T + b for x [..., K] -> y [..., N], in x's type; differentiable in x and b, not in W.

    packed   the weight [N, K]
    bias     [N], or None

    A Conv1D computes the same: its weight is only stored as [K, N]. How x enters, as floats or rounded to int8, is the
    kernel's business, and so is on which device it runs. joined: set by `fused.fuse`.
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed, bias)
        self.out_features, self.in_features = packed.shape
        self.joined: Joined | None = None

    @classmethod
    def of(
        cls,
        q: QTensor,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        compute: Compute | None = None,
    ) -> QLinear:
        """The layer with weight q [N, K], on `device`.

        dtype: of the float weight that it replaces. compute: as in `load`. Raises SchemeError if no kernel runs the
        scheme there.
        """
        return cls(PackedWeight(q, dtype, device, compute), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.joined is not None and _may_join(x):
            return self.joined.forward(self, x)
        packed: PackedWeight = self._modules["packed"]  # type: ignore[assignment]  # attributes of modules are slow
        return packed.forward(x, self._parameters["bias"])


def _may_join(x: torch.Tensor) -> bool:
    """Whether a result may be computed together with others: for plain tensors, untraced and without gradients.

    Writes into tensors of inference mode are not counted and would go unnoticed, so that there each computes for
    itself.
    """
    return (
        type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not x.is_inference()
    )
