"""The named schemes: their levels against other projects' tables, and that a new one is one file."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from spicerack import plugins
from spicerack.numerics import codec, rounding, schemes
from spicerack.numerics.levels import FloatLevels, TableLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse

NAMES = plugins.names("numerics.schemes")


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_shelf() -> None:
    assert set(NAMES) >= {"ternary", "nf4", "fp8", "mxfp4", "nvfp4", "q4_k"}


@pytest.mark.parametrize("range_", ["absmax", "opt"])
@pytest.mark.parametrize("name", NAMES)
def test_every_scheme_encodes_and_decodes(name: str, range_: codec.Range) -> None:
    w = gaussian(16, 512)
    scheme = parse(name)
    q = codec.encode(w, scheme, range_=range_)
    error = float((codec.decode(q) - w).square().mean())
    assert error < {"ternary": 0.95 if range_ == "absmax" else 0.2, "fp8": 0.001}.get(name.removesuffix("a8"), 0.02)
    assert int(q.codes.max()) <= 2**scheme.bits - 1
    solved = rounding.to_nearest(w, scheme, range_=range_, threads=2)
    assert torch.equal(solved.codes, q.codes)
    assert torch.equal(codec.decode(solved), codec.decode(q))


@pytest.mark.parametrize("name", NAMES)
def test_searching_is_not_worse_than_absmax(name: str) -> None:
    """On the whole: where scales are quantized too, single blocks may lose a little."""
    w = gaussian(32, 512)
    errors = [
        float((codec.decode(codec.encode(w, parse(name), range_=r)) - w).square().sum()) for r in ("absmax", "opt")
    ]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8", ml_dtypes.float8_e4m3fn), ("mxfp4", ml_dtypes.float4_e2m1fn)], ids=["e4m3fn", "e2m1fn"]
)
def test_small_floats_are_those_of_ml_dtypes(name: str, dtype: type) -> None:
    levels = parse(name).levels
    assert isinstance(levels, FloatLevels)
    theirs = np.arange(len(levels.values), dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.isfinite(theirs)
    assert np.array_equal(np.array(levels.values, dtype=np.float32)[finite], theirs[finite])
    # Rounding: every midpoint and its neighbours, and far outside. Halves differ: theirs go to even, ours down.
    middles = (np.unique(theirs[finite])[1:] + np.unique(theirs[finite])[:-1]) / 2
    u = np.concatenate([np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))])
    ours = levels.decode(levels.encode(torch.from_numpy(u))).numpy()
    assert np.array_equal(ours, u.astype(dtype).astype(np.float32))
    codes = levels.encode(torch.tensor([1e9, -1e9, 0.0, -0.0, 1e-9, -1e-9]))
    assert finite[codes.numpy()].all(), "a code that other readers take for NaN"
    assert codes[2:].tolist() == [0, 0, 0, 0]


def test_nf4_is_the_published_table() -> None:
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    levels = parse("nf4").levels
    assert isinstance(levels, TableLevels)
    assert levels.values == pytest.approx(published, abs=2e-7)


def test_ternary_finds_the_optimum() -> None:
    """The best scale is the mean of the k largest magnitudes for the k that maximizes (their sum)^2 / k."""
    w = gaussian(300, 700)  # more than one piece
    sums = w.abs().flatten().sort(descending=True).values.double().cumsum(0)
    explained = sums.square() / torch.arange(1, len(sums) + 1)
    best = float(w.double().square().sum() - explained.max())
    q = rounding.to_nearest(w, parse("ternary"), threads=2)
    assert float((codec.decode(q).double() - w).square().sum()) <= best * 1.0005
    assert float((q.codes == 0).double().mean()) == pytest.approx(0.459, abs=0.01)


def test_mxfp4_scales_are_powers_of_two_and_the_best_ones() -> None:
    w = gaussian(64, 32)
    q = codec.encode(w, parse("mxfp4"))
    assert isinstance(q.scale, torch.Tensor) and q.scale.dtype == torch.float8_e8m0fnu
    levels = q.scheme.levels

    def error(scale: torch.Tensor) -> torch.Tensor:
        v = levels.decode(levels.encode(w / scale))
        return (v * scale - w).square().sum(1)

    ours = error(q.scale.float())
    for exponent in range(-8, 4):
        assert bool((ours <= error(torch.full((64, 1), 2.0**exponent)) * (1 + 1e-5)).all())


def test_nvfp4_has_scales_that_are_quantized_themselves() -> None:
    q = codec.encode(gaussian(8, 64), parse("nvfp4"))
    assert isinstance(q.scale, QTensor)
    assert q.scale.codes.shape == (8, 4)
    assert q.scale.scale.shape == (1, 1)
    assert q.stored_bits == 8 * 64 * 4 + 8 * 4 * 8 + 32


def test_q4_k_decodes_as_llama_cpp_does() -> None:
    q = codec.encode(gaussian(4, 512), parse("q4_k"))
    theirs = np.stack([dequantize(row, GGMLQuantizationType.Q4_K) for row in q4_k_bytes(q)])
    assert np.array_equal(theirs.reshape(4, 512), codec.decode(q).numpy())


def q4_k_bytes(q: QTensor) -> np.ndarray:
    """[N, K/256 * 144]: f16 d, f16 dmin, 12 bytes of six-bit scales and minima, 128 bytes of codes, per super-block."""
    assert isinstance(q.scale, QTensor) and isinstance(q.min, QTensor)
    codes = q.codes.reshape(-1, 4, 2, 32).numpy()
    s, m = (part.codes.reshape(-1, 8).numpy() for part in (q.scale, q.min))
    d, dmin = q.scale.scale.reshape(-1, 1).numpy(), -q.min.scale.reshape(-1, 1).numpy()
    packed = np.concatenate(
        [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4], axis=1
    )
    nibbles = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(-1, 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, nibbles], axis=1)
    return blocks.reshape(q.shape[0], -1)


NEW_SCHEME = '''
"""Signed powers of two, for a shifter."""
from spicerack.numerics.levels import FloatLevels, TableLevels
from spicerack.numerics.scheme import Scheme
SCHEME = Scheme(name="shift3", levels=TableLevels((-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)), block=(1, 8))
'''


def test_a_new_scheme_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shift3.py").write_text(NEW_SCHEME)
    monkeypatch.setattr(schemes, "__path__", [*schemes.__path__, str(tmp_path)])
    plugins.names.cache_clear()
    try:
        scheme = parse("shift3")
        w = gaussian(4, 32)
        q = rounding.to_nearest(w, scheme)
        assert q.stored_bits == 4 * 32 * 3 + 16 * 16
        decoded = codec.decode(q)
        assert float((decoded - w).square().mean()) < 0.1
        again = codec.encode(decoded, scheme)
        assert torch.equal(codec.decode(again), decoded)
    finally:
        plugins.names.cache_clear()
