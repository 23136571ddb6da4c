"""`QStack`: the experts of a mixture, packed, where transformers keeps one 3-D parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from spicerack.nn.packed import PackedWeight


class FloatWeight(nn.Module):
    """An expert's matrix that stayed in float."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def decode(self) -> torch.Tensor:
        """The matrix itself."""
        return self.weight


class QStack(nn.Module):
    """Stands for a parameter [E, N, K] in transformers' eager loop over experts, which takes one of them at a time.

    experts: for each expert the matrices whose rows make up its [N, K] in order, such as gate and up.
    """

    def __init__(self, experts: Sequence[Sequence[PackedWeight | FloatWeight]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor:
        """[N, K]: one expert's matrix, decoded."""
        parts = self.experts[int(index)]
        assert isinstance(parts, nn.ModuleList)
        decoded = [part.decode() for part in parts if isinstance(part, (PackedWeight, FloatWeight))]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)
