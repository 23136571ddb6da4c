"""Fake quantization: forward against the codec and torch, gradients against torch's learnable one and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack.numerics import codec
from spicerack.numerics.activations import quantize_tokens
from spicerack.numerics.fake import Grid, fake, fake_linear, fake_tokens, rounded, stored
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import parse
from spicerack.training.qat.fake_layers import FakeLayer, Quantizer
from spicerack.training.qat.prepare import QATConfig, prepare_qat

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def prepared(layer: nn.Module, scheme: str, quantizer: Quantizer | None = None) -> FakeLayer:
    twin = prepare_qat(layer, scheme, config=QATConfig(quantizer))
    assert isinstance(twin, FakeLayer)
    return twin


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scheme", ["w8", "w4g32", "w4g16z", "w3t", "w2g32h", "w2g32z", "ternary"])
def test_learned_scales_begin_as_the_codec_has_them(scheme: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 24).to(dtype)
    layer = prepared(linear, scheme, "lsq")
    expected = codec.encode(linear.weight.detach(), parse(scheme))
    q = layer.qtensor("layer")
    assert torch.equal(q.codes, expected.codes) and q.codes.dtype == expected.codes.dtype
    assert isinstance(q.scale, torch.Tensor) and isinstance(expected.scale, torch.Tensor)
    assert torch.equal(q.scale, expected.scale) and q.scale.dtype == expected.scale.dtype
    assert expected.zero is None or (q.zero is not None and torch.equal(q.zero, expected.zero))
    assert torch.equal(layer.rounded_weight(), codec.decode(expected))


@pytest.mark.parametrize("scheme", ["w8", "w4g32", "w4g16z", "w2g32h", "ternary"])
def test_absmax_follows_the_weights_as_the_codec_does(scheme: str) -> None:
    layer = prepared(nn.Linear(64, 24), scheme, "absmax")
    assert layer.weight_scale is None
    for _ in range(2):
        expected = codec.encode(layer.weight.detach(), parse(scheme), range_="absmax")
        assert torch.equal(layer.rounded_weight(), codec.decode(expected))
        nn.init.normal_(layer.weight, std=0.3)


@pytest.mark.parametrize(("bits", "zero"), [(8, False), (4, False), (4, True), (2, True)])
def test_forward_and_gradient_are_torchs(bits: int, zero: bool) -> None:
    """Rows with a scale each, some weights clipped; torch clips where rounding would leave the levels."""
    levels = IntLevels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    w = torch.randn(6, 40, requires_grad=True)
    scale = torch.rand(6, 1) / 2 ** (bits - 2) + 0.01
    z = torch.randint(levels.lo, levels.hi + 1, (6, 1)).float() if zero else None
    points = torch.zeros(6) if z is None else z[:, 0]
    theirs = torch.fake_quantize_per_channel_affine(w, scale[:, 0], points.int(), 0, levels.lo, levels.hi)
    ours = fake(w, (scale, z), Grid(levels, (1, 40), "cells"))
    assert torch.equal(ours, theirs) and not torch.equal(ours, w)
    outer = torch.randn(6, 40)
    [by_ours], [by_theirs] = torch.autograd.grad(ours, w, outer), torch.autograd.grad(theirs, w, outer)
    assert torch.equal(by_ours, by_theirs) and 0 < int((by_ours == 0).sum()) < w.numel()


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_of_scales_and_zero_points_are_torchs() -> None:
    levels = IntLevels(-4, 3)
    w = torch.randn(5, 16, requires_grad=True)
    scale, z = torch.rand(5, 1) * 0.3 + 0.1, torch.tensor([-4.0, -1.0, 0.0, 2.0, 3.0])[:, None]
    scale.requires_grad_()
    z.requires_grad_()
    outer = torch.randn(5, 16)
    grid = Grid(levels, (1, 16), "cells")
    mine = torch.autograd.grad(fake(w, (scale, rounded(z, levels)), grid), (w, scale, z), outer)
    s, p = scale.detach()[:, 0].clone().requires_grad_(), z.detach()[:, 0].clone().requires_grad_()
    factor = 1 / math.sqrt(16 * 7)
    theirs = torch._fake_quantize_learnable_per_channel_affine(w, s, p, 0, -4, 3, factor)
    for ours, other in zip(mine, torch.autograd.grad(theirs, (w, s, p), outer), strict=True):
        assert torch.allclose(ours.reshape(other.shape), other, atol=1e-6)
        assert other.abs().max() > 0.01


@pytest.mark.parametrize(
    ("clip", "w", "by_weight", "by_scale"),
    [  # s = 1/2, levels -2..1, one weight in the group: the factor is 1
        ("levels", 0.2, 1, 0 - 0.4), ("levels", 0.3, 1, 1 - 0.6), ("levels", -0.9, 1, -2 + 1.8),
        ("levels", 0.6, 0, 1), ("levels", 0.8, 0, 1), ("levels", -1.1, 0, -2), ("levels", -9.0, 0, -2),
        ("cells", 0.6, 1, 1 - 1.2), ("cells", 0.8, 0, 1), ("cells", -1.1, 1, -2 + 2.2), ("cells", -1.3, 0, -2),
    ],
)  # fmt: skip
def test_the_piecewise_formula(clip: str, w: float, by_weight: float, by_scale: float) -> None:
    weight, scale = torch.tensor([[w]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    fake(weight, (scale, None), Grid(IntLevels(-2, 1), (1, 1), clip)).backward()  # type: ignore[arg-type]
    assert weight.grad is not None and float(weight.grad) == by_weight
    assert scale.grad is not None and float(scale.grad) == pytest.approx(by_scale, abs=1e-6)


def test_the_stretched_grid_is_paretoqs() -> None:
    """n = 2, t = 1/2: levels +-alpha/4 and +-3 alpha/4, gradient of alpha by their formula, and 1 up to +-alpha."""
    alpha, n, t = 0.8, 2.0, 0.5
    w = (torch.rand(1, 4000) * 2.4 - 1.2).requires_grad_()
    inside = (w / alpha).abs() < 1
    q = (torch.round(n * (w / alpha).clamp(-0.99, 0.99) - t) + t) / n
    scale = torch.tensor([[alpha / n]], requires_grad=True)
    ours = fake(w, (scale, None), Grid(IntLevels(-2, 1, half=True), (1, 4000), "cells"))
    assert torch.allclose(ours, alpha * q, atol=1e-6)
    by_weight, by_scale = torch.autograd.grad(ours.sum(), (w, scale))
    assert torch.equal(by_weight, inside.float())
    by_alpha = torch.where(inside, q - w / alpha, q.abs().max() * w.sign())
    assert float(by_scale) == pytest.approx(float(by_alpha.sum().detach()) * n / math.sqrt(4000 * 1.5), abs=1e-3)


def test_clipped_weights_by_finite_differences() -> None:
    """There w^ is linear in s, and the gradient the true one."""
    w = torch.where(torch.randn(3, 8) > 0, 5.0, -5.0)
    grid = Grid(IntLevels(-2, 1), (1, 4), "levels")
    scale = torch.rand(3, 2) + 0.5
    scale.requires_grad_()
    outer = torch.randn(3, 8)
    [by_scale] = torch.autograd.grad(fake(w, (scale, None), grid), scale, outer)
    for place in [(0, 0), (2, 1)]:
        ends = []
        for sign in (-1, 1):
            moved = scale.detach().clone()
            moved[place] += sign * 0.25
            ends.append(float((fake(w, (moved, None), grid) * outer).sum()))
        assert float(by_scale[place]) == pytest.approx((ends[1] - ends[0]) / 0.5 * grid.factor(False), rel=1e-4)


@pytest.mark.parametrize("scheme", ["w4g16", "w2g32z", "w2g16h", "ternary", "w4t"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_linear_layer_is_the_product_with_the_rounded_weight(kind: type[nn.Module], scheme: str) -> None:
    """All gradients as autograd finds them where rounding and multiplying are two steps."""
    layer = prepared(nn.Linear(64, 24) if kind is nn.Linear else Conv1D(24, 64), scheme, "seq")
    assert layer.weight_scale is not None
    layer.weight_scale.data.mul_(0.7)  # some are clipped
    x, outer = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 24)
    variables = [x, *layer.parameters()]
    one = torch.autograd.grad(layer(x), variables, outer)
    two = torch.autograd.grad(nn.functional.linear(x, layer.rounded_weight(), layer.bias), variables, outer)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, two, strict=True))
    assert all(g.abs().max() > 0 for g in one)


def test_inputs_and_biases_by_finite_differences() -> None:
    w, parts = torch.randn(6, 8), (torch.rand(6, 2) + 0.1, None)
    x, bias = torch.randn(2, 3, 8).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    grid = Grid(IntLevels(-4, 3), (1, 4))
    assert torch.autograd.gradcheck(lambda x, b: fake_linear(x, w, parts, b, grid), (x, bias))


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    layer = prepared(nn.Linear(256, 128), "w4g32a8")
    x = torch.randn(4, 256, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    del kept[x.untyped_storage().data_ptr()], kept[layer.weight.untyped_storage().data_ptr()]
    assert max(kept.values()) <= 128 * 256 // 32
    y.sum().backward()


# ---- scales as stored, activations -----------------------------------------------------------------------------------


def test_scales_are_the_ones_that_are_stored() -> None:
    wanted = torch.tensor([0.1, -0.1, 0.0, -0.0, 1e-9, -1e-9, 3e-8, 7.0], requires_grad=True)
    scales = stored(wanted, torch.float16)
    smallest = 2.0**-24
    assert torch.equal(scales[:2], torch.tensor([0.1, -0.1]).half().float())
    assert scales[2:].tolist() == [smallest, -smallest, smallest, -smallest, smallest, 7.0]
    scales.sum().backward()
    assert wanted.grad is not None and torch.equal(wanted.grad, torch.ones(8))
    assert stored(torch.tensor([0.1]), torch.bfloat16).item() == torch.tensor(0.1).bfloat16().item()


def test_a_scale_of_zero_is_left_behind() -> None:
    """All weights are clipped there, and the gradient leads away from it."""
    layer = prepared(nn.Linear(32, 8), "w4g32", "lsq")
    assert layer.weight_scale is not None
    layer.weight_scale.data.zero_()
    wanted = layer.weight.detach().clone()
    optimizer = torch.optim.Adam([layer.weight_scale], 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer.rounded_weight() - wanted).square().sum()
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02 * float(wanted.square().sum())


@pytest.mark.parametrize("dtype", TYPES)
def test_activations_are_rounded_as_the_kernels_do(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 64).to(dtype)
    x[1, 2] = 0
    codes, scale = quantize_tokens(x.float())
    assert torch.equal(fake_tokens(x), (codes * scale).to(dtype))
    layer = prepared(nn.Linear(64, 16).to(dtype), "w8a8")
    x.requires_grad_()
    [by_x] = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(by_x.float(), layer.rounded_weight().to(dtype).float().sum(0).expand_as(x), atol=2e-2)
