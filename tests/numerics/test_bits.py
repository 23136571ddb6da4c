"""Packing: golden bytes, a bit-by-bit reference, and compressed-tensors' own packer as oracle."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from spicerack.errors import ShapeError
from spicerack.numerics.bits import pack, unpack, word_count

WIDTHS = range(1, 9)


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bit_by_bit(row: list[int], bits: int) -> list[int]:
    """The definition, in Python integers: the whole row is one number, cut into words."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(word_count(len(row), bits))]


def test_golden_bytes() -> None:
    four = pack(torch.arange(16, dtype=torch.uint8).reshape(1, 16), 4)
    assert four.view(torch.uint8).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    # 1..7, 0 in three bits, most significant first: 000 111 110 101 100 011 010 001, then the padding
    three = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3)
    assert three.view(torch.uint8).tolist() == [[0b11010001, 0b01011000, 0b00011111, 0]]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 130), st.integers(0, 2**31))
def test_pack_is_the_definition_and_unpack_its_inverse(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits=bits, seed=seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert [[w & 0xFFFFFFFF for w in row] for row in words.tolist()] == [
        bit_by_bit(row, bits) for row in codes.tolist()
    ]
    assert torch.equal(unpack(words, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [32, 172, 33])
def test_compressed_tensors_reads_and_writes_the_same(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits=bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, torch.Size((5, columns))), signed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_leading_axes_strides_and_rows(bits: int) -> None:
    codes = random_codes(3, 40, 5, bits=bits).transpose(1, 2)  # [3, 5, 40], not contiguous
    words = pack(codes, bits)
    assert words.shape == (3, 5, word_count(40, bits))
    assert torch.equal(words[1], pack(codes[1], bits))
    assert torch.equal(unpack(words[:, [4, 0]], bits, 40), codes[:, [4, 0]])


def test_wrong_size_is_refused() -> None:
    with pytest.raises(ShapeError, match="40 codes of 3 bits fill 4 words, not 5"):
        unpack(torch.zeros(2, 5, dtype=torch.int32), 3, 40)
