"""ggml's blocks and GGUF's table a second time, in numpy, by their descriptions: for where gguf-py is not installed.

It shares nothing with what writes them (`storage.gguf`): there codes are planes, packed and unpacked; here each weight
is asked for the byte and the bits in which it lies, and is then what llama.cpp computes in float32, in its order.

Sources: ggml-common.h and ggml-quants.c of llama.cpp (libggml 0.25.3); GGUF's specification, version 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_E32, _E64, _E128, _E256 = (np.arange(count) for count in (32, 64, 128, 256))
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value in the metadata -> its bytes; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9


def _bits(raw: Array, byte: Array, shift: Array, width: int) -> Array:
    """`width` bits for each weight, from bit `shift` of its `byte` of the block on: [M, B] -> uint8 [M, weights]."""
    codes = raw[:, byte]
    codes >>= shift.astype(np.uint8)
    codes &= 2**width - 1
    return codes


def _half(raw: Array, at: int) -> Array:
    """The float16 at a byte, float32 [M, 1]."""
    return raw[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _signed(codes: Array, middle: int) -> Array:
    """Codes less the one that is zero, float32."""
    return codes.astype(np.float32) - np.float32(middle)


def _spread(values: Array, size: int) -> Array:
    """One of each part of a block for each of its `size` weights."""
    return np.repeat(values, size, axis=1)


def _nibbles(raw: Array, at: int) -> Array:
    """32 codes of four bits: byte j has weights j and j + 16."""
    return _bits(raw, at + _E32 % 16, _E32 // 16 * 4, 4)


def _five(raw: Array, at: int) -> Array:
    """32 codes of five bits: the fifth ones first, bit j of a word for weight j."""
    codes: Array = _nibbles(raw, at + 4) | _bits(raw, at + _E32 // 8, _E32 % 8, 1) << 4
    return codes


def _crumbs(raw: Array, at: int) -> Array:
    """256 codes of two bits: byte m of each half has weights m, m + 32, m + 64 and m + 96."""
    return _bits(raw, at + 32 * (_E256 // 128) + _E256 % 32, _E256 % 128 // 32 * 2, 2)


def _pairs(raw: Array, at: int) -> Array:
    """256 codes of four bits: byte l of each quarter has weights l and l + 32."""
    return _bits(raw, at + 32 * (_E256 // 64) + _E256 % 32, _E256 % 64 // 32 * 4, 4)


def _k_scales(raw: Array, at: int) -> tuple[Array, Array]:
    """Eight scales and eight minima of six bits in twelve bytes."""
    b = raw[:, at : at + 12]
    s = np.concatenate([b[:, :4] & 63, b[:, 8:] & 15 | b[:, :4] >> 6 << 4], 1)
    m = np.concatenate([b[:, 4:8] & 63, b[:, 8:] >> 4 | b[:, 4:8] >> 6 << 4], 1)
    return s.astype(np.float32), m.astype(np.float32)


def _affine_k(raw: Array, codes: Array) -> Array:
    """Q4_K and Q5_K, once their codes are known."""
    s, m = _k_scales(raw, 4)
    return _spread(_half(raw, 0) * s, 32) * codes.astype(np.float32) - _spread(_half(raw, 2) * m, 32)


def _q5_k(raw: Array) -> Array:
    high = _bits(raw, 16 + _E256 % 32, _E256 // 32, 1)
    return _affine_k(raw, _pairs(raw, 48) | high << 4)


def _q2_k(raw: Array) -> Array:
    s, m = (raw[:, :16] & 15).astype(np.float32), (raw[:, :16] >> 4).astype(np.float32)
    codes = _crumbs(raw, 16).astype(np.float32)
    return _spread(_half(raw, 80) * s, 16) * codes - _spread(_half(raw, 82) * m, 16)


def _q3_k(raw: Array) -> Array:
    codes = _crumbs(raw, 32) | _bits(raw, _E256 % 32, _E256 // 32, 1) << 2
    part = np.arange(16)
    scales = _bits(raw, 96 + part % 8, part // 8 * 4, 4) | _bits(raw, 104 + part % 4, part // 4 * 2, 2) << 4
    return _spread(_half(raw, 108) * _signed(scales, 32), 16) * _signed(codes, 4)


def _q6_k(raw: Array) -> Array:
    half, run = _E256 // 128, _E256 % 128 // 32
    low = _bits(raw, 64 * half + 32 * (run % 2) + _E256 % 32, run // 2 * 4, 4)
    codes = low | _bits(raw, 128 + 32 * half + _E256 % 32, run * 2, 2) << 4
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    return _spread(_half(raw, 208) * scales, 16) * _signed(codes, 32)


def _tq1_0(raw: Array) -> Array:
    e = np.arange(256)
    late, last = e - 160, e - 240
    byte = np.where(e < 160, e % 32, np.where(e < 240, 32 + late % 16, 48 + last % 4))
    digit = np.where(e < 160, e // 32, np.where(e < 240, late // 16, last // 4))
    number = raw[:, byte] * (3**digit).astype(np.uint8)  # modulo 256
    return _signed(number.astype(np.uint16) * 3 >> 8, 1) * _half(raw, 52)


def _mxfp4(raw: Array) -> Array:
    return _E2M1[_nibbles(raw, 1)] * np.exp2(raw[:, :1].astype(np.float32) - 127)


def _nvfp4(raw: Array) -> Array:
    exponent, fraction = raw[:, :4] >> 3 & 15, (raw[:, :4] & 7).astype(np.float32)
    power = np.exp2(np.maximum(exponent, 1).astype(np.float32) - 7)
    scales = (fraction / 8 + (exponent > 0)) * power
    codes = _bits(raw, 4 + _E64 // 16 * 8 + _E64 % 8, _E64 % 16 // 8 * 4, 4)
    return _E2M1[codes] * _spread(scales, 16).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A type of ggml. block: weights. nbytes: of them. numbers: bytes [M, nbytes] -> float32 [M, block]."""

    block: int
    nbytes: int
    numbers: Callable[[Array], Array]


BLOCKS: dict[int, Blocks] = {
    2: Blocks(32, 18, lambda raw: _signed(_nibbles(raw, 2), 8) * _half(raw, 0)),
    3: Blocks(32, 20, lambda raw: _nibbles(raw, 4) * _half(raw, 0) + _half(raw, 2)),
    6: Blocks(32, 22, lambda raw: _signed(_five(raw, 2), 16) * _half(raw, 0)),
    7: Blocks(32, 24, lambda raw: _five(raw, 4) * _half(raw, 0) + _half(raw, 2)),
    8: Blocks(32, 34, lambda raw: raw[:, 2:].view(np.int8) * _half(raw, 0)),
    10: Blocks(256, 84, _q2_k),
    11: Blocks(256, 110, _q3_k),
    12: Blocks(256, 144, lambda raw: _affine_k(raw, _pairs(raw, 16))),
    13: Blocks(256, 176, _q5_k),
    14: Blocks(256, 210, _q6_k),
    20: Blocks(32, 18, lambda raw: _IQ4_NL[_nibbles(raw, 2)] * _half(raw, 0)),
    34: Blocks(256, 54, _tq1_0),
    35: Blocks(256, 66, lambda raw: _signed(_crumbs(raw, 0), 1) * _half(raw, 64)),
    39: Blocks(32, 17, _mxfp4),
    40: Blocks(64, 36, _nvfp4),
    41: Blocks(128, 18, lambda raw: (_signed(2 * _bits(raw, 2 + _E128 // 8, _E128 % 8, 1), 1)) * _half(raw, 0)),
    42: Blocks(64, 18, lambda raw: _signed(_bits(raw, 2 + _E64 // 4, _E64 % 4 * 2, 2), 1) * _half(raw, 0)),
}
"""ggml's number of a type -> how its blocks are decoded."""
_NAMES = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
_FLOATS: dict[int, tuple[str, int]] = {0: ("<f4", 4), 1: ("<f2", 2), 30: ("<u2", 2)}
_BF16 = 30


@dataclass(frozen=True, slots=True)
class Table:
    """The tensors of GGUF files, by name: number of the type, and rows of bytes [.., N, row_bytes].

    mappings: of the files, in which the rows lie.
    """

    tensors: dict[str, tuple[int, Array]]
    mappings: list[mmap.mmap]

    @classmethod
    def of(cls, files: list[Path]) -> Table:
        """Of all files of a model, which are those that were just written: whatever is wrong with them raises."""
        mappings: list[mmap.mmap] = []
        tensors: dict[str, tuple[int, Array]] = {}
        for path in files:
            with path.open("rb") as file:
                mappings.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            tensors |= _table(mappings[-1])
        return cls(tensors, mappings)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def forget(self) -> None:
        """What was mapped need not stay in memory."""
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)

    def type(self, name: str) -> str:
        """By its number in ggml.h."""
        return _NAMES[self.tensors[name][0]]

    def rows(self, name: str) -> Array:
        """As they lie there: bytes."""
        return self.tensors[name][1]

    def numbers(self, name: str, rows: Array) -> Array:
        """Some rows of a tensor, decoded: float32, those of F16 float16."""
        number = self.tensors[name][0]
        if number in BLOCKS:
            kind = BLOCKS[number]
            return kind.numbers(rows.reshape(-1, kind.nbytes)).reshape(*rows.shape[:-1], -1)
        values = np.ascontiguousarray(rows).view(_FLOATS[number][0])
        return (values.astype(np.uint32) << 16).view(np.float32) if number == _BF16 else values


def _table(data: mmap.mmap) -> dict[str, tuple[int, Array]]:
    """The tensors of one file."""
    at = 8

    def take(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return int(value)

    def text() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            item, count = take("I"), take("Q")
            for _ in range(count if item == _STRING else 0):
                text()
            at += 0 if item == _STRING else count * _SCALARS[item]
        else:
            at += _SCALARS[kind]

    count, keys, alignment = take("Q"), take("Q"), 32
    for _ in range(keys):
        key, kind = text(), take("I")
        if key == b"general.alignment":
            alignment = struct.unpack_from("<I", data, at)[0]
        skip(kind)
    entries = [(text().decode(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(count)]
    start = -(-at // alignment) * alignment
    return {name: (number, _mapped(data, start + offset, shape, number)) for name, shape, number, offset in entries}


def _mapped(data: mmap.mmap, begin: int, shape: list[int], number: int) -> Array:
    """Rows of bytes [.., N, row_bytes]; shape: as files have it, the weights of a row first."""
    block, nbytes = (BLOCKS[number].block, BLOCKS[number].nbytes) if number in BLOCKS else (1, _FLOATS[number][1])
    rows = [*shape[:0:-1], shape[0] // block * nbytes]
    return np.frombuffer(data, np.uint8, int(np.prod(rows)), begin).reshape(rows)
