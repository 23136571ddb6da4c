"""The search of super-blocks: against plain rounding, brute force and llama.cpp's figures; native code bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spicerack.errors import WeightError
from spicerack.numerics import codec, native, rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.numerics.superblocks.native import fit as fit_natively
from spicerack.numerics.superblocks.search import form_of

KQUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
SCHEMES = [*KQUANTS, "w4g64m", "w2g8mf", "w3g20m", "w8m"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["gauss", "heavy", "zeros", "constant", "positive", "negative", "tiny", "grid"]
LLAMA_CPP = {"q2_k": 0.301, "q3_k": 0.151, "q4_k": 0.0725, "q5_k": 0.0365, "q6_k": 0.0179}
"""Relative RMSE of Gaussian weights that ggml's quantizers leave (libggml 0.25.3, without importances)."""


def weights(kind: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn((n, k), generator=g) * torch.rand((n, 1), generator=g)
    if kind == "heavy":
        return w / torch.rand((n, k), generator=g).clamp(min=0.01)
    if kind == "zeros":
        return w * (torch.rand((n, k), generator=g) < 0.05)
    if kind == "constant":
        return torch.full((n, k), -0.37)
    if kind in ("positive", "negative"):
        return (w.abs() + 0.1) * (1 if kind == "positive" else -1)
    if kind == "tiny":
        return w * 2e-2
    return torch.round(w * 8) / 8 if kind == "grid" else w


def parts(q: QTensor | torch.Tensor | None) -> list[torch.Tensor]:
    """Every tensor in a QTensor."""
    if isinstance(q, QTensor):
        return [q.codes, *parts(q.scale), *parts(q.min)]
    return [] if q is None else [q]


def same(a: QTensor, b: QTensor) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def error(q: QTensor, w: torch.Tensor, a: torch.Tensor | float = 1.0) -> float:
    return float((a * (codec.decode(q) - w.float()).square()).sum(dtype=torch.float64))


@pytest.mark.parametrize(("name", "theirs"), LLAMA_CPP.items())
def test_gaussian_weights_are_nearer_than_llama_cpp_leaves_them(name: str, theirs: float) -> None:
    w = torch.randn((64, 2048), generator=torch.Generator().manual_seed(0))
    assert error(rounding.to_nearest(w, parse(name)), w) ** 0.5 < theirs * float(w.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEMES)
def test_never_worse_than_plain_rounding(name: str, kind: str) -> None:
    """In any super-block, by the weighted error that is looked for."""
    w, scheme = weights(kind, 6, 1280), parse(name)
    a = torch.rand(1280, generator=torch.Generator().manual_seed(5)) ** 4
    form = form_of(scheme, 1280, torch.float32)
    assert form is not None
    wrong = [
        (a * (codec.decode(rounding.to_nearest(w, scheme, range_=range_, importance=a)) - w).square())
        .double().reshape(-1, form.groups * form.columns).sum(1)
        for range_ in ("opt", "absmax")
    ]  # fmt: skip
    assert bool((wrong[0] <= wrong[1] * (1 + 1e-5) + 1e-20).all())


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(SCHEMES), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES), n=st.integers(1, 9),
    blocks=st.integers(1, 2), importance=st.sampled_from(["none", "columns", "each", "dead"]),
    range_=st.sampled_from(["opt", "absmax"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_native_code_has_the_specification_s_bits(
    name: str, kind: str, dtype: torch.dtype, n: int, blocks: int, importance: str, range_: codec.Range, seed: int
) -> None:
    k = blocks * 1280
    w, scheme = weights(kind, n, k, seed).to(dtype), parse(name)
    a: torch.Tensor | None = None
    if importance != "none":
        shape = (n, k) if importance == "each" else (k,)
        a = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) ** 3
        a[..., : 300 if importance == "dead" else 0] = 0
    exact = codec.encode(w, scheme, importance=a, range_=range_)
    assert same(rounding.to_nearest(w, scheme, importance=a, range_=range_, threads=3), exact)
    form = form_of(scheme, k, dtype)
    assert form is not None
    size = form.groups * form.columns
    for isa in native.ISAS:
        repeating = None if a is None else a.reshape(-1).contiguous()
        fitted = fit_natively(w.reshape(-1, size), form, range_, repeating, isa=isa)
        if fitted is not None and fitted[2]:
            codes = fitted[1].view(codec.codes_dtype(scheme))
            assert same(codec.of_blocks(scheme, form, (n, k), fitted[0], codes), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["iq4_nl", "nf4"])
def test_tables_are_searched_natively(name: str, dtype: torch.dtype) -> None:
    """Not super-blocks, but what llama.cpp has beside them: the search of single groups, levels in a table."""
    scheme = parse(name)
    columns = scheme.group_columns
    assert columns is not None
    w = torch.cat([weights(kind, 3, 512) for kind in KINDS]).to(dtype)
    for a in (None, torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 3):
        exact = codec.encode(w, scheme, importance=a)
        assert same(rounding.to_nearest(w, scheme, importance=a, threads=3), exact)
        for isa in native.ISAS:
            stored = exact.plain_scale.dtype
            groups = native.quantize(w.reshape(-1, columns), scheme, stored, "opt", a, isa=isa)
            assert groups is not None and torch.equal(groups.codes.view(torch.uint8).reshape(w.shape), exact.codes)
            assert torch.equal(groups.scale.to(stored).reshape(exact.scale.shape), exact.plain_scale)


def test_a_line_is_near_the_best_of_all_codes() -> None:
    """Two bits and a float minimum for eight weights: all 4^8 codes, each with its least-squares line."""
    w = torch.randn((40, 8), generator=torch.Generator().manual_seed(1))
    v = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.float64)
    apart = v - v.mean(1, keepdim=True)
    some = apart.square().sum(1) > 0
    x = w.double() - w.double().mean(1, keepdim=True)
    best = x.square().sum(1) - ((x @ apart[some].t()) ** 2 / apart[some].square().sum(1)).amax(1)
    reached = error(rounding.to_nearest(w, parse("w2g8mf")), w)
    plain = error(rounding.to_nearest(w, parse("w2g8mf"), range_="absmax"), w)
    assert float(best.sum()) <= reached * (1 + 1e-6) and reached < 1.06 * float(best.sum()) < 0.8 * plain


@pytest.mark.parametrize("name", KQUANTS)
def test_importance_lowers_the_error_that_counts(name: str) -> None:
    w = weights("gauss", 16, 1024)
    a = torch.rand(1024, generator=torch.Generator().manual_seed(2)) ** 4
    plain, weighted = (rounding.to_nearest(w, parse(name), importance=one) for one in (None, a))
    assert error(weighted, w, a) < 0.97 * error(plain, w, a)


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "w4g64m"])
def test_scales_that_float16_cannot_hold_are_refused_by_name(name: str) -> None:
    w = weights("gauss", 4, 1024)
    w[2, 700] = 1e9
    with pytest.raises(WeightError, match=r"layer: block \[2, \d+\] with weights up to 1e\+09 needs a scale above"):
        rounding.to_nearest(w, parse(name), name="layer")
    with pytest.raises(WeightError, match=r"layer: block .* needs a scale below"):
        rounding.to_nearest(weights("gauss", 4, 1024) * 1e-9, parse(name), name="layer")


@pytest.mark.parametrize("name", ["q3_k", "q4_k", "w4g64m"])
def test_a_super_block_beside_much_larger_ones_may_be_lost(name: str) -> None:
    w = weights("gauss", 4, 1024)
    w[1, :256] *= 1e-9
    q = rounding.to_nearest(w, parse(name))
    assert float(codec.decode(q)[1, :256].abs().max()) < 1e-4
    assert same(q, codec.encode(w, parse(name)))


def test_not_finite_weights_are_refused_with_their_place() -> None:
    w = weights("gauss", 4, 1024)
    w[3, 999] = float("nan")
    with pytest.raises(WeightError, match=r"layer: 1 weights are not finite; the first is nan at \[3, 999\]"):
        rounding.to_nearest(w, parse("q5_k"), name="layer")


def test_experts_are_searched_one_by_one() -> None:
    w = torch.stack([weights("gauss", 4, 512), weights("heavy", 4, 512)])
    q = rounding.to_nearest(w, parse("q4_k"))
    assert all(same(rounding.to_nearest(one, parse("q4_k")), mine) for one, mine in zip(w, q.matrices(), strict=True))
