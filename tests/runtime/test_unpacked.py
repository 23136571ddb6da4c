"""Packed models that train on with their weights: they begin where they were, and end as any other does."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
from nets import IDS, SCHEMES, small_net, tiny, train
from torch import nn

import spicerack
from spicerack import QATConfig
from spicerack.errors import SchemeError, UsageError
from spicerack.nn.conv import QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.linear import QConv1D, QLinear
from spicerack.training.qat.fake_layers import FakeLayer

PACKED = QLinear | QConv1D | QEmbedding | QConv2d


def same(before: nn.Module, after: nn.Module) -> None:
    names = [name for name, part in before.named_modules() if isinstance(part, PACKED)]
    assert names
    for name in names:
        a, b = (model.get_submodule(name).packed.qtensor() for model in (before, after))
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and a.scale.dtype == b.scale.dtype
        assert (a.zero is None) == (b.zero is None) and (a.zero is None or torch.equal(a.zero, b.zero))
        assert (a.input_scale is None) == (b.input_scale is None)


@pytest.mark.parametrize("scheme", [*SCHEMES, "w4g32a8"])
def test_untrained_it_is_what_it_was(scheme: str) -> None:
    small = spicerack.quantize(tiny(hidden_size=64, intermediate_size=128), scheme, rules=["model.embed_tokens=w8"])
    again = spicerack.freeze(spicerack.prepare_qat(copy.deepcopy(small), weights=True))
    same(small, again)
    with torch.no_grad():
        assert torch.equal(small(input_ids=IDS).logits, again(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_families(kind: str) -> None:
    """Transposed weights, and activations that were joined with layers."""
    small = spicerack.quantize(families.build(kind).eval(), "w4g16")
    same(small, spicerack.freeze(spicerack.prepare_qat(copy.deepcopy(small), weights=True)))


def test_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(16, 6, 2, stride=2, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False))
    small = spicerack.freeze(spicerack.prepare_qat(net, "w4"))
    model = spicerack.prepare_qat(copy.deepcopy(small), weights=True)
    same(small, spicerack.freeze(model))
    x = torch.randn(2, 16, 8, 8)
    assert torch.allclose(model(x), small(x), atol=1e-6)


def test_static_ranges_go_on_from_where_they_are() -> None:
    x = torch.randn(8, 64)
    small = spicerack.freeze(spicerack.prepare_qat(small_net(), "w8a8s", inputs=[x]))
    same(small, spicerack.freeze(spicerack.prepare_qat(copy.deepcopy(small), weights=True)))


def test_it_learns_more_than_scales_alone() -> None:
    """What is left of the loss that scales leave, on average over four nets.

    Over 16 seeds a net's share was .65 on average, its standard deviation .068: the bound is four of a mean of four
    above.
    """
    shares = [_share_left(seed) for seed in range(4)]
    assert sum(shares) / len(shares) < 0.8


def _share_left(seed: int) -> float:
    """The loss behind 100 steps of weights and scales, as a share of that behind 100 steps of scales alone."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    x = torch.randn(512, 64)
    wanted = teacher(x).detach()
    lost = []
    for weights in (False, True):
        model = spicerack.prepare_qat(spicerack.quantize(copy.deepcopy(teacher), "w2g32h"), weights=weights)
        train(model, x, wanted, steps=100)
        after = spicerack.freeze(model, compute="float")
        with torch.no_grad():
            lost.append(float((after(x) - wanted).square().mean()))
    return lost[1] / lost[0]


def test_tied_weights_stay_tied() -> None:
    small = spicerack.quantize(tiny(tie_word_embeddings=True), "w4g32", rules=["lm_head=w8"])
    model = spicerack.prepare_qat(small, weights=True)
    assert isinstance(model.lm_head, FakeLayer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    frozen = spicerack.freeze(model)
    assert frozen.lm_head.packed is frozen.model.embed_tokens.packed


@pytest.mark.parametrize(("given", "error", "match"), [
    ({"scheme": "w4g32"}, UsageError, "it has its scheme"),
    ({"config": QATConfig("absmax")}, SchemeError, "finds scales anew"),
    ({"config": QATConfig(init="lsq")}, SchemeError, "begin where they are"),
])  # fmt: skip
def test_what_would_not_go_on_is_refused(given: dict[str, Any], error: type[Exception], match: str) -> None:
    small = spicerack.quantize(small_net(), "w4g32")
    with pytest.raises(error, match=match):
        spicerack.prepare_qat(small, weights=True, **given)
    with pytest.raises(UsageError, match="is not packed"):
        spicerack.prepare_qat(small_net(), "w4g32", weights=True)
