"""The named schemes: their levels against other projects' tables, and that a new one is one file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import LlamaFolder
from dropped import dropped

import spicerack
from spicerack import plugins
from spicerack.algorithms import solver
from spicerack.errors import ShapeError
from spicerack.numerics import codec, packed, rounding, schemes
from spicerack.numerics.levels import FloatLevels, TableLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse

NAMES = plugins.names("numerics.schemes")


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_shelf() -> None:
    assert set(NAMES) >= {"ternary", "nf4", "fp8", "mxfp4", "nvfp4"}
    assert set(NAMES) >= {
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "q4_1",
        "q5_1",
        "iq4_nl",
        "ternaryg256",
        "q1_0",
        "q2_0",
    }


# Mean squared error of normal weights, absmax and opt; others 0.02. With the search q2_k to q6_k are near to what
# llama.cpp's own quantizers leave (root mean squares .301, .151, .0725, .0365, .0179).
ERRORS = {
    "ternary": (0.95, 0.2), "ternarya8": (0.95, 0.2), "fp8": (0.001, 0.001), "ternaryg256": (0.7, 0.2),
    "q1_0": (5.5, 0.37), "q2_0": (0.17, 0.13), "q2_k": (0.11, 0.091), "q3_k": (0.025, 0.0225),
    "q4_k": (0.0065, 0.0056), "q5_k": (0.0016, 0.0014), "q6_k": (0.0004, 0.00032),
    "q4_1": (0.0065, 0.0056), "q5_1": (0.0016, 0.0013), "iq4_nl": (0.0067, 0.006),
}  # fmt: skip


@pytest.mark.parametrize("range_", ["absmax", "opt"])
@pytest.mark.parametrize("name", NAMES)
def test_every_scheme_encodes_and_decodes(name: str, range_: codec.Range) -> None:
    w = gaussian(16, 512)
    scheme = parse(name)
    q = codec.encode(w, scheme, range_=range_)
    error = float((codec.decode(q) - w).square().mean())
    assert error < ERRORS.get(name, (0.02, 0.02))[range_ == "opt"]
    assert int(q.codes.max()) <= 2**scheme.bits - 1
    solved = rounding.to_nearest(w, scheme, range_=range_, threads=2)
    assert torch.equal(solved.codes, q.codes)
    assert torch.equal(codec.decode(solved), codec.decode(q))


@pytest.mark.parametrize("name", NAMES)
def test_searching_is_not_worse_than_absmax(name: str) -> None:
    """On the whole: where scales are quantized too, single groups may lose a little."""
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


NEW_SCHEME = '''
"""Signed powers of two, for a shifter."""
from spicerack.numerics.levels import TableLevels
from spicerack.numerics.scheme import Scheme
SCHEME = Scheme(name="shift3", levels=TableLevels((-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)), group=(1, 8))
'''


def test_a_new_scheme_is_one_file(tmp_path: Path) -> None:
    with dropped(schemes, tmp_path, "shift3", NEW_SCHEME):
        scheme = parse("shift3")
        w = gaussian(4, 32)
        q = rounding.to_nearest(w, scheme)
        assert q.stored_bits == 4 * 32 * 3 + 16 * 16
        decoded = codec.decode(q)
        assert float((decoded - w).square().mean()) < 0.1
        again = codec.encode(decoded, scheme)
        assert torch.equal(codec.decode(again), decoded)


# Levels of its own: nothing but this file knows that a code stands for two weights.
NEW_LEVELS = '''
"""A codebook: eight directions of pairs of weights, each in two lengths, and four longer ones on the axes."""
import math
from dataclasses import dataclass
import torch
from spicerack.numerics.scheme import Scheme

def _pair(length, turn):
    return length * math.cos(turn), length * math.sin(turn)

PAIRS = [(0.0, 0.0)] + [_pair(r, math.tau * (i + r / 2) / 8) for r in (0.6, 1.2) for i in range(8)]
PAIRS += [_pair(2.0, math.tau * i / 4) for i in range(4)]

@dataclass(frozen=True)
class PairLevels:
    lo: int = 0
    hi: int = len(PAIRS) - 1
    bits: int = 5
    weights: int = 2
    lowest: float = -2.0
    highest: float = 2.0
    mirrored: bool = True
    integers: None = None

    def encode(self, u, zero=0.0):
        pairs = u.unflatten(-1, (-1, 2))
        return torch.cdist(pairs, torch.tensor(PAIRS).expand(*pairs.shape[:-2], -1, -1)).argmin(-1)

    def decode(self, codes, zero=0.0):
        return torch.tensor(PAIRS)[codes.long()].flatten(-2)

SCHEME = Scheme(name="pairs", levels=PairLevels(), group=(1, 32))
'''


def test_a_codebook_is_one_file_from_its_name_to_the_product(tmp_path: Path, llama_folder: LlamaFolder) -> None:
    folder = llama_folder()
    with dropped(schemes, tmp_path, "pairs", NEW_LEVELS):
        w = gaussian(16, 64)
        q = codec.encode(w, parse("pairs"))
        assert q.shape == (16, 64) and q.codes.shape == (16, 32) and q.stored_bits == 16 * 32 * 5 + 16 * 2 * 16
        pairs = q.scheme.levels.decode(torch.arange(21)).reshape(21, 2)
        scaled = (w / q.plain_scale.float().repeat_interleave(32, 1)).reshape(16, 32, 2)
        assert torch.equal(torch.cdist(scaled, pairs.expand(16, 21, 2)).argmin(-1), q.codes.long())
        assert torch.equal(torch.cat(list(codec.decode_rows(q, 3))), codec.decode(q))
        back = packed.unpack(q.scheme, q.shape, packed.pack(q))
        assert torch.equal(back.codes, q.codes)
        spicerack.quantize(folder, "pairs", output=tmp_path / "out")
        model, floats = spicerack.load(tmp_path / "out"), spicerack.load(folder)
        layer = model.model.layers[0].mlp.down_proj
        exact = rounding.to_nearest(floats.model.layers[0].mlp.down_proj.weight.detach(), parse("pairs"))
        assert torch.equal(layer.weight, codec.decode(exact))
        x = gaussian(3, 128)
        assert torch.allclose(layer(x), x @ codec.decode(exact).t(), atol=1e-5)
        assert solver.get("gptq").obstacle(q.scheme) == "its codes stand for 2 weights each"
        with pytest.raises(ShapeError, match="blocks of 33 columns are no whole codes of pairs"):
            dataclasses.replace(parse("pairs"), group=(1, 33)).check_shape("w", (2, 66))
