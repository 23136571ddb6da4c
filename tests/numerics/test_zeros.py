"""Weights and inputs of zeros, in every scheme: they stay zeros, to within the smallest scale, and cost nobody else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from descents import linear_case
from dropped import dropped
from torch import nn

import spicerack
from spicerack import plugins
from spicerack.algorithms import solver
from spicerack.algorithms.descent import Tunable
from spicerack.numerics import codec, rounding, schemes, search
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of, smallest_scale
from spicerack.numerics.scheme import Scheme, parse

GRAMMAR = [f"w{bits}{group}{kind}" for bits in (2, 3, 4, 8) for group in ("", "g32", "t") for kind in ("", "z", "h")]
ALL = [*GRAMMAR, *plugins.names("numerics.schemes")]
HALVES = [name for name in GRAMMAR if name.endswith("h")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

NO_ZERO = '''
"""A table without 0, whose levels nearest to it are a quarter off."""
from spicerack.numerics.levels import TableLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="nozero", levels=TableLevels((-1.0, -0.25, 0.3, 1.0)), group=(1, 32))
'''


def least(scheme: Scheme, dtype: torch.dtype) -> float:
    """What zeros may decode to: 0, or the level that is nearest to it in the smallest steps that are stored."""
    zeros = torch.zeros(1, scheme.levels.weights)
    nearest = float(scheme.levels.decode(scheme.levels.encode(zeros)).abs().max())
    return nearest * smallest_scale(dtype_of(scheme.scale, dtype))


def with_zeros(dtype: torch.dtype, n: int = 8, k: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, K] with a row of zeros, some blocks of zeros, and a row with both signs of 0; and where they are."""
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.03).to(dtype)
    w[2], w[5] = 0, -0.0
    w[3, :32], w[4, 64:96], w[6, -32:] = 0, 0, 0
    zeros = (w.float().reshape(n, k // 32, 32) == 0).all(-1).repeat_interleave(32, 1)
    return w, zeros


def empty(q: QTensor) -> torch.Tensor:
    """Where all of q's group is zeros in `with_zeros`."""
    _, zeros = with_zeros(torch.float32)
    group = q.scheme.group_shape(*q.shape[-2:])
    return codec.from_groups(
        codec.to_groups(zeros, group).all(1, keepdim=True).expand(-1, math.prod(group)), q.shape, group
    )


def check(q: QTensor, dtype: torch.dtype) -> None:
    back, where = codec.decode(q), empty(q)
    assert torch.isfinite(back).all()
    assert float(back[where].abs().max()) <= least(q.scheme, dtype) if where.any() else True


@pytest.mark.parametrize("range_", ["absmax", "opt"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_zeros_stay_and_native_code_agrees(name: str, dtype: torch.dtype, range_: search.Range) -> None:
    scheme, (w, _) = parse(name), with_zeros(dtype)
    for weights in (w, torch.zeros_like(w), -torch.zeros_like(w)):
        exact = codec.encode(weights, scheme, range_=range_)
        q = rounding.to_nearest(weights, scheme, range_=range_)
        assert torch.equal(q.codes, exact.codes) and torch.equal(codec.decode(q), codec.decode(exact))
        assert weights is not w or torch.equal(q.codes, rounding.to_nearest(w, scheme, range_=range_, threads=3).codes)
        if weights is w:
            check(q, dtype)
        else:
            assert float(codec.decode(q).abs().max()) <= least(scheme, dtype)


@pytest.mark.parametrize("name", [name for name in ALL if parse(name).group_columns])
def test_a_block_of_zeros_costs_its_neighbours_nothing(name: str) -> None:
    """Where scales are quantized themselves, a large one that is made up would be their range."""
    scheme, (w, zeros) = parse(name), with_zeros(torch.float32)
    full = torch.where(zeros, torch.randn(w.shape, generator=torch.Generator().manual_seed(2)) * 0.03, w)

    def error(weights: torch.Tensor) -> float:
        return float((codec.decode(rounding.to_nearest(weights, scheme)) - w)[~zeros].norm() / w[~zeros].norm())

    assert error(w) <= error(full) * 1.02


def test_levels_without_zero_of_any_kind(tmp_path: Path) -> None:
    with dropped(schemes, tmp_path, "nozero", NO_ZERO):
        check(rounding.to_nearest(with_zeros(torch.float32)[0], parse("nozero")), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*HALVES, "w4g32", "w3z", "ternary", "nf4"])
@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_solvers_of_weights_keep_zeros(method: str, name: str, dtype: torch.dtype) -> None:
    scheme, (w, _) = parse(name), with_zeros(dtype)
    x = torch.randn(600, w.shape[1], generator=torch.Generator().manual_seed(3))
    gram = x.t() @ x / len(x)
    solved = solver.solve_weight(method, w, rounding.to_nearest(w, scheme), gram).q
    rows = codec.decode(solved)[[2, 5]]  # gptq moves zeros beside others, to make the others' errors good
    most = math.inf if scheme.group[0] is None else 16 * least(scheme, dtype)  # scales are fitted once more to codes
    assert float(rows.abs().max()) <= most
    if method != "gptq":
        check(solved, dtype)


@pytest.mark.parametrize("name", ["w2g32h", "w4h", "w3g32", "w2g32z"])
@pytest.mark.parametrize("method", ["signround", "blockap"])
def test_solvers_of_blocks_keep_rows_of_zeros(method: str, name: str) -> None:
    module, layer, _, x = linear_case(name)
    weight = layer.weight.clone()
    weight[4] = 0
    start = rounding.to_nearest(weight, parse(name))
    wanted = nn.functional.linear(x, weight)

    def forward(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return module(x[list(numbers)]).flatten(0, 1), wanted[list(numbers)].flatten(0, 1)

    module.bias = None
    found = solver.get(method)
    assert found.needs == "block"
    q = found.solve({"it": Tunable(module, weight, start)}, forward, 16)["it"].q
    assert float(codec.decode(q)[4].abs().max()) < 1e-6 * float(weight.abs().max())


@pytest.mark.parametrize("init", ["opt", "absmax", "lsq"])
@pytest.mark.parametrize("quantizer", ["lsq", "seq", "absmax"])
@pytest.mark.parametrize("name", ["w2g32h", "w4h", "w4g32", "w2th"])
def test_training_begins_with_zeros_as_zeros(name: str, quantizer: str, init: str) -> None:
    w, zeros = with_zeros(torch.float32)
    net = nn.Sequential(nn.Linear(512, 8))
    net[0].weight.data.copy_(w)
    config = spicerack.QATConfig(quantizer=quantizer, init=init)  # type: ignore[arg-type]
    qat = spicerack.prepare_qat(net, name, config=config)
    frozen = spicerack.freeze(qat, compute="float")
    x = torch.ones(1, 512)
    assert torch.equal(qat[0].rounded_weight(), frozen[0].weight)
    if parse(name).group[0] is not None:
        assert float((qat(x) - net[0].bias).detach()[0, 2].abs()) < 1e-4
        assert float((frozen(x) - net[0].bias).detach()[0, 2].abs()) < 1e-4
        assert float(frozen[0].weight[zeros & empty(frozen[0].packed.qtensor())].abs().max()) < 1e-6
    qat(torch.randn(4, 512)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in qat.parameters() if p.grad is not None)


@pytest.mark.parametrize("ranges", ["lsq", "ema"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_zeros_train_and_compute(dtype: torch.dtype, ranges: str) -> None:
    """A static scale of inputs that were all 0, as a branch that is switched off has them, is no 0 to divide by."""
    net = nn.Sequential(nn.Linear(64, 8)).to(dtype)
    zeros = torch.zeros(2, 64, dtype=dtype)
    config = spicerack.QATConfig(ranges=ranges)  # type: ignore[arg-type]
    qat = spicerack.prepare_qat(net, "w8a8s", config=config, inputs=[zeros])
    y = qat(zeros)
    assert torch.equal(y, net[0].bias.expand(2, -1))
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in qat.parameters() if p.grad is not None)
    small = spicerack.freeze(qat)
    scale = small[0].packed.qtensor().input_scale
    assert scale is not None and float(scale) > 0
    with torch.no_grad():
        assert torch.equal(small(zeros), net[0].bias.expand(2, -1))
        assert torch.isfinite(small(torch.randn(2, 64).to(dtype))).all()


@pytest.mark.parametrize("name", ["w8", "w4g32", "w8a8", "ternarya8", "w2g32h", "w4g32z", "nf4", "q4_k"])
def test_tokens_of_zeros_give_the_bias(name: str) -> None:
    layer = nn.Linear(256, 32)
    small = spicerack.quantize(layer, name)
    x = torch.randn(5, 256)
    x[3] = 0
    with torch.no_grad():
        assert torch.equal(small(x)[3], layer.bias) and torch.isfinite(small(x)).all()


@pytest.mark.parametrize("quantizer", ["lsq", "seq"])
@pytest.mark.parametrize("name", ["w2g32h", "w4g32", "w4g32z"])
def test_a_layer_that_starts_at_zeros_learns(name: str, quantizer: str) -> None:
    """As new blocks do that are added to a model: their scales have to come from where weights will be."""
    x = torch.randn(256, 64)
    wanted = x @ (torch.randn(64, 32) * 0.05)
    net = nn.Sequential(nn.Linear(64, 32, bias=False))
    nn.init.zeros_(net[0].weight)
    config = spicerack.QATConfig(quantizer=quantizer)  # type: ignore[arg-type]
    qat = spicerack.prepare_qat(net, name, config=config)
    assert float(qat(x).detach().abs().max()) < 1e-4
    optimizer = torch.optim.Adam(qat.parameters(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (qat(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3 * float(wanted.square().mean())
