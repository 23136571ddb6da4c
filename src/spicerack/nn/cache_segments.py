"""Keys or values of attention as packed codes: x = low + scale * code, in segments of 32 tokens.

Keys have a scale and a low per channel, over the tokens of a segment: some channels are large at every token. Values
have them per token, over some channels. (KIVI, Liu et al. 2024, arXiv:2402.02750.)

Both numbers are float16 as stored, and chosen so that every x lies between low and low + scale (2^b - 1) then: rounding
them to nearest could put the largest number out of reach. The price is a scale that is about a thousandth wider than it
would have to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from spicerack.errors import ActivationError, SchemeError

TOKENS = 32
"""Of a segment: a scale and a low per channel then add one bit to each code of a key."""
BITS = (8, 4)
"""Widths of a code that there are."""
Share = Literal["channel", "token"]
"""What has a scale of its own: a channel (over the tokens of a segment), or a token (over a group of channels)."""

_HALF_UNIT = 2.0**-11
"""The most that rounding to float16 changes a number, relative to it, where it is no subnormal of float16."""
_LEAST = 2.0**-24
"""The smallest positive float16: below 2^-14 rounding changes a number by half of this at most."""


@dataclass(frozen=True, slots=True)
class CacheScheme:
    """How a cache is stored.

    bits           8 or 4, of a code
    group          channels of a token that share a scale where `Share` is "token"; the head's width if that is no
                   multiple of it
    residual       the last tokens, never packed; up to 31 more wait until they fill a segment
    keys, values   what has a scale of its own, see the module

    Raises SchemeError for other widths, a group below 1 and a residual below 0.
    """

    bits: int
    group: int = 32
    residual: int = 32
    keys: Share = "channel"
    values: Share = "token"

    def __post_init__(self) -> None:
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise SchemeError(f"a cache of {self.bits} bits", "use 8 or 4")
        if self.group < 1 or self.residual < 0:
            raise SchemeError(f"group {self.group}, residual {self.residual}", "use at least 1 and 0")


@dataclass(frozen=True, slots=True)
class Segments:
    """n segments of T = 32 tokens, B sequences, H heads of width D; two 4-bit codes share a byte.

    codes uint8 [B, H, n, T * bits / 8, D]: token t is in the low half of byte t, token t + T / 2 in the high half.
    scale, low float16: [B, H, n, 1, D / g, g] per channel, [B, H, n, T, D / g, 1] per token.
    """

    bits: int
    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens in all segments together, n * T."""
        return int(self.codes.shape[2]) * TOKENS

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
        """New Segments of `change` applied to each tensor, which must leave the last three axes alone."""
        return Segments(self.bits, change(self.codes), change(self.scale), change(self.low))

    def part(self, first: int, last: int) -> Segments:
        """Segments number `first` to `last`, the latter left out, in memory of their own."""
        return self.map(lambda t: t[:, :, first:last].clone())

    def append(self, later: Segments) -> Segments:
        """New Segments of these and, behind them, `later` ones."""
        pairs = ((self.codes, later.codes), (self.scale, later.scale), (self.low, later.low))
        return Segments(self.bits, *(torch.cat(pair, dim=2) for pair in pairs))

    def decode(self, out: torch.Tensor) -> None:
        """Write the numbers to `out` [B, H, n * T, D], computed in float32 and rounded to its type.

        out: of any float type; a float32 one is computed in at once, others by way of a float32 tensor of their size.
        """
        groups, half = self.scale.shape[4], TOKENS // 2
        work = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        rows = work.unflatten(2, (-1, TOKENS)).unflatten(-1, (groups, -1))
        codes = self.codes.unflatten(-1, (groups, -1))
        if self.bits == 8:
            rows.copy_(codes)
        else:
            rows[:, :, :, :half].copy_(codes & 15)
            rows[:, :, :, half:].copy_(codes >> 4)
        rows.mul_(self.scale.float()).add_(self.low.float())  # torch's addcmul takes three times as long per token
        if work is not out:
            out.copy_(work)


@torch.no_grad()
def encode(x: torch.Tensor, scheme: CacheScheme, share: Share) -> Segments:
    """x [B, H, n * 32, D] -> Segments, with |x - decoded| <= scale / 2 for each number, but for the rounding of float32
    and of the type that is decoded to.

    low and scale are chosen as stored: low, rounded to float16, is not above the least number, and low + scale *
    (2^bits - 1) not below the greatest. Raises ActivationError if a number is not finite, or low or scale do not fit
    float16.
    """
    levels = 2**scheme.bits - 1
    width = x.shape[-1]
    group = scheme.group if width % scheme.group == 0 else width
    x = x.float().unflatten(2, (-1, TOKENS)).unflatten(-1, (-1, group))
    least, most = torch.aminmax(x, dim=3 if share == "channel" else 5, keepdim=True)
    low = (least - (least.abs() * _HALF_UNIT).clamp_min(_LEAST)).half()
    scale = ((most - low) * ((1 + _HALF_UNIT) / levels) + _LEAST / 2).half()
    if not bool(low.isfinite().all() and scale.isfinite().all()):
        raise ActivationError(
            f"keys or values between {float(x.min()):g} and {float(x.max()):g} do not fit a quantized cache",
            "their scales are float16: load the model without cache",
        )
    codes = ((x - low) / scale.float()).round_().clamp_(0, levels).to(torch.uint8).flatten(-2)
    if scheme.bits == 4:
        first, second = codes.split(TOKENS // 2, dim=3)
        codes = first | (second << 4)
    return Segments(scheme.bits, codes, scale, low)


def packed_bytes(scheme: CacheScheme, tokens: int, width: int, share: Share) -> int:
    """Bytes that packed tokens of one head take: their codes, and two float16 for each group that shares a scale.

    tokens: a multiple of 32. width: D, of the head. share: "channel" as for keys, "token" as for values.
    """
    group = scheme.group if width % scheme.group == 0 else width
    groups = tokens // TOKENS * width if share == "channel" else tokens * math.ceil(width / group)
    return tokens * width * scheme.bits // 8 + 4 * groups
