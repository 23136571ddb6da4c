"""Where the bits of a block lie: parts of a block (codes, scales, minima) to its bytes and back. Nothing is judged.

A block is fields, one behind the other. Nearly all are planes: codes lie `stride` to a run, and the bits of as many
runs as fit share its bytes, the first run lowest:

    planes(4, 16)   byte j = u[j] | u[j + 16] << 4                          Q4_0
    planes(2, 32)   byte j = u[j] | u[j + 32] << 2 | u[j + 64] << 4 ...     Q2_K
    planes(1, 1)    bit i % 8 of byte i // 8                                Q1_0

Codes of more bits than a plane lie in two fields, the upper bits apart. Parts are unsigned bytes here, and float16:

    u       codes            d       scale, float16            s       scales that are quantized themselves
    e       power of two     m       minimum, float16          t       minima that are

Sources: ggml-common.h and ggml-quants.c of llama.cpp (libggml 0.25.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from spicerack.numerics import native

Parts = dict[str, torch.Tensor]
"""Part -> uint8 or float16 [M, how many a block has]."""


class Field(Protocol):
    """Some bytes of a block."""

    @property
    def nbytes(self) -> int:
        """How many."""

    def pack(self, parts: Mapping[str, torch.Tensor], /) -> torch.Tensor:
        """uint8 [M, nbytes]."""

    def unpack(self, raw: torch.Tensor, parts: Parts, /) -> None:
        """Inverse of `pack`: uint8 [M, nbytes], whose parts are set, or completed by the bits that are here."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Bits shift..shift+bits-1 of a part of `count` codes, in planes; see the module.

    part    whose bits they are
    count   codes of a block
    bits    a code has here: 1, 2, 4 or 8
    stride  codes of a run
    shift   of the lowest bit that is here
    """

    part: str
    count: int
    bits: int
    stride: int = 1
    shift: int = 0

    @property
    def nbytes(self) -> int:
        """See `Field.nbytes`."""
        return self.count * self.bits // 8

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Field.pack`; codes of bits that lie elsewhere are cut off."""
        codes = parts[self.part]
        if self.bits == 8:
            return codes
        runs = (codes >> self.shift) & 2**self.bits - 1
        runs = runs.reshape(len(codes), -1, 8 // self.bits, self.stride)
        packed: torch.Tensor = runs[:, :, 0]
        for place in range(1, 8 // self.bits):
            packed = packed | runs[:, :, place] << place * self.bits
        return packed.reshape(len(codes), -1)

    def unpack(self, raw: torch.Tensor, parts: Parts) -> None:
        """See `Field.unpack`."""
        if self.bits == 8:
            parts[self.part] = raw
            return
        packed = raw.reshape(len(raw), -1, 1, self.stride)
        places = [packed >> place * self.bits & 2**self.bits - 1 for place in range(8 // self.bits)]
        codes = torch.cat(places, 2).reshape(len(raw), -1) << self.shift
        parts[self.part] = parts[self.part] | codes if self.part in parts else codes


@dataclass(frozen=True, slots=True)
class Half:
    """A part of one float16."""

    part: str
    nbytes: int = 2

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Field.pack`."""
        return parts[self.part].contiguous().view(torch.uint8)

    def unpack(self, raw: torch.Tensor, parts: Parts) -> None:
        """See `Field.unpack`."""
        parts[self.part] = raw.contiguous().view(torch.float16)


@dataclass(frozen=True, slots=True)
class SixBits:
    """Eight scales and eight minima of six bits each in twelve bytes, of Q4_K and Q5_K.

    Bytes 0..3 are scales 0..3, 4..7 minima 0..3; their two upper bits are those of scales and minima 4..7, whose four
    lower bits share bytes 8..11.
    """

    nbytes: int = 12

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Field.pack`."""
        s, t = parts["s"], parts["t"]
        first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (s, t)]
        return torch.cat([*first, s[:, 4:] & 15 | t[:, 4:] << 4], 1)

    def unpack(self, raw: torch.Tensor, parts: Parts) -> None:
        """See `Field.unpack`."""
        s, t, both = raw.split(4, 1)
        parts["s"] = torch.cat([s & 63, both & 15 | s >> 6 << 4], 1)
        parts["t"] = torch.cat([t & 63, both >> 4 | t >> 6 << 4], 1)


@dataclass(frozen=True, slots=True)
class ScaleAndMinimum:
    """Sixteen scales of four bits and as many minima, a byte for both, of Q2_K."""

    nbytes: int = 16

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Field.pack`."""
        return parts["s"] | parts["t"] << 4

    def unpack(self, raw: torch.Tensor, parts: Parts) -> None:
        """See `Field.unpack`."""
        parts["s"], parts["t"] = raw & 15, raw >> 4


@dataclass(frozen=True, slots=True)
class Trits:
    """256 codes 0..2 of TQ1_0, as digits of base 3: five to each of 48 bytes, four to each of the last four.

    A byte is ceil(v 256 / 243) of a number v of five digits: the byte times 3^n, as a fraction of 256, then begins with
    digit n. Codes are those of runs of 32 (160 in all), of 16 (80), and of 4 (16), the first run the highest digit.
    Thirteen of 256 bytes are no such v and stand for the digits of another: they are read, and never written.
    """

    nbytes: int = 52

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Field.pack`."""
        return torch.cat(
            [self._bytes(run, size) for run, size in zip(parts["u"].split([160, 80, 16], 1), _RUNS, strict=True)], 1
        )

    def unpack(self, raw: torch.Tensor, parts: Parts) -> None:
        """See `Field.unpack`."""
        digits = []
        for run, count in zip(raw.split(list(_RUNS), 1), (5, 5, 4), strict=True):
            for place in range(count):
                digits.append(((run * 3**place).to(torch.int16) * 3 >> 8).to(torch.uint8))  # bytes wrap at 256
        parts["u"] = torch.cat(digits, 1)

    @staticmethod
    def _bytes(codes: torch.Tensor, size: int) -> torch.Tensor:
        """Codes [M, digits of `size` bytes] -> uint8 [M, size]; what is missing of five digits are zeros."""
        number = torch.zeros((len(codes), size), dtype=torch.int32, device="cpu")
        for place, run in enumerate(codes.split(size, 1)):
            number += run.to(torch.int32) * 3 ** (4 - place)
        return ((number * 256 + 242) // 243).to(torch.uint8)


_RUNS = (32, 16, 4)
"""Bytes of TQ1_0 whose codes lie in runs of as many."""
_D, _M = Half("d"), Half("m")
LAYOUTS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (_D, Planes("u", 32, 4, 16)),
    "Q4_1": (_D, _M, Planes("u", 32, 4, 16)),
    "Q5_0": (_D, Planes("u", 32, 1, 1, shift=4), Planes("u", 32, 4, 16)),
    "Q5_1": (_D, _M, Planes("u", 32, 1, 1, shift=4), Planes("u", 32, 4, 16)),
    "Q8_0": (_D, Planes("u", 32, 8)),
    "Q2_K": (ScaleAndMinimum(), Planes("u", 256, 2, 32), _D, _M),
    "Q3_K": (
        Planes("u", 256, 1, 32, shift=2), Planes("u", 256, 2, 32), Planes("s", 16, 4, 8),
        Planes("s", 16, 2, 4, shift=4), _D,
    ),
    "Q4_K": (_D, _M, SixBits(), Planes("u", 256, 4, 32)),
    "Q5_K": (_D, _M, SixBits(), Planes("u", 256, 1, 32, shift=4), Planes("u", 256, 4, 32)),
    "Q6_K": (Planes("u", 256, 4, 64), Planes("u", 256, 2, 32, shift=4), Planes("s", 16, 8), _D),
    "IQ4_NL": (_D, Planes("u", 32, 4, 16)),
    "TQ1_0": (Trits(), _D),
    "TQ2_0": (Planes("u", 256, 2, 32), _D),
    "MXFP4": (Planes("e", 1, 8), Planes("u", 32, 4, 16)),
    "NVFP4": (Planes("s", 4, 8), Planes("u", 64, 4, 8)),
    "Q1_0": (_D, Planes("u", 128, 1)),
    "Q2_0": (_D, Planes("u", 64, 2)),
}  # fmt: skip
"""ggml's name -> the fields of a block, in their order."""


CODES = "u"
"""The part that is nearly all of a block: the compiled module moves its planes (`numerics.native.Blocks`), all at once.
The rest, and the digits of TQ1_0, are a few operations of torch."""


def nbytes_of(name: str) -> int:
    """Bytes of a block of the type called `name`."""
    return sum(field.nbytes for field in LAYOUTS[name])


@cache
def planes_of(name: str) -> native.Blocks | None:
    """Where the codes of a type lie; None where they are no planes."""
    planes, count = [], 0
    for field, at in _placed(name):
        if isinstance(field, Planes) and field.part == CODES:
            planes.append((field.bits, field.stride, field.shift, at))
            count = field.count
    return native.Blocks(count, nbytes_of(name), tuple(planes)) if planes else None


def pack(name: str, parts: Mapping[str, torch.Tensor], stream: int | None = None) -> torch.Tensor:
    """Parts of M blocks of the type called `name` -> their bytes, uint8 [M, bytes of a block].

    stream: bits of codes that lie in words, int32 [M, codes * bits / 32]; None where they are bytes.
    """
    codes, planes, bits = parts[CODES], planes_of(name), stream or 8
    raw = torch.empty((len(codes), nbytes_of(name)), dtype=torch.uint8, device="cpu")
    if planes is not None:
        native.to_blocks(_words(codes), bits, planes, raw, threads=torch.get_num_threads())
    elif stream is not None:
        count = codes.shape[1] * 32 // bits
        parts = {**parts, CODES: native.unpack(codes, bits, count)}
    for field, at in _placed(name):
        if planes is None or not isinstance(field, Planes) or field.part != CODES:
            raw[:, at : at + field.nbytes] = field.pack(parts)
    return raw


def unpack(name: str, raw: torch.Tensor, stream: int | None = None) -> Parts:
    """Inverse of `pack`: uint8 [M, bytes of a block] -> the parts."""
    parts, planes = Parts(), planes_of(name)
    for field, at in _placed(name):
        if planes is None or not isinstance(field, Planes) or field.part != CODES:
            field.unpack(raw[:, at : at + field.nbytes], parts)
    if planes is None:
        parts[CODES] = parts[CODES] if stream is None else native.pack(parts[CODES], stream)
        return parts
    words = native.from_blocks(raw, stream or 8, planes, threads=torch.get_num_threads())
    parts[CODES] = words.view(torch.uint8) if stream is None else words
    return parts


def _placed(name: str) -> Iterator[tuple[Field, int]]:
    """The fields of a block, each with its first byte."""
    at = 0
    for field in LAYOUTS[name]:
        yield field, at
        at += field.nbytes


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Codes in words: those of bytes are a stream of eight bits."""
    codes = codes.contiguous()
    if codes.dtype == torch.uint8 and codes.data_ptr() % 4:
        codes = codes.clone()  # words want aligned memory
    return codes.view(torch.int32)
