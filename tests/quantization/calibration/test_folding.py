"""Factors moved inside blocks: nothing changes that a block computes, in any family that folds are listed for."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.algorithms.stats import Stats
from spicerack.algorithms.transforms import awq, smoothquant
from spicerack.models.blocks.find import find
from spicerack.models.families.folds import FOLDS
from spicerack.nn import kinds
from spicerack.quantization.calibration import folding

TYPES = {family: families.vars_of(config).model_type for family, (config, *_) in families.FAMILIES.items()}
KNOWN = [family for family, kind in TYPES.items() if kind in FOLDS and family != "gemma3"]


@torch.no_grad()
def awake(family: str) -> PreTrainedModel:
    """A model whose norms and biases are not the ones and zeros that they begin with."""
    model = families.build(family).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
    return model


def sites_of(model: PreTrainedModel, block: nn.Module, but: tuple[str, ...] = ()) -> list[folding.Site]:
    return list(folding.sites(block, model.config, [path for path in kinds.linear_layers(block) if path not in but]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KNOWN)
@torch.no_grad()
def test_blocks_compute_the_same(family: str, dtype: torch.dtype) -> None:
    model = awake(family)
    stack = find(model)
    block = stack.blocks[-1]
    sites = sites_of(model, block)
    assert {site.source for site in sites} == {source for source, _ in FOLDS[TYPES[family]]}
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    hidden, arguments = stack.calls({"input_ids": ids})
    hidden = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    before = stack.run(block, hidden, arguments[-1])
    for site in sites:
        moved = copy.deepcopy(block)
        factors = site.tied(torch.rand(len(site.channels), generator=torch.Generator().manual_seed(4)) * 4 + 0.2)
        actual, changed = folding.move(moved, site, factors, dtype)
        assert all(p == p.to(dtype) for name in changed for p in moved.get_parameter(name))
        torch.testing.assert_close(actual, factors, rtol=0.02, atol=0)  # as far as gains are rounded
        biased = any(name.endswith(".bias") for name in changed)
        within = 1e-5 if dtype == torch.float32 else 2e-2 if biased else 1e-5
        after = stack.run(moved, hidden, arguments[-1])
        assert float((after - before).norm() / before.norm()) < within, site.source
        assert not torch.equal(moved.get_parameter(f"{site.readers[0]}.weight"),
                               block.get_parameter(f"{site.readers[0]}.weight"))  # fmt: skip


def test_readers_that_stay_in_float_are_left_alone() -> None:
    model = awake("llama")
    block = find(model).blocks[0]
    names = {site.source for site in sites_of(model, block, but=("self_attn.v_proj",))}
    assert names == {"post_attention_layernorm", "mlp.up_proj"}


def test_grouped_heads_share_a_factor() -> None:
    """Llama with 4 heads of 8 over 2 of values: columns 0..7 and 8..15 of the output projection read values 0..7."""
    model = awake("llama")
    site = next(s for s in sites_of(model, find(model).blocks[0]) if s.source == "self_attn.v_proj")
    assert site.channels.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    factors = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5
    tied = site.tied(factors)
    torch.testing.assert_close(tied[:8], (factors[:8] * factors[8:16]).sqrt())
    assert torch.equal(tied[:8], tied[8:16])
    assert torch.equal(tied[16:24], tied[24:])


def test_a_gain_of_zero_keeps_its_channel() -> None:
    model = awake("llama")
    block = find(model).blocks[0]
    site = sites_of(model, block)[0]
    with torch.no_grad():
        block.get_parameter("input_layernorm.weight")[5] = 0
        columns = block.get_parameter("self_attn.q_proj.weight")[:, 5].clone()
        actual, _ = folding.move(block, site, torch.full((32,), 2.0), torch.float32)
    assert actual[5] == 1
    assert torch.equal(block.get_parameter("self_attn.q_proj.weight")[:, 5], columns)


def stats(**moments: Any) -> Stats:
    return Stats(8, **moments)


def test_awq_raises_only_what_stands_out() -> None:
    """All inputs alike but one: after normalization only their ratio counts, and that is ratio^r."""
    absmean = torch.ones(16)
    absmean[3] = 100.0
    for exponent, factors in zip(awq.EXPONENTS, awq.candidates(stats(absmean=absmean), torch.ones(16)), strict=True):
        others = torch.cat([factors[:3], factors[4:]])
        assert torch.equal(others, others[:1].expand(15))
        assert float(factors[3] / factors[0]) == pytest.approx(100**exponent, rel=1e-5)
        assert float(factors.amax() * factors.amin()) == pytest.approx(1.0, rel=1e-5)


def test_smoothquant_balances_inputs_and_weights() -> None:
    """At a = 1/2 inputs and weights have one range: max|x_j| / c_j = max|W_j| c_j times a constant (Xiao et al.)."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.rand(2, 16, generator=generator) * 10 + 0.1
    candidates = list(smoothquant.candidates(stats(absmax=inputs), weights))
    factors = candidates[smoothquant.STRENGTHS.index(0.5)]
    ratio = (inputs / factors) / (weights * factors)
    torch.testing.assert_close(ratio, ratio[:1].expand(16))
    inputs[2], weights[7] = 0.0, 0.0
    for factors in smoothquant.candidates(stats(absmax=inputs), weights):
        assert factors[2] == factors[7] == 1
        assert bool(torch.isfinite(factors).all())
