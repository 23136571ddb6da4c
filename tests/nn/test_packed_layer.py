"""A packed layer is a layer: x W^T + b, whoever calls it, however it is watched, whatever it is called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import spicerack
from spicerack.errors import ShapeError, UsageError
from spicerack.nn.linear import QLinear

# patches are made by a convolution, which in a model as narrow as this is much of the weights
MADE_OF_PATCHES = pytest.mark.filterwarnings("ignore:.*of the weights in matrices stay in float")
close = torch.testing.assert_close
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.arange(2, 20).view(2, 9)
    return BertModel(BertConfig(vocab_size=64, **SIZES)).eval(), {"input_ids": ids}


def llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)).eval(), {"input_ids": torch.arange(2, 20).view(2, 9)}


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).eval()
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


MODELS = [bert, llama, pytest.param(vit, marks=MADE_OF_PATCHES)]


def packed(model: nn.Module) -> dict[str, QLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}


def product(layer: QLinear, x: torch.Tensor) -> torch.Tensor:
    """What a layer is: by torch, with the decoded weight."""
    return nn.functional.linear(x, layer.packed.decode(), layer.bias)


class Adapted(nn.Module):
    """A wrapper as adapters are: the layer's own result, and something more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x) * 1.0
        return result


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_layer_returns_its_product_whoever_asks(build: Any, mode: Any) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    small = spicerack.quantize(model, "w8", compute="float")
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    with mode():
        for _ in range(3):  # the first call must not teach a layer anything
            small(**inputs)
        for name, layer in packed(small).items():
            x = torch.randn(5, layer.in_features)
            close(layer(x), product(layer, x))
            layer.register_forward_hook(lambda _m, args, y, name=name: calls.append((name, args[0].clone(), y.clone())))
        small(**inputs)
    assert len(calls) >= len(packed(small)) - 1, "a pooler may not be called"
    for name, x, y in calls:
        close(y, product(small.get_submodule(name), x))


@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_hooks_and_wrappers_that_change_nothing_change_nothing(build: Any) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    small = spicerack.quantize(model, "w8", compute="float")
    small(**inputs)
    expected = small(**inputs)[0]
    handles = [layer.register_forward_hook(lambda _m, _args, y: y + 0.0) for layer in packed(small).values()]
    close(small(**inputs)[0], expected)
    for handle in handles:
        handle.remove()
    for name, layer in packed(small).items():
        small.set_submodule(name, Adapted(layer))
    close(small(**inputs)[0], expected)


@torch.no_grad()
def test_inputs_that_are_written_into_unseen_are_other_inputs() -> None:
    """Through `data` or numpy, which torch does not count."""
    attention = llama()[0].model.layers[0].self_attn
    small, x = spicerack.quantize(attention, "w8", compute="float"), torch.randn(3, 64)
    small.q_proj(x)
    x.data.mul_(2)
    close(small.k_proj(x), product(small.k_proj, x))
    x.numpy()[:] = 1
    close(small.v_proj(x), product(small.v_proj, x))


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w8a8", "nf4"])
@torch.no_grad()
def test_inputs_of_any_form(scheme: str, compute: Any) -> None:
    torch.manual_seed(0)
    layer = spicerack.quantize(nn.Linear(64, 48), scheme, compute=compute)
    x = torch.randn(2, 3, 5, 64)
    expected = layer(x.reshape(-1, 64)).view(2, 3, 5, 48)
    close(layer(x), expected)
    close(layer(x.transpose(0, 2)), expected.transpose(0, 2))
    close(layer(torch.stack([x, x], -1)[..., 0]), expected)
    close(layer(x[0, 0, 0]), expected[0, 0, 0])
    for shape in ((0, 64), (2, 0, 64), (0, 3, 64)):
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 48)
    with torch.inference_mode():
        close(layer(x), expected)
        close(layer(x.clone()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer(x).float(), expected, atol=0.05, rtol=0.05)


X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
TRANSFORMS: dict[str, Any] = {
    "trace": lambda layer, x: torch.jit.trace(layer, x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "grad": lambda layer, x: torch.func.grad(lambda y: layer(y).sum())(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_what_would_compute_something_else_is_refused(transform: str, mode: Any) -> None:
    """A trace would return uninitialized memory, and a derivative in the forward direction zero."""
    layer = spicerack.quantize(nn.Linear(64, 48), "w8")
    with mode(), pytest.raises(UsageError, match="packed layers cannot be"):
        TRANSFORMS[transform](layer, X)


def test_dual_numbers_are_refused() -> None:
    layer = spicerack.quantize(nn.Linear(64, 48), "w8")
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(UsageError, match="forward direction"):
            layer(dual)
    assert torch.equal(layer(X), layer(X.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_a_packed_table_takes_integers(dtype: torch.dtype) -> None:
    table = spicerack.quantize(nn.Embedding(48, 64), "w8")
    with pytest.raises(ShapeError, match="takes integers"):
        table(torch.ones(3).to(dtype))
    assert torch.equal(table(torch.ones(3, dtype=torch.uint8)), table(torch.ones(3, dtype=torch.int64)))
