"""A layer that learns its codes by what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from spicerack.algorithms.descent import Forward, Tunable
from spicerack.numerics import codec, rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse


def linear_case(
    scheme: str, n: int = 12, k: int = 32, seed: int = 0
) -> tuple[nn.Linear, Tunable, Forward, torch.Tensor]:
    """One layer, its inputs [16 sequences, 10 tokens, K], and a forward over them."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(k, n).requires_grad_(False)
    module.weight.copy_(torch.randn(n, k, generator=generator))
    x = torch.randn(16, 10, k // 2, generator=generator) @ torch.randn(k // 2, k, generator=generator) / k**0.5
    x = x + 0.2 * torch.randn(x.shape, generator=generator)
    wanted = module(x)
    exact = module.weight.detach().clone()

    def forward(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return module(x[list(numbers)]).flatten(0, 1), wanted[list(numbers)].flatten(0, 1)

    return module, Tunable(module, exact, rounding.to_nearest(exact, parse(scheme))), forward, x


def loss(q: QTensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (codec.decode(q) - weight).t()).square().mean())
