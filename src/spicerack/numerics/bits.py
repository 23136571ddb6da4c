"""Codes of 1 to 8 bits in 32-bit words: the specification of packing, for every format and kernel.

A row of codes is one dense little-endian bit stream: element i occupies bits [i*b, (i+1)*b), bit k of the stream is bit
k % 32 of word k // 32, and the last word is filled up with zeros. Codes do cross word borders (3, 5, 6 and 7 bits).
compressed-tensors packs the same way since 0.18, so its tensors are these words. On the CPU the native module packs and
unpacks (`native.pack`); what is here decodes on any device.

What is given up. Codes that cross a border of words cost a shift more than ten 3-bit codes to a word would, as others
keep them; no bit is wasted for that.
"""

from __future__ import annotations

import sys

import torch

from spicerack.errors import ShapeError
from spicerack.numerics.scheme import word_count

if sys.byteorder != "little":
    raise ImportError("spicerack views words as bytes and needs a little-endian machine")


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., R, C], every code below 2^bits -> int32 [..., R, word_count(C, bits)].

    bits: 1 to 8. A code that is too large spills into its neighbours: whoever has others than a scheme's must check.
    """
    *leading, columns = codes.shape
    if bits < 8:
        codes = _eight_in_bytes(codes, bits)
    missing = 4 * word_count(columns, bits) - codes.shape[-1]  # negative: bytes of the last eight that hold no code
    stream = torch.nn.functional.pad(codes, (0, missing))
    return stream.reshape(-1).view(torch.int32).reshape(*leading, word_count(columns, bits))


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of `pack`: int32 [..., R, word_count(columns, bits)] -> uint8 [..., R, columns]. Raises ShapeError.

    8-bit codes may share memory with `words`.
    """
    if words.shape[-1] != word_count(columns, bits):
        raise ShapeError(
            f"{columns} codes of {bits} bits fill {word_count(columns, bits)} words, not {words.shape[-1]}"
        )
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        codes = stream
    elif 8 % bits == 0:
        codes = _split_bytes(stream, bits)
    else:
        codes = _split_eights(stream, bits, -(-columns // 8))
    return codes[..., :columns].contiguous()


def _eight_in_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., C] -> uint8 [..., ceil(C / 8) bits], with C filled up to whole eights by zeros.

    Every 8 codes make `bits` whole bytes: they are gathered in one 64-bit integer, whose low bytes are kept.
    """
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    gathered = eights[..., 0].long()
    for position in range(1, 8):
        gathered |= eights[..., position].long() << (position * bits)
    return gathered.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)


def _split_bytes(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """Widths that divide a byte: shifts and masks of bytes, without wider integers."""
    mask = 2**bits - 1
    parts = [(stream >> shift) & mask if shift else stream & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def _split_eights(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` times eight codes: widen every `bits` bytes to a 64-bit integer and shift the codes out of it."""
    stream = torch.nn.functional.pad(stream, (0, count * bits - stream.shape[-1]))
    eights = stream.reshape(*stream.shape[:-1], count, bits)
    gathered = torch.nn.functional.pad(eights, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    parts = [((gathered >> (position * bits)) & (2**bits - 1)).to(torch.uint8) for position in range(8)]
    return torch.stack(parts, dim=-1).flatten(-2)
