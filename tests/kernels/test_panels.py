"""Laying out stored codes: what the panels hold, byte for byte, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spicerack import _native
from spicerack.errors import ShapeError
from spicerack.kernels import panels
from spicerack.kernels.panels import Room, Tiling
from spicerack.numerics import bits
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Order, Undecoded

SHAPES = [(16, 32), (80, 64), (1, 1), (4, 96), (20, 33), (84, 192), (164, 129), (48, 7)]
SCALE, FILLER = 0.5, 0xFF


def tiles_of(u: NDArray[np.uint8], width: int, tiling: Tiling) -> NDArray[np.uint8]:
    """The tiles of codes u [N, K], written from native/kernels/kernel.h."""
    rows = 80 if tiling == "trits" else 16
    padded = np.zeros((-(-u.shape[0] // rows) * rows, -(-u.shape[1] // 32) * 32), np.uint8)
    padded[: u.shape[0], : u.shape[1]] = u
    tiles = padded.reshape(-1, 16, padded.shape[1] // 32, 8, 4).transpose(
        0, 2, 3, 1, 4
    )  # panel, tile, quad, row, column
    if tiling == "trits":
        fives = tiles.reshape(-1, 5, *tiles.shape[1:])
        return sum(fives[:, p] * np.uint8(3**p) for p in range(5)).reshape(*fives.shape[::2][:2], -1)  # type: ignore
    return np.concatenate(list(planes(tiles, width)), axis=2)


def planes(tiles: NDArray[np.uint8], width: int) -> Iterator[NDArray[np.uint8]]:
    low = 0
    for plane in (8, 4, 2, 1):
        if width & plane:
            part = (tiles >> low & (1 << plane) - 1).reshape(*tiles.shape[:2], plane, 8 // plane, 64)
            yield sum(part[:, :, :, m] << m * plane for m in range(8 // plane)).reshape(*tiles.shape[:2], -1)  # type: ignore
            low += plane


def stored(u: NDArray[np.uint8], scheme: Scheme, order: Order) -> torch.Tensor:
    codes = torch.from_numpy(u)
    if order == "bytes":
        return codes.view(torch.int8) + scheme.levels.lo
    if order == "quarters":
        return sum(
            (part << 2 * place for place, part in enumerate(codes.chunk(4))), torch.zeros_like(codes[: len(u) // 4])
        )
    words = bits.pack(codes, scheme.bits)
    columns, used = u.shape[1], words.view(torch.uint8)
    for bit in range(columns * scheme.bits, used.shape[1] * 8):  # what fills a row up may be anything
        used[:, bit // 8] |= FILLER & 1 << bit % 8
    return words


def undecoded(u: NDArray[np.uint8], scheme: Scheme, order: Order) -> Undecoded:
    n, k = u.shape
    return Undecoded(scheme, (n, k), order, stored(u, scheme, order), torch.full(scheme.scale_shape((n, k)), SCALE))


def cases() -> Iterator[tuple[Scheme, Order, Tiling]]:
    for width in range(2, 9):
        half = 1 << width - 1
        for lo in (-half, 0):
            scheme = Scheme(f"u{width}{lo}", IntLevels(lo, lo + 2 * half - 1))
            yield scheme, "stream", "planes"
            if lo:
                yield scheme, "bytes", "planes"
    ternary = Scheme("t", IntLevels(-1, 1), group=(None, None))
    for tiling in ("planes", "trits"):
        for order in ("stream", "bytes", "quarters"):
            yield ternary, order, tiling  # type: ignore[misc]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scheme", "order", "tiling"), list(cases()), ids=lambda value: str(value))
def test_stored_codes_become_the_tiles_of_the_specification(
    scheme: Scheme, order: Order, tiling: Tiling, shape: tuple[int, int]
) -> None:
    if order == "quarters" and shape[0] % 4:
        pytest.skip("rows come in fours")
    random = np.random.default_rng(0)
    u = random.integers(0, scheme.levels.hi - scheme.levels.lo + 1, shape, np.uint8)
    staged = [panels.stage(undecoded(u, scheme, order), tiling, room) for room in (None, Room(4 << 20))]
    for one in staged:
        one.tensors["codes"].fill_(FILLER)
    assert panels.fill(staged, 2) == [True, True]
    expected = tiles_of(u, scheme.bits, tiling)
    for one in staged:
        assert np.array_equal(one.tensors["codes"].numpy(), expected)
        lanes = one.tensors["scale"][:, 0].flatten()
        assert lanes[: shape[0]].eq(SCALE).all() and lanes[shape[0] :].eq(0).all()


@pytest.mark.parametrize("tiling", ["planes", "trits"])
@pytest.mark.parametrize("order", ["stream", "bytes", "quarters"])
def test_a_code_that_is_no_level_is_noticed_wherever_it_is(order: Order, tiling: Tiling) -> None:
    ternary = Scheme("t", IntLevels(-1, 1), group=(None, None))
    for row, column in ((0, 0), (83, 190), (40, 100), (83, 0)):
        u = np.full((84, 191), 2, np.uint8)
        good = panels.stage(undecoded(u, ternary, order), tiling)
        u[row, column] = 3
        bad = panels.stage(undecoded(u, ternary, order), tiling)
        assert panels.fill([good, bad], 1) == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lanes_of_scales_and_zero_points(dtype: torch.dtype) -> None:
    scheme = Scheme("z", IntLevels(-8, 7), group=(1, 32), zero=True)
    random = torch.Generator().manual_seed(0)
    scale = torch.randn(20, 3, generator=random).to(dtype)
    zero = torch.randint(-8, 8, (20, 3), generator=random, dtype=torch.int8)
    words = torch.zeros(20, 12, dtype=torch.int32)
    staged = panels.stage(Undecoded(scheme, (20, 96), "stream", words, scale, zero))
    assert panels.fill([staged], 3) == [True]
    for name, values in (("scale", scale), ("zero", zero + 8)):
        lanes = staged.tensors[name].transpose(1, 2).reshape(32, 3)
        assert torch.equal(lanes[:20], values.to(lanes.dtype)) and lanes[20:].eq(0).all()


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    scheme, words, scale = Scheme("w", IntLevels(-8, 7)), torch.zeros(16, 4, dtype=torch.int32), torch.ones(16, 1)
    for data, part in ((words[:15], scale), (words[:, :3], scale), (words.to(torch.int64), scale), (words, scale[:15])):
        with pytest.raises(ShapeError):
            Undecoded(scheme, (16, 32), "stream", data, part)
    with pytest.raises(ShapeError, match="quarters"):
        Undecoded(scheme, (18, 32), "quarters", torch.zeros(4, 32, dtype=torch.uint8), torch.ones(18, 1))
    data, tiles = words.view(torch.uint8), torch.zeros(1, 1, 256, dtype=torch.uint8)
    _native.Packing(data, 0, 16, 32, 4, 8, 15, 4, tiles)
    for arguments in (
        (data, 0, 17, 32, 4, 8, 15, 4, tiles),
        (data, 0, 16, 1 << 60, 4, 8, 15, 4, tiles),
        (data, 0, 16, 33, 4, 8, 15, 4, tiles),
        (data, 3, 16, 32, 4, 8, 15, 4, tiles),
        (data, 2, 16, 32, 4, 8, 15, 4, tiles),
        (data, 0, 16, 32, 4, 8, 15, 8, tiles),
        (data, 0, 16, 32, 4, 8, 15, panels.TRITS, tiles),
        (data, 0, 16, 32, 4, 8, 15, 4, tiles[:, :, :255].contiguous()),
    ):
        with pytest.raises(ValueError, match=r"codes|order|matrix|bits|trits|quarters"):
            _native.Packing(*arguments)
    packing = _native.Packing(data, 0, 16, 32, 4, 8, 15, 4, tiles)
    lanes = torch.zeros(1, 1, 64, dtype=torch.uint8)
    for values, size, out in (
        (torch.zeros(15, 4), 4, lanes),
        (torch.zeros(16, 8), 4, lanes),
        (torch.zeros(16, 3), 3, lanes),
    ):
        with pytest.raises(ValueError, match=r"lanes|values"):
            packing.add_lanes(values.to(torch.uint8), size, 0, out)


def test_a_room_gives_what_it_has_and_then_what_torch_has() -> None:
    for huge in (True, False):
        room = Room(5 << 20, huge=huge)
        taken = [room.take(nbytes).fill_(place) for place, nbytes in enumerate((1, 2 << 20, 100, 1 << 20, 8 << 20))]
        panels.merge([room])
        assert all(memory.eq(place).all() for place, memory in enumerate(taken))
        assert all(memory.data_ptr() % 64 == 0 for memory in taken)
