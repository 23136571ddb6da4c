"""GELU in the layer before it: the same values, and only where that layer's own result reaches it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation

import spicerack
from spicerack.nn.gelu import JoinedGELU
from spicerack.nn.linear import QLinear

gelu = torch.nn.functional.gelu


class Intermediate(nn.Module):
    """As in BERT."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(64, 96), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.intermediate_act_fn(self.dense(x))
        return y


class Between(nn.Module):
    """Something stands between the layer and the activation, and the activation is called for others."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation_fn, self.between = nn.Linear(64, 96), nn.Linear(96, 32), nn.GELU(), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.activation_fn(self.fc2(self.activation_fn(self.between(self.fc1(x)))))
        return y


def quantized(module: nn.Module, scheme: str = "w8") -> Any:
    torch.manual_seed(0)
    return spicerack.quantize(module, scheme, compute="int8")


def plain(layer: QLinear, x: torch.Tensor) -> torch.Tensor:
    return layer.packed.forward(x, layer.bias)


@pytest.mark.parametrize("scheme", ["w8", "w8a8", "w4g32z", "ternary", "nf4"])
@pytest.mark.parametrize("activation", [GELUActivation(), GELUActivation(use_gelu_python=True), nn.GELU()])
@torch.no_grad()
def test_joined_from_the_second_call_on(scheme: str, activation: nn.Module) -> None:
    model = quantized(Intermediate(copy.deepcopy(activation)), scheme)
    assert isinstance(model.intermediate_act_fn, JoinedGELU)
    for call in range(3):
        x = torch.randn(5, 64)
        want = gelu(plain(model.dense, x))
        assert ((model(x) - want).abs() <= 4e-7 * want.abs().clamp(min=1)).all()
        assert model.dense.joined.applies, f"call {call}"
    assert torch.equal(model.dense(x), model.dense.packed.forward(x, model.dense.bias, True)), "where it is computed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rounded_once_to_half_precision(dtype: torch.dtype) -> None:
    model, x = quantized(Intermediate(GELUActivation()).to(dtype)), torch.randn(5, 64).to(dtype)
    model(x)
    want = gelu(model.dense.packed.forward(x.float(), model.dense.bias.float()))
    assert ((model(x).float() - want).abs() <= torch.finfo(dtype).eps * want.abs() / 2 + 1e-6).all()


@torch.no_grad()
def test_not_joined_if_something_stands_between() -> None:
    for between in (nn.LayerNorm(96), lambda y: y + 1, lambda y: y.add_(1), lambda y: y[..., :]):
        model = quantized(Between(between)).eval()
        for _ in range(3):
            x = torch.randn(4, 64)
            want = gelu(plain(model.fc2, gelu(between(plain(model.fc1, x)))))
            assert torch.equal(model(x), want)
        assert not model.fc1.joined.applies


@torch.no_grad()
def test_an_activation_of_two_layers_joins_only_the_one_that_is_named() -> None:
    model = quantized(Between(lambda y: y))
    for _ in range(3):
        x = torch.randn(4, 64)
        want = gelu(plain(model.fc2, gelu(plain(model.fc1, x))))
        assert (model(x) - want).abs().max() < 1e-5
    assert model.fc1.joined.applies and model.fc2.joined is None


def test_gradients_pass_through() -> None:
    model = quantized(Intermediate(GELUActivation()))
    with torch.no_grad():
        model(torch.randn(2, 64))  # joined
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    own = x.detach().requires_grad_()
    gelu(plain(model.dense, own)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, own.grad)


@torch.no_grad()
def test_compiled_and_in_inference_mode() -> None:
    model, x = quantized(Intermediate(GELUActivation())), torch.randn(3, 64)
    want = gelu(plain(model.dense, x))
    with torch.inference_mode():
        assert torch.equal(model(x), want) and torch.equal(model(x + 0), want)
    assert not model.dense.joined.applies
    model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), want)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x), want)
    torch.compiler.reset()


@torch.no_grad()
def test_copies_and_threads() -> None:
    model = quantized(Intermediate(GELUActivation()))
    x = torch.randn(3, 64)
    model(x)
    again = copy.deepcopy(model)
    assert again.dense.joined is not model.dense.joined and torch.equal(again(x), model(x))
    want, wrong = model(x), []

    def many() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(200) if not torch.equal(model(x), want))

    workers = [threading.Thread(target=many) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_other_activations_stay() -> None:
    for activation in (nn.GELU("tanh"), nn.ReLU(), nn.SiLU()):
        model = quantized(Intermediate(activation))
        assert type(model.intermediate_act_fn) is type(activation) and model.dense.joined is None
