"""Streaming statistics against numpy on all tokens at once, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spicerack.algorithms import stats
from spicerack.algorithms.stats import NEEDS, Accumulator, Need, Stats
from spicerack.errors import ActivationError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def collect(batches: list[torch.Tensor], needs: tuple[Need, ...] = NEEDS) -> Stats:
    accumulator = Accumulator(needs, batches[0].shape[-1])
    for x in batches:
        accumulator.add(x)
    return accumulator.result()


def expected(x: torch.Tensor) -> dict[Need, np.ndarray]:
    """Straight from the definitions, in float64, without sums in between."""
    rows = x.double().reshape(-1, x.shape[-1]).numpy()
    return {
        "gram": np.cov(rows.T, bias=True) + np.outer(rows.mean(0), rows.mean(0)),
        "second_moment": np.var(rows, axis=0) + rows.mean(0) ** 2,
        "absmax": np.linalg.norm(rows, np.inf, axis=0),
        "absmean": np.linalg.norm(rows, 1, axis=0) / len(rows),
    }


def same(a: Stats, b: Stats) -> bool:
    pairs = [(getattr(a, need), getattr(b, need)) for need in NEEDS]
    return a.tokens == b.tokens and all(torch.equal(x, y) for x, y in pairs if x is not None)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_statistics_are_those_of_all_tokens(dtype: torch.dtype) -> None:
    x = (gaussian(3, 700, 12) * torch.logspace(-3, 2, 12) + 0.5).to(dtype)
    statistics, right = collect(list(x.split(1))), expected(x)
    assert statistics.tokens == 2100
    for need in NEEDS:
        value = getattr(statistics, need)
        assert value.dtype == torch.float32
        scale = np.sqrt(np.outer(right["second_moment"], right["second_moment"])) if need == "gram" else right[need]
        # float32 sums of up to 1024 products
        assert (np.abs(value.double().numpy() - right[need]) <= 2e-6 * scale).all(), need


def test_integers_are_exact_however_they_are_cut() -> None:
    x = integers(10_000, 24)
    whole = collect([x])
    exact = x.long().T @ x.long()
    assert whole.gram is not None and whole.second_moment is not None
    assert torch.equal(whole.gram, (exact.double() / 10_000).float())
    assert torch.equal(whole.second_moment, whole.gram.diagonal())
    for cut in (1, 7, 999, 4097):
        assert same(collect(list(x.split(cut if cut > 1 else 1000))), whole)
    assert same(collect([x.flip(0)]), whole)


@pytest.mark.parametrize("cut", [64, 1000, 5000])
def test_floats_depend_on_the_cut_by_rounding_only(cut: int) -> None:
    x = gaussian(9000, 16)
    whole, parts = collect([x]), collect(list(x.split(cut)))
    for need in NEEDS:
        assert torch.allclose(getattr(whole, need), getattr(parts, need), rtol=2e-6, atol=2e-7), need


def test_long_sums_do_not_stall() -> None:
    """In float32, 2^26 + 4 is 2^26."""
    accumulator = Accumulator(NEEDS, 2)
    accumulator.add(torch.ones(1024, 2))
    for total, reduction in accumulator.state():
        if reduction == "sum":
            total *= 2**16  # as many ranks that saw the same
    accumulator.add(torch.full((1, 2), 2.0))
    count, gram, second, largest, absolute = (tensor for tensor, _ in accumulator.state())
    assert int(count) == 2**26 + 1
    assert gram.tolist() == [[2**26 + 4] * 2] * 2 and second.tolist() == [2**26 + 4] * 2
    assert absolute.tolist() == [2**26 + 2] * 2 and largest.tolist() == [2] * 2


def test_a_gram_of_several_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    x = integers(300, 21)
    monkeypatch.setattr(stats, "STRIP", 8)
    gram = collect([x], ("gram",)).gram
    assert gram is not None and torch.equal(gram, ((x.T @ x).double() / 300).float())


def test_the_gram_is_exactly_symmetric_and_not_negative() -> None:
    accumulator = Accumulator(("gram",), 65)
    for x in gaussian(3000, 65).split(777):
        accumulator.add(x)
    accumulator.totals["gram"][3, 5] *= 1 + 1e-6  # as a matrix product may leave it
    gram = accumulator.result().gram
    assert gram is not None and torch.equal(gram, gram.T)
    assert float(torch.linalg.eigvalsh(gram.double())[0]) > 0


def test_only_what_is_needed_is_collected() -> None:
    statistics = collect([gaussian(5, 3)], ("absmax",))
    assert (statistics.gram, statistics.second_moment, statistics.absmean) == (None, None, None)
    assert statistics.absmax is not None and statistics.tokens == 5


def test_padding_does_not_count_whatever_it_holds() -> None:
    x, mask = integers(4, 10, 6), torch.ones(4, 10, dtype=torch.int64)
    mask[0, 7:], mask[2, :3], mask[3, :] = 0, 0, 0
    real = x[mask.bool()]
    x[mask == 0] = torch.nan
    accumulator = Accumulator(NEEDS, 6)
    for row, kept in zip(x, mask, strict=True):
        accumulator.add(row, kept)
    assert same(accumulator.result(), collect([real]))


def test_ranks_are_reduced_in_place() -> None:
    x = integers(900, 8)
    ranks = []
    for part in x.split([200, 600, 100]):
        ranks.append(Accumulator(NEEDS, 8))
        ranks[-1].add(part)
    operations = {"sum": torch.sum, "max": torch.amax}
    reduced = Accumulator(NEEDS, 8)
    for (target, reduction), *shares in zip(reduced.state(), *(rank.state() for rank in ranks), strict=True):
        target.copy_(operations[reduction](torch.stack([share for share, _ in shares]), 0))
    assert same(reduced.result(), collect([x]))


def test_no_token_gives_zeros() -> None:
    """An expert that the router never chose."""
    accumulator = Accumulator(NEEDS, 3)
    accumulator.add(torch.ones(0, 3))
    accumulator.add(torch.full((2, 3), torch.nan), torch.zeros(2))
    statistics = accumulator.result()
    assert statistics.tokens == 0
    assert all(not getattr(statistics, need).any() for need in NEEDS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_is_refused_by_token_and_column(value: float) -> None:
    accumulator = Accumulator(NEEDS, 4)
    accumulator.add(torch.ones(2, 3, 4))
    x, mask = torch.ones(2, 3, 4), torch.ones(2, 3)
    x[1, 2, 3] = value
    mask[0, 0] = mask[1, 0] = 0
    with pytest.raises(ActivationError, match=r"token \[1, 2\], column 3: activation .*; 1 such") as caught:
        accumulator.add(x, mask)
    assert "float32" in caught.value.hint
    with pytest.raises(ActivationError, match=r"token \[1, 2\], column 3"):
        accumulator.add(x)
    statistics = accumulator.result()
    assert statistics.tokens == 6 and statistics.absmax is not None and bool((statistics.absmax == 1).all())


def test_the_largest_that_is_taken_does_not_overflow() -> None:
    statistics = collect([torch.full((stats.CHUNK, 2), stats.LARGEST)])
    assert statistics.gram is not None and bool((statistics.gram == stats.LARGEST**2).all())


def test_shapes_that_do_not_fit_are_refused() -> None:
    accumulator = Accumulator(("absmax",), 4)
    with pytest.raises(ValueError, match="5 columns, not 4"):
        accumulator.add(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask is \[3\]"):
        accumulator.add(torch.ones(2, 4), torch.ones(3))


def test_wide_grams_are_summed_in_float32_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(1, 3000, 40)
    narrow = collect([x])
    monkeypatch.setattr(stats, "WIDE", 39)
    wide = Accumulator(["gram"], 40)
    wide.add(x)
    assert wide.totals["gram"].dtype == torch.float32
    gram = wide.result().gram
    assert gram is not None and narrow.gram is not None and torch.equal(gram, gram.T)
    assert torch.allclose(gram, narrow.gram, rtol=1e-5, atol=1e-5)
