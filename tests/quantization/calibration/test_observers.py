"""Activation ranges against numpy, scipy, closed forms and brute force; the traps of calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import entropy as scipy_entropy
from scipy.stats import norm

from spicerack.errors import ActivationError
from spicerack.quantization.calibration import observer as observers
from spicerack.quantization.calibration.histogram import BINS, FromHistogram, Histogram
from spicerack.quantization.calibration.observers.kl import entropy, least_divergence
from spicerack.quantization.calibration.observers.moving_average import MovingAverage
from spicerack.quantization.calibration.observers.mse import least_squares
from spicerack.quantization.calibration.observers.percentile import percentile

UNORDERED = ("minmax", "percentile", "mse", "kl")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Like the inputs of a transformer's layer: a few far outliers."""
    x = gaussian(*shape, seed=seed)
    return x * x.square() + 0.1


def scale(name: str, batches: Sequence[torch.Tensor]) -> float:
    observer = observers.begin(name)
    for x in batches:
        observer.add(x)
    return observer.scale()


def histogram(*batches: torch.Tensor) -> Histogram:
    counts = Histogram()
    for x in batches:
        counts.add(x)
    return counts


# ---- the histogram --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-(2.0**57), 2.0**57, width=32), min_size=1, max_size=40), st.integers(0, 40))
def test_bins_merge_without_losing_a_count(values: list[float], cut: int) -> None:
    """Against numpy's histogram of all values at once, on the final edges."""
    x = torch.tensor(values)[:, None]
    bins = histogram(x[:cut], x[cut:])
    largest = max(abs(value) for value in values)
    assert bins.peak == largest and bins.size == len(values)
    if largest:
        assert math.frexp(bins.width)[0] == 0.5 and BINS // 2 <= largest / bins.width < BINS
        right, _ = np.histogram(x.double().abs().numpy(), bins=np.arange(BINS + 1) * bins.width)
        assert np.array_equal(bins.counts.numpy(), right)


@pytest.mark.parametrize("name", UNORDERED)
def test_batches_and_their_order_do_not_matter(name: str) -> None:
    """Also where the first batch is all zeros, or a thousand times smaller, or a thousand times larger."""
    x = heavy(600, 8)
    x[:100] = 0
    x[100:200] *= 1e-3
    x[300:310] *= 1e3
    whole = scale(name, [x])
    assert scale(name, x.split(100)) == whole
    assert scale(name, x.split(100)[::-1]) == whole
    assert scale(name, [x[i::7] for i in (3, 1, 6, 0, 2, 5, 4)]) == whole


# ---- each against its oracle ----------------------------------------------------------------------------------------


def test_minmax_is_the_largest_magnitude() -> None:
    x = gaussian(50, 4)
    x[20, 2] = -7.5
    assert scale("minmax", x.split(10)) == 7.5 / 127


def test_moving_average_follows_by_a_tenth() -> None:
    """Closed form: with bounds b_0 ... b_n, 0.9^n b_0 + sum 0.1 * 0.9^(n - i) b_i; zero is always inside."""
    low, high = [-1.0, -4.0, 0.5, -2.0], [2.0, 1.0, 3.0, 0.0]
    observer, mirrored = MovingAverage(), MovingAverage()
    for a, b in zip(low, high, strict=True):
        observer.add(torch.tensor([[a, b]]))
        mirrored.add(torch.tensor([[-a, -b]]))
    weights = [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    lo = sum(w * min(a, 0.0) for w, a in zip(weights, low, strict=True))
    hi = sum(w * b for w, b in zip(weights, high, strict=True))
    assert observer.scale() == mirrored.scale() == pytest.approx(max(-lo, hi) / 127, rel=1e-12)
    one_sided = MovingAverage()
    one_sided.add(torch.tensor([[-8.0]]))
    one_sided.add(torch.tensor([[1.0]]))
    assert one_sided.scale() == pytest.approx(8 * 0.9 / 127, rel=1e-12)


@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.99, 99.999, 100])
@pytest.mark.parametrize("size", [1, 3, 1000, 200_000])
def test_percentile_is_numpys_of_the_whole_population(percent: float, size: int) -> None:
    x = heavy(size, 1)
    bins = histogram(*x.split(701))
    right = np.quantile(x.abs().double().numpy(), percent / 100)
    assert abs(percentile(bins, percent) - right) <= bins.width
    assert bins.width <= bins.peak / 32768
    if percent == 100:
        assert percentile(bins, percent) == bins.peak
    if percent == 99.999:
        assert abs(scale("percentile", x.split(701)) * 127 - right) <= bins.width


def gaussian_error(t: float) -> float:
    """Mean squared error of codes -127 ... 127 with scale t / 127 on N(0, 1), by integration over each code's cell."""
    s = t / 127
    total = 0.0
    for code in range(127):
        borders = max(code - 0.5, 0) * s, (code + 0.5) * s
        total += 2 * quad(lambda x, c=code: (x - c * s) ** 2 * norm.pdf(x), *borders)[0]
    return total + 2 * quad(lambda x: (x - t) ** 2 * norm.pdf(x), 126.5 * s, 12)[0]


def test_least_squares_finds_the_gaussian_optimum() -> None:
    """The error at the chosen range, from the integral, is within 1 % of the best of all ranges."""
    bins = histogram(*gaussian(1_000_000, 1).split(100_000))
    chosen = least_squares(bins)
    candidates = [bins.peak * i / 100 for i in range(72, 90, 2)]
    best = min(gaussian_error(t) for t in candidates)
    assert gaussian_error(chosen) <= 1.01 * best
    assert gaussian_error(bins.peak) > 1.1 * best
    assert 3.7 < chosen < 4.3


def test_least_squares_is_that_of_the_raw_data() -> None:
    x = heavy(20_000, 1)

    def error(t: float) -> float:
        exact = x.double()
        return float((torch.clamp(torch.round(exact / (t / 127)), -127, 127) * (t / 127) - exact).square().mean())

    peak = float(x.abs().max())
    best = min(error(peak * i / 100) for i in range(1, 101))
    assert error(least_squares(histogram(x))) == pytest.approx(best, rel=1e-3)
    assert error(peak) > 1.01 * best  # 1.03 to 1.07 over 16 seeds


def brute_force(counts: Sequence[int], levels: int) -> dict[int, float]:
    """KL of every cut, from its words."""
    divergences = {}
    for i in range(levels, len(counts) + 1):
        p = np.array(counts[:i], dtype=np.float64)
        p[-1] += sum(counts[i:])
        q = np.zeros(i)
        for level in range(levels):
            members = [k for k in range(i) if k * levels // i == level]
            kept = [k for k in members if counts[k] > 0]
            for k in kept:
                q[k] = sum(counts[j] for j in members) / len(kept)
        divergences[i] = float(scipy_entropy(p, q)) if q.any() else math.inf
    return divergences


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 50), min_size=31, max_size=31), st.integers(1, 9), st.sampled_from([2, 4, 7, 16]))
def test_kl_is_the_brute_force_minimum(counts: list[int], last: int, levels: int) -> None:
    right = brute_force([*counts, last], levels)
    chosen = least_divergence(np.array([*counts, last]), levels)
    assert right[chosen] <= min(right.values()) + 1e-9
    assert not [i for i, kl in right.items() if i > chosen and kl < right[chosen] - 1e-12]


def test_kl_clips_a_lone_outlier_and_keeps_what_fits() -> None:
    bulk = gaussian(200_000, 1)
    outlier = torch.tensor([[40.0]])
    assert 2.5 < entropy(histogram(bulk, outlier)) < 6
    uniform = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0))
    assert entropy(histogram(uniform)) > 0.95
    few = torch.tensor([[1.0], [-2.0], [3.0]])
    assert entropy(histogram(few)) == 3.0


# ---- traps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", observers.names())
def test_padding_does_not_count(name: str) -> None:
    x, mask = heavy(4, 50, 6), torch.ones(4, 50)
    mask[0, 30:], mask[2] = 0, 0
    real = [row[kept.bool()] for row, kept in zip(x, mask, strict=True) if kept.any()]
    right = scale(name, real)
    x[mask == 0] = torch.nan
    observer = observers.begin(name)
    for row, kept in zip(x, mask, strict=True):
        observer.add(row, kept)
    assert observer.scale() == right


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", observers.names())
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = value
    with pytest.raises(ActivationError, match=r"token \[1\], column 2"):
        observers.begin(name).add(x)


@pytest.mark.parametrize("name", observers.names())
def test_zeros_have_scale_one_and_nothing_has_none(name: str) -> None:
    assert scale(name, [torch.zeros(5, 3)]) == 1.0
    observer = observers.begin(name)
    observer.add(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(ActivationError, match="no token"):
        observer.scale()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", observers.names())
def test_one_sided_and_constant_inputs_fit(name: str, sign: float) -> None:
    """Zero is in the range however far the values are from it."""
    assert scale(name, [torch.full((9, 3), sign * 5.0)] * 2) == pytest.approx(5 / 127, rel=1e-4)
    near = gaussian(3000, 2).abs() * 0.01 + 5
    assert scale(name, [near * sign]) == pytest.approx(5 / 127, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", observers.names())
def test_half_precision_is_seen_as_it_is(name: str, dtype: torch.dtype) -> None:
    x = heavy(500, 4).to(dtype)
    assert scale(name, [x]) == scale(name, [x.float()])


@pytest.mark.parametrize("name", observers.names())
def test_tiny_and_huge_inputs_have_usable_scales(name: str) -> None:
    """Powers of two move the bins along with the values; between bins that lie otherwise, kl's choice jumps."""
    assert scale(name, [torch.full((4, 2), 1e-44)]) == 2.0**-126
    for size in (2.0**-100, 2.0**50):
        x = gaussian(5000, 2)
        assert scale(name, [x * size]) == scale(name, [x]) * size


def test_a_low_percentile_clips_what_mse_keeps() -> None:
    """Why 99.9 is not the default: a column of outliers that carries the signal."""
    x = gaussian(4000, 64) * 0.1
    x[:5, 0] = 30.0
    low = FromHistogram(lambda bins: percentile(bins, 99.9))
    low.add(x)
    assert low.scale() * 127 < 1
    assert scale("mse", [x]) * 127 > 15
