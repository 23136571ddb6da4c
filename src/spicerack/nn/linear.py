"""`QLinear` and `QConv1D`: nn.Linear and transformers' Conv1D with packed weights, computed by the kernel they are
packed for.

The layer itself computes nothing: it hands x to its weight. A forward costs microseconds beside the product, which
small models notice, so that attributes are looked up as plainly as torch allows.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack.kernels.kernel import Compute
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.qtensor import QTensor


class _Product(PackedLayer):
    """What both are: x [..., K] -> x W^T + b [..., N]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed: PackedWeight = self._modules["packed"]  # type: ignore[assignment]  # attributes of modules are slow
        return packed.forward(x, self._parameters["bias"])


class QLinear(_Product, nn.Linear):  # type: ignore[misc]  # its weight is no attribute
    """y = x W^T + b for x [..., K] -> y [..., N], in x's type; differentiable in x and b, not in W.

    packed   the weight [N, K]
    bias     [N], or None

    How x enters, as floats or rounded to int8, is the
    kernel's business, and so is on which device it runs.
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed, bias)
        self.out_features, self.in_features = packed.shape

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


class QConv1D(_Product, Conv1D):  # type: ignore[misc]  # as above
    """GPT-2's layer: the same product as a `QLinear`, of a weight that the float layer has as [K, N].

    packed   the weight [N, K], transposed
    bias     [N], or None
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed, bias)
        self.nf, self.nx = packed.shape

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"
