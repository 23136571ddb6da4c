"""HQQ: its shrinkage in closed form, its error beside the paper's own loop, and groups with nothing to gain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spicerack.algorithms import solver
from spicerack.algorithms.solvers import hqq
from spicerack.numerics import codec, rounding
from spicerack.numerics.scheme import parse


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Student-t with 4 degrees of freedom."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, (rows, columns))).float()


def power(w: torch.Tensor, q: codec.QTensor, p: float) -> torch.Tensor:
    """Of each row: sum |w - decoded|^p."""
    return (codec.decode(q) - w).abs().double().pow(p).sum(1)


def published(w: np.ndarray, bits: int, steps: int = 20) -> float:
    """The paper's loop for one group [B] in numpy, min-max scale, real-valued zero -> its least mean |error|."""
    top = 2**bits - 1
    s = (w.max() - w.min()) / top
    z = -w.min() / s
    best, beta = np.inf, 10.0
    for _ in range(steps):
        q = np.clip(np.rint(w / s + z), 0, top)
        r = w - s * (q - z)
        best = min(best, np.abs(r).mean())
        e = np.sign(r) * np.maximum(np.abs(r) - np.maximum(np.abs(r), 1e-8) ** -0.3 / beta, 0)
        z = (q - (w - e) / s).mean()
        beta *= 1.01
    return float(best)


def test_shrink_is_the_soft_threshold_for_p_1_and_minimises_below() -> None:
    r = torch.linspace(-3, 3, 61)
    torch.testing.assert_close(hqq.shrink(r, 2.0, 1.0), r.sign() * (r.abs() - 0.5).clamp(min=0))
    e = torch.linspace(-3, 3, 6001)
    for value in (0.8, 1.5, -2.5):  # one step of the fixed point: near the minimum, and lower than not shrinking
        loss = e.abs() ** hqq.P * (1 / hqq.P) + 5.0 * (e - value) ** 2
        shrunk = float(hqq.shrink(torch.tensor(value), 10.0))
        assert shrunk == pytest.approx(float(e[loss.argmin()]), abs=0.03)


@pytest.mark.parametrize("name", ["w4g64z", "w3g64z", "w4g64", "w3g64", "w2g32h", "w8", "w3t"])
def test_no_group_gets_worse_and_many_get_better(name: str) -> None:
    """Over 16 seeds the share of better ones was .53 on average for w8, with a standard deviation of .07, and .67 and
    more for the others: the bound is four of them below."""
    w = heavy(64, 256)
    start = rounding.to_nearest(w, parse(name), range_="absmax")
    solved = hqq.solve(w, start)
    groups = parse(name).group_shape(64, 256)
    before, after = (
        codec.to_groups((codec.decode(q) - w).abs().double() ** hqq.P, groups).sum(1) for q in (start, solved.q)
    )
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float((after < before).double().mean()) > 0.25


@pytest.mark.parametrize("bits", [3, 4])
def test_as_close_as_the_paper_though_zeros_are_whole(bits: int) -> None:
    """Its zeros are real numbers, which is worth a few percent; ours are codes, so that engines can read them."""
    w = heavy(100, 64, seed=1)
    mine = hqq.solve(w, rounding.to_nearest(w, parse(f"w{bits}g64z"))).q
    ours = float((codec.decode(mine) - w).abs().mean())
    theirs = float(np.mean([published(row.double().numpy(), bits) for row in w]))
    assert ours < theirs * 1.05


def test_groups_with_nothing_to_gain() -> None:
    w = torch.zeros(5, 32)
    w[1] = 0.7
    w[2, 3] = 5.0
    w[3] = torch.linspace(0.1, 3, 32)
    w[4] = 1e-7
    for name in ("w4g32", "w4g32z", "w2g32"):
        start = rounding.to_nearest(w, parse(name))
        solved = hqq.solve(w, start).q
        assert bool(torch.isfinite(codec.decode(solved)).all())
        assert torch.equal(codec.decode(solved)[0], torch.zeros(32))
        assert bool((power(w, solved, hqq.P) <= power(w, start, hqq.P) * (1 + 1e-6)).all())


def test_other_number_systems_are_rounded_and_said() -> None:
    w = heavy(8, 64)
    start = codec.encode(w, parse("nf4"))
    solved = solver.solve_weight("hqq", w, start)
    assert solved.q is start
    assert solved.events == ("hqq cannot do nf4 (its levels are a table, not integers): rounded to nearest",)
