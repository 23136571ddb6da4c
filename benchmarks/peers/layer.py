"""What a peer hands to its worker: `Prepared`, and the linear layer that all of them compute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]
_TURN = 0.1
_CHECKED = 8
"""Rows of the output whose error is measured."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """turn: does the work once -> its figures. facts: what is known beforehand (bytes, error ...)."""

    turn: Callable[[], dict[str, float]]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layer:
    """y [m, n] = x [m, k] W^T, for W [n, k] and `copies - 1` further weights of the same size and other contents.

    A call computes all copies, one after another.
    """

    n: int
    k: int
    m: int
    copies: int
    threads: int

    @property
    def x(self) -> F32:
        """Standard normal activations."""
        return np.random.default_rng(self.m).standard_normal((self.m, self.k), dtype=np.float32)

    def prepared(self, call: Callable[[], object], first: Callable[[], F32], weight: F32, nbytes: float) -> Prepared:
        """call: all copies once. first: y of the first copy, after a call. weight: W as rounded. nbytes: of one copy.

        error: ||y - x W^T|| / ||x W^T||, what rounding of activations and of the output cost.
        """
        call()
        exact = self.x[:_CHECKED] @ weight.T
        error = np.linalg.norm(first()[:_CHECKED] - exact) / np.linalg.norm(exact)
        facts = {"bytes": nbytes, "copies": self.copies, "error": float(error)}
        return Prepared(lambda: {"seconds": timed(call) / self.copies}, facts)


def timed(call: Callable[[], object]) -> float:
    """Median seconds of a call, over calls for 0.1 s and at least two, after one that does not count: others have just
    been at the caches."""
    call()
    taken: list[float] = []
    end = time.perf_counter() + _TURN
    while len(taken) < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return median(taken)


@cache
def weight(n: int, k: int) -> F32:
    """W [n, k], normal, so that y is standard normal."""
    return np.random.default_rng(n + k).standard_normal((n, k), dtype=np.float32) * np.float32(k**-0.5)


@cache
def rounded(n: int, k: int, bits: int, group: int) -> tuple[I8, F32]:
    """Codes int8 [n, k] and scales float32 [n, k / group] of W: symmetric, plain rounding."""
    groups = weight(n, k).reshape(n, k // group, group)
    largest = max(2 ** (bits - 1) - 1, 1)
    scale = (np.abs(groups).max(2) / largest).astype(np.float16).astype(np.float32)
    codes = np.rint(groups / scale[..., None]).clip(-largest, largest).astype(np.int8)
    return codes.reshape(n, k), scale


def decoded(codes: I8, scale: F32) -> F32:
    """The weight that codes [n, k] and scales [n, k / group] stand for."""
    n, k = codes.shape
    return (codes.reshape(n, scale.shape[1], -1) * scale[..., None]).reshape(n, k)


def packed(codes: I8, bits: int, offset: int = 0) -> NDArray[np.uint8]:
    """Codes + offset [n, k], low bits first, 8 / bits of them a byte -> [n, k * bits / 8]."""
    fields = (codes.view(np.uint8) + np.uint8(offset)) & np.uint8(2**bits - 1)
    fields = fields.reshape(len(codes), -1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    out: NDArray[np.uint8] = np.bitwise_or.reduce(fields << shifts, axis=2)
    return out
