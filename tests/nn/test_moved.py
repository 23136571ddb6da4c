"""A packed model on another device: laid out anew for the kernel that runs there, from the same codes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.errors import UsageError
from spicerack.kernels import panels
from spicerack.nn.weight import PackedWeight
from tests.pretending import DEVICE, Pretending

close = torch.testing.assert_close
SCHEMES = ["w8", "w4g32", "w4g32z", "w8a8", "nf4", "ternary", "q4_k"]


def net(scheme: str) -> nn.Module:
    layers = nn.Sequential(nn.Embedding(16, 256), nn.Linear(256, 32), nn.Linear(32, 256, bias=False))
    table = "w8" if scheme == "w8a8" else scheme  # tables have no activations
    return spicerack.quantize(layers, scheme, rules=[f"0={table}"], fit_groups=True)


def decoded(model: nn.Module) -> list[torch.Tensor]:
    return [weight.decode().cpu() for weight in model.modules() if isinstance(weight, PackedWeight)]


def kernels(model: nn.Module) -> list[str]:
    return [weight.choice.kernel.name for weight in model.modules() if isinstance(weight, PackedWeight)]


@pytest.mark.filterwarnings("ignore:groups do not tile")
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_moved_model_is_laid_out_for_the_kernel_that_runs_there(scheme: str) -> None:
    model = net(scheme)
    ids = torch.arange(12).view(3, 4)
    before, weights, chosen = model(ids), decoded(model), kernels(model)
    with Pretending():
        model.to(DEVICE)
        assert set(kernels(model)) == {"reference"}
        assert all(buffer.device == DEVICE for buffer in model.buffers())
        there = model(ids.to(DEVICE)).cpu()
        model.to("cpu")
    close(there, before, atol=0.02 * float(before.abs().max()), rtol=0)  # kernels of the CPU may round activations
    assert kernels(model) == chosen  # and back
    assert all(torch.equal(a, b) for a, b in zip(decoded(model), weights, strict=True))
    assert torch.equal(model(ids), before)


def test_an_instruction_set_that_was_asked_for_holds_again_on_the_cpu() -> None:
    q = net("w4g32")[1].packed.qtensor()
    weight = PackedWeight(q, compute="float", engine=panels.NAMES[-1])
    name = weight.choice.kernel.name
    with Pretending():
        assert weight.to(DEVICE).choice.kernel.name == "reference"
        assert weight.to("cpu").choice.kernel.name == name


def test_layers_that_are_tied_stay_so_when_they_are_moved() -> None:
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 16, bias=False))
    model[1].weight = model[0].weight
    small = spicerack.quantize(model, "w8", rules=["0=w8"])
    with Pretending():
        small.to(DEVICE)
        assert small[0].packed is small[1].packed
        small.to(dtype=torch.float16)
        assert small[0].weight.dtype == torch.float16 and small[0].weight.device == DEVICE


def test_an_optimizer_of_the_biases_keeps_them() -> None:
    small = net("w8")
    with Pretending():
        small.to(DEVICE)
        assert [name for name, _ in small.named_parameters()] == ["1.bias"]


def test_copies_of_a_moved_model_compute() -> None:
    small = net("w8")
    ids = torch.arange(4)
    before = small(ids)
    with Pretending():
        back = small.to(DEVICE).to("cpu")
    assert torch.equal(copy.deepcopy(back)(ids), before)
    back.load_state_dict(net("w8").state_dict())


def language() -> tuple[nn.Module, torch.Tensor]:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval(), torch.zeros((2, 5), dtype=torch.int64)


def convolved() -> tuple[nn.Module, torch.Tensor]:
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=16)
    return GPT2Model(config).eval(), torch.zeros((2, 5), dtype=torch.int64)


def pictures() -> tuple[nn.Module, torch.Tensor]:
    layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 8))
    return layers, torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("build", [language, convolved, pictures])
@pytest.mark.parametrize("scheme", ["w8", "w4g32", "w8a8", "nf4"])
@torch.no_grad()
def test_on_meta_a_packed_model_computes_shapes(
    build: Callable[[], tuple[nn.Module, torch.Tensor]], scheme: str
) -> None:
    model, x = build()
    table = [f"{name}=w8" for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)][:1]
    rules = [*table, *(["0=w8"] if build is pictures else [])]
    small = spicerack.quantize(model, scheme, rules=rules)
    expected = small(x)
    there = small.to("meta")(x.to("meta"))
    expected, there = (y if isinstance(y, torch.Tensor) else y[0] for y in (expected, there))
    assert (there.shape, there.dtype, there.device.type) == (expected.shape, expected.dtype, "meta")


def test_what_went_to_meta_comes_back_with_its_state() -> None:
    small, ids = net("w4g32"), torch.arange(4)
    state, before = small.state_dict(), small(ids)
    small.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(small(ids), before)


def test_what_is_on_meta_has_no_codes_to_lay_out_elsewhere() -> None:
    small = net("w8").to("meta")
    with Pretending(), pytest.raises(UsageError, match=r"meta.*no codes to lay out for lazy.*load the folder there"):
        small.to_empty(device=DEVICE)
