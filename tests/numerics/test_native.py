"""The native module equals its specifications bit for bit: every instruction set, type, shape, thread count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spicerack import _native
from spicerack.kernels import multiply, panels
from spicerack.numerics import bits, codec, native, rounding
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme, parse
from spicerack.numerics.search import PIECE, TensorGroups, search

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [
    "w8",
    "w4g128",
    "w4g32",
    "w4g32z",
    "w3g64",
    "w2g32",
    "w2g32z",
    "w2g32h",
    "w5",
    "w6g8z",
    "w7h",
    "w4t",
    "w2tz",
]


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, kind: str = "gauss") -> torch.Tensor:
    """Random weights whose rows differ in size, of one of several kinds."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.rand((*shape[:-1], 1), generator=generator)
    if kind == "heavy":
        w = w / torch.rand(shape, generator=generator).clamp(min=0.01)
    elif kind == "zeros":
        w = w * (torch.rand(shape, generator=generator) < 0.3)
    elif kind == "constant":
        w = torch.full(shape, 0.37)
    elif kind == "positive":
        w = w.abs() + 0.1
    elif kind == "negative":
        w = -w.abs() - 0.1
    elif kind == "tiny":
        w = w * 3e-6
    elif kind == "huge":
        w = w.clamp(-1, 1) * 6e4
    elif kind == "grid":
        w = torch.round(w * 8) / 8  # ties
    return w.to(dtype)


def same(a: QTensor, b: QTensor) -> bool:
    assert isinstance(a.scale, torch.Tensor) and isinstance(b.scale, torch.Tensor)
    assert (a.scale.dtype, a.codes.dtype, a.codes.shape) == (b.scale.dtype, b.codes.dtype, b.codes.shape)
    zeros = a.zero is None or (b.zero is not None and torch.equal(a.zero, b.zero))
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and zeros


@pytest.mark.parametrize("importance", [None, "columns", "all"])
@pytest.mark.parametrize("range_", ["absmax", "opt"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_scheme(name: str, dtype: torch.dtype, range_: codec.Range, importance: str | None) -> None:
    w = weights(19, 128, dtype=dtype)
    a = None if importance is None else weights(*((128,) if importance == "columns" else (19, 128)), seed=1).abs()
    slow = codec.encode(w, parse(name), range_=range_, importance=a)
    assert same(slow, rounding.to_nearest(w, parse(name), range_=range_, importance=a, threads=2))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["gauss", "heavy", "zeros", "constant", "positive", "negative", "tiny", "huge", "grid"]),
    low=st.integers(2, 8),
    suffix=st.sampled_from(["", "z", "h"]),
    rows=st.integers(1, 40),
    group=st.integers(1, 70),
    groups=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from(["float32", "bfloat16"]),
    range_=st.sampled_from(["absmax", "opt"]),
    isa=st.sampled_from(native.ISAS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_kind_and_processor(
    kind: str, low: int, suffix: str, rows: int, group: int, groups: int, dtype: torch.dtype,
    scale: str, range_: codec.Range, isa: str, threads: int, seed: int,
) -> None:  # fmt: skip
    half = 2 ** (low - 1)
    scheme = Scheme("any", IntLevels(-half, half - 1, half=suffix == "h"), (1, group), zero=suffix == "z")
    w = weights(rows, group * groups, dtype=dtype, seed=seed, kind=kind).reshape(-1, group)
    stored = getattr(torch, scale)
    best = native.quantize(w, scheme, stored, range_, threads=threads, isa=isa)
    assert best is not None
    codes, scales, zeros = best.codes, best.scale, best.zero
    expected, expected_zeros = search(TensorGroups(w.float(), scheme), scheme, stored, range_)
    assert torch.equal(scales, expected)
    assert torch.equal(zeros, expected_zeros.to(torch.int8))
    assert best.fits == codec.scale_fits(scales)
    if best.fits:
        u = w.float() * (1 / expected)[:, None]
        assert torch.equal(codes, scheme.levels.encode(u, expected_zeros[:, None]).to(torch.int8))
        zero = zeros if scheme.zero else None
        assert torch.equal(native.encode(w, scheme, scales, zero, threads=threads, isa=isa), codes)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_16_bit_number_and_its_neighbours(dtype: torch.dtype, isa: str) -> None:
    """Widening of all weights, and rounding of scales halfway between all stored values, just above and just below."""
    every = (
        torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16 if dtype == torch.float32 else dtype)
    )
    w = every[every.isfinite()].to(dtype)[:, None]
    if dtype == torch.float32:
        halves = w.view(torch.int32) + 2**15
        w = torch.cat([halves - 1, halves, halves + 1]).view(torch.float32)
        w = w[w.isfinite()][:, None]
    one = Scheme("one", IntLevels(-1, 1), (1, 1))  # the absmax scale is the magnitude itself
    for stored in DTYPES:
        best = native.quantize(w, one, stored, "absmax", isa=isa)
        assert best is not None
        assert torch.equal(best.scale, search(TensorGroups(w.float(), one), one, stored, "absmax")[0])


@pytest.mark.parametrize("name", ["w4t", "w2tz", "ternary", "w3th"])
@pytest.mark.parametrize("size", [PIECE, PIECE + 1, 2 * PIECE + 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_groups(name: str, size: int, dtype: torch.dtype) -> None:
    w = weights(2, 1, size, seed=3, dtype=dtype)  # two experts, one scale each
    assert same(codec.encode(w, parse(name)), rounding.to_nearest(w, parse(name), threads=2))


def test_groups_of_several_rows_and_of_strided_tensors() -> None:
    w = weights(32, 64)
    pair = Scheme("pairs", IntLevels(-8, 7), (2, None))
    tiles = Scheme("tiles", IntLevels(-8, 7), (16, 16))
    for scheme in (pair, tiles, parse("w4g32")):
        for view in (w, w.T, w[::2], w.reshape(2, 16, 64)):
            assert same(codec.encode(view, scheme), rounding.to_nearest(view, scheme, threads=2))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    w = weights(300, 96, dtype=torch.bfloat16)
    for name in ("w8", "w4g32z"):
        assert same(rounding.to_nearest(w, parse(name), threads=threads), rounding.to_nearest(w, parse(name)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["w8", "w4g32z", "w4t"])
def test_not_finite_is_refused_with_its_place(name: str, value: float) -> None:
    w = weights(40, 64)
    w[17, 33] = value
    with pytest.raises(codec.WeightError, match=rf"blk: 1 weights are not finite; the first is {value} at \[17, 33\]"):
        rounding.to_nearest(w, parse(name), name="blk", threads=2)


def test_lost_scales_are_lifted_as_the_codec_lifts_them() -> None:
    w = weights(20, 64)
    w[3, :32] *= 1e-9
    for range_ in ("absmax", "opt"):
        assert same(
            codec.encode(w, parse("w4g32"), range_=range_), rounding.to_nearest(w, parse("w4g32"), range_=range_)
        )
    w *= 1e-9
    with pytest.raises(codec.WeightError, match=r"needs a scale below 5\.96e-08, the smallest float16"):
        rounding.to_nearest(w, parse("w4g32"))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 200), st.integers(0, 255), st.integers(0, 2**31))
def test_packing(width: int, rows: int, columns: int, offset: int, seed: int) -> None:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = native.pack(codes, width, offset=offset, threads=2)
    kept = (codes.int() + offset).to(torch.uint8) & (2**width - 1)
    assert torch.equal(words, bits.pack(kept, width))
    assert torch.equal(native.unpack(words, width, columns, offset=offset), (kept.int() - offset).to(torch.uint8))


def test_signed_codes_travel_through_packing() -> None:
    codes = rounding.to_nearest(weights(2, 3, 50), parse("w3")).codes
    words = native.pack(codes, 3, offset=4)
    assert torch.equal(native.unpack(words, 3, 50, offset=4).view(torch.int8), codes)


OTHER = {torch.float32: torch.bfloat16, torch.float64: torch.float32, torch.int8: torch.int16, torch.uint8: torch.int16,
         torch.int32: torch.int64}  # fmt: skip


def written() -> dict[str, tuple[Callable[..., object], list[torch.Tensor]]]:
    """Native functions of the arrays that they write to, and those arrays as they should be."""
    w, levels = weights(4, 32), native.levels_of(parse("w4g32"))
    scale, zero, codes = torch.ones(4), torch.zeros(4, dtype=torch.int8), torch.zeros(4, 32, dtype=torch.int8)
    words = torch.zeros((4, 4), dtype=torch.int32)
    packed = panels.pack(rounding.to_nearest(weights(32, 64), parse("w8")))
    spec = panels.spec_of(parse("w8"), (32, 64))
    matrix = multiply.PanelMatrix(packed["codes"], packed["scale"], None, None, spec, panels.FLOATS)
    tiles, bound = packed["codes"], matrix.native()
    data, lanes = torch.zeros((32, 64), dtype=torch.uint8), torch.zeros((2, 1, 16), dtype=torch.uint8)

    def packing(tiles: torch.Tensor) -> _native.Packing:
        return _native.Packing(data, 1, 32, 64, 8, 0, 255, 8, tiles)

    return {
        "search": (
            lambda *out: _native.search(w, levels, "float16", (), (), (), 0, 1.0, None, *out),
            [scale, zero, codes],
        ),
        "encode": (lambda out: _native.encode(w, levels, scale, None, out), [codes]),
        "judge": (lambda out: _native.judge(w, levels, 1.0, 0.0, out), [torch.zeros(4, 5, dtype=torch.float64)]),
        "pack": (lambda out: _native.pack(codes.view(torch.uint8), 4, 0, out), [words]),
        "unpack": (lambda out: _native.unpack(words, 4, 0, out), [codes.view(torch.uint8)]),
        "rows": (lambda out: _native.rows(bound, torch.tensor([3, 1]), out), [torch.zeros(2, 64)]),
        "from_panels": (lambda out: _native.from_panels(tiles, 8, 0, out), [torch.zeros(32, 64, dtype=torch.uint8)]),
        "Packing": (packing, [torch.zeros_like(tiles)]),
        "add_lanes": (
            lambda out: packing(torch.zeros_like(tiles)).add_lanes(torch.zeros((32, 1), dtype=torch.uint8), 1, 0, out),
            [lanes],
        ),
    }


@pytest.mark.parametrize("name", sorted(written()))
def test_what_is_written_to_is_never_a_converted_copy(name: str) -> None:
    """A copy of another type, or without gaps in memory, would be filled and forgotten, and the caller's left alone."""
    call, out = written()[name]
    call(*out)
    for i, right in enumerate(out):
        wide = right.new_zeros((*right.shape[:-1], right.shape[-1] * 2))
        for wrong in (right.to(OTHER[right.dtype]), wide[..., ::2]):
            with pytest.raises(TypeError, match="incompatible function arguments"):
                call(*out[:i], wrong, *out[i + 1 :])


@pytest.mark.parametrize("name", ["w8", "w4g32z", "w2g32h", "mxfp4", "nf4"])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e20, 1e30])
def test_errors_of_the_largest_and_smallest_weights(name: str, size: float) -> None:
    """Whose squares float32 does not hold: against float64."""
    w = (torch.randn((16, 64), generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    q = rounding.to_nearest(w, parse(name))
    exact = w.double()
    expected = float((codec.decode(q).double() - exact).norm() / exact.norm())
    assert rounding.relative_error(w, q) == pytest.approx(expected, rel=1e-3)
