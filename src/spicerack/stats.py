"""Streaming statistics of a layer's inputs x [tokens, K]: what the algorithms need, in memory that does not grow.

    gram            H = mean over tokens of x x^T      [K, K]
    second_moment   mean of x_j^2                      [K], the diagonal of H
    absmax          max of |x_j|                       [K]
    absmean         mean of |x_j|                      [K]

Products inside a chunk of tokens are float32, sums over chunks float64, so that the result hardly depends on how the
tokens are cut into batches; it does not at all while the products and their sums are integers below 2^24.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from spicerack.errors import ActivationError

Need = Literal["gram", "second_moment", "absmax", "absmean"]
Reduction = Literal["sum", "max"]

CHUNK = 1024
"""Tokens whose products are summed in float32."""
LARGEST = 2.0**57
"""Magnitudes above overflow float32 when a chunk of them is squared and summed: 2^10 * (2^57)^2 = 2^124."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """fold: a chunk float32 [T, K] -> its share of the total; reduction: how shares make the total."""

    fold: Callable[[torch.Tensor], torch.Tensor]
    reduction: Reduction


_KINDS: dict[Need, _Kind] = {
    "gram": _Kind(lambda x: x.T @ x, "sum"),
    "second_moment": _Kind(lambda x: x.double().square_().sum(0), "sum"),
    "absmax": _Kind(lambda x: x.abs().amax(0), "max"),
    "absmean": _Kind(lambda x: x.abs().sum(0, dtype=torch.float64), "sum"),
}
NEEDS: tuple[Need, ...] = tuple(_KINDS)


@dataclass(frozen=True, slots=True, eq=False)
class Stats:
    """What was seen, float32; None where it was not asked for, zeros where there was no token.

    tokens: how many, padding not counted; gram [K, K], exactly symmetric; second_moment, absmax, absmean [K].
    """

    tokens: int
    gram: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    absmean: torch.Tensor | None = None


class Accumulator:
    """Collects the `needs` of one layer with K input columns; the totals lie and are computed on `device`."""

    def __init__(self, needs: Collection[Need], columns: int, *, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.totals: dict[Need, torch.Tensor] = {
            need: torch.zeros((columns, columns) if need == "gram" else (columns,), dtype=torch.float64, device=device)
            for need in NEEDS
            if need in needs
        }

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take in x [..., K] of any float type; mask [...]: 0 where a token is padding.

        Raises ActivationError as `tokens` does; then nothing was taken in.
        """
        rows = tokens(x, mask)
        if rows.shape[1] != self.columns:
            raise ValueError(f"activations have {rows.shape[1]} columns, not {self.columns}")
        for chunk in rows.split(CHUNK) if len(rows) else ():
            moved = chunk.to(self.count.device, torch.float32)
            for need, total in self.totals.items():
                _reduce(total, _KINDS[need].fold(moved), _KINDS[need].reduction)
        self.count += len(rows)

    def merge(self, other: Accumulator) -> None:
        """Take in what `other` saw. Floats are added in the order of the calls: merge ranks in a fixed one."""
        if other.totals.keys() != self.totals.keys() or other.columns != self.columns:
            raise ValueError("accumulators of different needs or widths cannot be merged")
        for mine, theirs in zip(self.state(), other.state(), strict=True):
            _reduce(mine[0], theirs[0].to(self.count.device), mine[1])

    def state(self) -> Iterator[tuple[torch.Tensor, Reduction]]:
        """The tensors themselves, always in the same order, with what an all-reduce in place has to do with each."""
        yield self.count, "sum"
        for need, total in self.totals.items():
            yield total, _KINDS[need].reduction

    def result(self) -> Stats:
        """Means and maxima of all that was added."""
        count = int(self.count)
        found: dict[Need, torch.Tensor] = {}
        for need, total in self.totals.items():
            mean = (total if _KINDS[need].reduction == "max" else total / max(count, 1)).float()
            found[need] = (mean + mean.T) / 2 if need == "gram" else mean
        return Stats(count, **found)


def tokens(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] -> [T, K], the tokens where `mask` [...] is not 0, all of them without a mask.

    Raises ActivationError for the first value that is NaN, infinite or above LARGEST, with its token (the place in
    [...]) and column; what padding holds does not matter.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask is {list(mask.shape)} for activations {list(x.shape)}")
        rows = rows[mask.reshape(-1).to(rows.device, torch.bool)]
    bad = ~(rows.abs() <= LARGEST)  # NaN compares as false
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        places = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu().bool()
        place = [int(i) for i in places.nonzero()[row]]
        raise ActivationError(
            f"token {place}, column {column}: activation {float(rows[row, column])}; {int(bad.sum())} such values",
            "the model overflows in its own type: quantize from float32 or bfloat16, or skip the layer",
        )
    return rows


def _reduce(total: torch.Tensor, share: torch.Tensor, reduction: Reduction) -> None:
    if reduction == "sum":
        total += share
    else:
        torch.maximum(total, share.to(total.dtype), out=total)
