"""Layers that share an input: one call, the same bits, and nothing that the model's own code could notice."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.kernels import multiply as engines
from spicerack.nn.linear import QLinear
from spicerack.nn.shared import share_inputs
from spicerack.numerics import codec
from spicerack.numerics.scheme import parse


class Attention(nn.Module):
    """Query, key and value, read in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 96), nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.v_proj(x), self.q_proj(x), self.k_proj(x)], -1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call of the native module had."""
    counts: list[int] = []
    multiply = engines.multiply

    def counted(
        x: torch.Tensor, matrices: Sequence[engines.PanelMatrix], *rest: Any, **more: Any
    ) -> list[torch.Tensor]:
        counts.append(len(matrices))
        return multiply(x, matrices, *rest, **more)

    monkeypatch.setattr(engines, "multiply", counted)
    return counts


def attention(scheme: str = "w8") -> Attention:
    torch.manual_seed(0)
    small = spicerack.quantize(Attention(), scheme, compute="int8")
    assert isinstance(small, Attention)
    return small


def alone(model: Attention, x: torch.Tensor) -> torch.Tensor:
    """Each layer by a call of its own."""
    layers = (model.v_proj, model.q_proj, model.k_proj)
    with torch.no_grad():
        return torch.cat([layer.packed.forward(x, layer.bias) for layer in layers], -1)


@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w8a8", "w2g32h"])
def test_one_call_gives_the_same_bits(scheme: str, calls: list[int]) -> None:
    model, x = attention(scheme), torch.randn(3, 64)
    expected = alone(model, x)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(model(x), expected) and calls == [3]
        assert torch.equal(model(x), expected) and calls == [3, 3], "the same tensor again is a new call"


def test_a_tensor_that_was_written_into_is_another_input(calls: list[int]) -> None:
    model, x = attention(), torch.randn(3, 64)
    with torch.no_grad():
        model.q_proj(x)
        x.add_(1)
        assert torch.equal(model.k_proj(x), model.k_proj.packed.forward(x, model.k_proj.bias))
    assert model.q_proj.joined is None, "a result was for nothing"


def test_layers_that_read_different_inputs_part_after_one_try(calls: list[int]) -> None:
    model, x, y = attention(), torch.randn(3, 64), torch.randn(2, 64)
    with torch.no_grad():
        for _ in range(2):
            model.q_proj(x)
            assert torch.equal(model.k_proj(y), model.k_proj.packed.forward(y, model.k_proj.bias))
    assert calls[0] == 3 and set(calls[1:]) == {1}


def test_nothing_is_kept_once_all_have_theirs() -> None:
    model, x = attention(), torch.randn(3, 64)
    with torch.no_grad():
        model(x)
    shared = model.q_proj.joined
    assert shared is not None and shared._x is None and not shared._due


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_with_gradients_and_in_inference_mode_each_computes_for_itself(mode: Any, calls: list[int]) -> None:
    model = attention()
    with mode():
        x = torch.randn(3, 64)
        model(x)
    assert 3 not in calls and model.q_proj.joined is not None


def test_schemes_of_one_group_may_differ_but_not_their_activations() -> None:
    mixed = spicerack.quantize(Attention(), "w8", rules=["k_proj=w4g32"], compute="int8")
    assert mixed.q_proj.joined is mixed.k_proj.joined is not None
    rounded = spicerack.quantize(Attention(), "w8", rules=["k_proj=w8a8"], compute="int8")
    assert rounded.q_proj.joined is None


@pytest.mark.parametrize("scales", [(0.02, 0.02, 0.02), (0.02, 0.02, 0.03)])
def test_static_activations_are_shared_where_their_scale_is(scales: tuple[float, ...], calls: list[int]) -> None:
    model, x = Attention(), torch.randn(3, 64)
    for name, scale in zip(("q_proj", "k_proj", "v_proj"), scales, strict=True):
        q = codec.encode(getattr(model, name).weight.detach(), parse("w8a8s"))
        setattr(model, name, QLinear.of(dataclasses.replace(q, input_scale=torch.tensor([scale]))))
    share_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(x), alone(model, x))
    assert (model.q_proj.joined is not None) == (len(set(scales)) == 1)


def test_queries_of_cross_attention_stand_apart() -> None:
    model = nn.ModuleDict({"encoder_attn": attention()})
    for layer in model.modules():
        if isinstance(layer, QLinear):
            layer.joined = None
    share_inputs(model)
    crossed = model["encoder_attn"]
    assert crossed.q_proj.joined is None and crossed.k_proj.joined is crossed.v_proj.joined is not None


def test_copies_and_pickles_share_among_themselves(calls: list[int]) -> None:
    model, x = attention(), torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            calls.clear()
            assert torch.equal(other(x), expected) and calls == [3]
            assert other.q_proj.joined is not model.q_proj.joined


def test_a_language_model_fuses_its_projections_and_saves_as_before(calls: list[int], tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = spicerack.quantize(LlamaForCausalLM(config).eval(), "w8", compute="int8")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        fused = model(input_ids=ids).logits
        assert calls == [3, 1, 2, 1]
    spicerack.save(model, tmp_path / "out")
    again = spicerack.load(tmp_path / "out", compute="int8")
    calls.clear()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, fused) and calls == [3, 1, 2, 1]
