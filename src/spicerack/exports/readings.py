"""What readers give of what was written: integers and the floats that they are multiplied with, or values.

Readers decode some rows of each tensor themselves (`sampled`), and all where they do not say what they decode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.holding import spread


@dataclass(frozen=True, slots=True)
class Words:
    """Codes [N, K] in rows of words, the lowest bits first: what most formats say that they have.

    data     int32 [N, words]
    bits     of a code
    columns  K
    """

    data: torch.Tensor
    bits: int
    columns: int

    def codes(self) -> torch.Tensor:
        """uint8 [N, K]."""
        return torch.from_numpy(stream(self.data.numpy(), self.bits)[:, : self.columns])


def stream(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Words [R, W] of 32 bits -> the codes uint8 [R, 32 W // bits] that lie in their stream, lowest bits first.

    It shares nothing with what packs.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    count = octets.shape[1] * 8 // bits
    codes = np.empty((len(octets), count), np.uint8)
    if 8 % bits == 0:  # no code lies in two bytes
        for place in range(8 // bits):
            np.bitwise_and(octets >> place * bits, 2**bits - 1, out=codes[:, place :: 8 // bits])
        return codes
    for row, line in zip(codes, octets, strict=True):
        flags = np.unpackbits(line, bitorder="little")[: count * bits].reshape(count, bits)
        row[:] = np.packbits(flags, axis=1, bitorder="little")[:, 0]
    return codes


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix [N, K] as a reader takes it apart: w = (codes - zeros) * scales, or codes * scales + biases.

    To compare integers takes a fourth of the memory that the weights do, and an eighth of the time.

    codes    uint8 [N, K], from 0, or the words of a stream that hold them
    scales   float [N, G] of as many groups of a row, or [1, 1]
    zeros    float, like scales, or one for all
    biases   float like scales; None for none
    samples  some rows as the reader's own code computes them from these: the first one's number, and float [R, K]
    """

    codes: torch.Tensor | Words
    scales: torch.Tensor
    zeros: torch.Tensor
    biases: torch.Tensor | None = None
    samples: Sequence[tuple[int, torch.Tensor]] = ()

    def values(self) -> torch.Tensor:
        """The weights, float32 [N, K]."""
        codes = self.codes.codes() if isinstance(self.codes, Words) else self.codes
        n, k = codes.shape
        grid = self.scales.shape
        wide = [spread(part.float().expand(grid), (n, k)) for part in (self.zeros, self.scales)]
        values = (codes.float() - wide[0]) * wide[1]
        return values if self.biases is None else values + spread(self.biases.float(), (n, k))


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix, or a stack of them below each other, that a reader decodes some rows at a time.

    count    rows
    decoded  first row, and the one behind the last -> these, float [.., K]
    parts    the bytes that it decodes, all of them, as we take them apart: then it decodes those of `sampled` alone;
             None where it decodes all
    """

    count: int
    decoded: Callable[[int, int], torch.Tensor]
    parts: Undecoded | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one tensor that a reader decodes one at a time. matrix: the number of one -> its rows."""

    matrix: Callable[[int], Rows]


Weights = Callable[[str], torch.Tensor | Grid | Rows | Stack]
"""Name of a tensor in the source (`X.weight` of what is packed) -> its values, [.., N, K] in a float type, or what they
are computed from; a float tensor as it is stored. Raises KeyError for one that is not there."""
_SAMPLED = 1 << 15
"""Weights of each of three pieces of a matrix that a reader decodes itself: some rows, of each tensor of a model."""


def sampled(name: str, shape: tuple[int, int], multiple: int = 1) -> list[tuple[int, int]]:
    """Rows of a matrix [N, K] that a reader decodes: the first ones, some that its name draws, and the last ones.

    Of each piece the first row, and the one behind the last, in multiples; all in one piece where they are few.
    """
    n, k = shape
    count = -(-max(_SAMPLED // k, 1) // multiple) * multiple
    if 3 * count >= n:
        return [(0, n)]
    middle = random.Random(name).randrange(count, n - 2 * count + 1) // multiple * multiple
    last = (n - count) // multiple * multiple
    return [(0, count), (middle, middle + count), (last, min(last + count, n))]
