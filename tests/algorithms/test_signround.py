"""SignRound: nothing learned is round-to-nearest, one layer against exhaustive rounding, gradients by closed form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from spicerack.algorithms.descent import Forward, Layer
from spicerack.algorithms.solvers import signround
from spicerack.numerics import codec, rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse


def linear_case(scheme: str, n: int = 12, k: int = 32) -> tuple[nn.Linear, Layer, Forward, torch.Tensor]:
    """One layer, its inputs [16 sequences, 10 tokens, K], and a forward over them."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(k, n).requires_grad_(False)
    module.weight.copy_(torch.randn(n, k, generator=generator))
    x = torch.randn(16, 10, k // 2, generator=generator) @ torch.randn(k // 2, k, generator=generator) / k**0.5
    x = x + 0.2 * torch.randn(x.shape, generator=generator)
    wanted = module(x)
    exact = module.weight.detach().clone()

    def forward(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return module(x[list(numbers)]).flatten(0, 1), wanted[list(numbers)].flatten(0, 1)

    return module, Layer(module, exact, rounding.solve(exact, parse(scheme))), forward, x


def loss(q: QTensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (codec.decode(q) - weight).t()).square().mean())


@pytest.mark.parametrize(
    ("scheme", "share"),
    [("w4g16", 1), ("w2g16z", 0.8), ("w3g32", 0.95), ("w2g16h", 0.8), ("w4t", 0.8), ("ternary", 0.8)],
)
def test_the_output_is_nearer_and_never_farther(scheme: str, share: float) -> None:
    """On 160 tokens; steps of a fixed size are too coarse for 4 bits in small groups there."""
    module, layer, forward, x = linear_case(scheme)
    before = module.forward
    solved = signround.solve({"a": layer}, forward, 16)["a"].q
    assert module.forward == before and torch.equal(module.weight, layer.weight)
    assert loss(solved, layer.weight, x) <= share * loss(layer.start, layer.weight, x)
    assert solved.scale.dtype == layer.start.scale.dtype  # type: ignore[union-attr]


def test_no_step_is_round_to_nearest() -> None:
    _, layer, forward, _ = linear_case("w4g16")
    assert signround.solve({"a": layer}, forward, 16, steps=0)["a"].q is layer.start


def test_the_seed_decides() -> None:
    _, layer, forward, _ = linear_case("w3g16")
    again = [signround.solve({"a": layer}, forward, 16, steps=40, seed=s)["a"].q.codes for s in (3, 3, 4)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_between_round_to_nearest_and_the_best_of_all_roundings() -> None:
    """One output, 8 inputs, scale fixed by judging only codes: every up or down."""
    _, layer, forward, x = linear_case("w2", n=1, k=8)
    solved = signround.solve({"a": layer}, forward, 16, steps=400)["a"].q
    scale = float(solved.scale)  # type: ignore[arg-type]
    low = torch.floor(layer.weight / scale)
    best = min(
        float((x @ (scale * (low + torch.tensor(up)).clamp(-2, 1) - layer.weight).t()).square().mean())
        for up in itertools.product((0.0, 1.0), repeat=8)
    )
    mine = loss(solved, layer.weight, x)
    assert best * (1 - 1e-5) <= mine <= loss(layer.start, layer.weight, x)
    assert loss(layer.start, layer.weight, x) > best * 1.01, "there is something to learn"


def test_gradients_are_the_straight_through_ones() -> None:
    """dL/dv = s dL/dw and dL/da = sum s_0 (q - w / s) dL/dw inside the range; outside 0 and s_0 q."""
    _, layer, _, _ = linear_case("w3g16")
    assert isinstance(layer.start.scale, torch.Tensor)
    learned = signround._Learned(layer)
    learned.scale = learned.scale * 0.6  # so that some are clipped
    learned.dtype = torch.float32
    outer = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    (learned.decoded() * outer).sum().backward()
    scale = learned.scale.repeat_interleave(16, 1)
    u = layer.weight / scale
    q, inside = torch.round(u).clamp(-4, 3), (torch.round(u) >= -4) & (torch.round(u) <= 3)
    assert 0 < int((~inside).sum()) < inside.numel()
    assert learned.v.grad is not None and learned.a.grad is not None
    assert torch.allclose(learned.v.grad, torch.where(inside, scale * outer, 0), atol=1e-6)
    by_weight = scale * torch.where(inside, q - u, q) * outer
    assert torch.allclose(learned.a.grad, by_weight.reshape(12, 2, 16).sum(-1), atol=1e-4)
