"""Streaming statistics of a layer's inputs x [tokens, K]: what the algorithms need, in memory that does not grow.

    gram            H = mean over tokens of x x^T      [K, K]
    second_moment   mean of x_j^2                      [K], the diagonal of H
    absmax          max of |x_j|                       [K]
    absmean         mean of |x_j|                      [K]

Products inside a chunk of tokens are float32, sums over chunks float64, so that the result hardly depends on how the
tokens are cut into batches; it does not at all while the products and their sums are integers below 2^24. The sum of
products x x^T is float32 above 8192 columns, where memory is what counts.
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
WIDE = 8192
"""Columns above which the gram is summed in float32."""
STRIP = 1024
"""Columns of a gram that are multiplied at once; what lies below its diagonal is not."""
LARGEST = 2.0**57
"""Magnitudes above overflow float32 when a chunk of them is squared and summed: 2^10 * (2^57)^2 = 2^124."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one statistic is collected.

    fold        adds to the total, or takes into it, a chunk float32 [T, K]
    reduction   how the totals of ranks make one
    """

    fold: Callable[[torch.Tensor, torch.Tensor], object]
    reduction: Reduction


_KINDS: dict[Need, _Kind] = {
    "gram": _Kind(lambda total, x: _add_upper(total, x), "sum"),
    "second_moment": _Kind(lambda total, x: total.add_(x.double().square_().sum(0)), "sum"),
    "absmax": _Kind(lambda total, x: torch.maximum(total, x.abs().amax(0).double(), out=total), "max"),
    "absmean": _Kind(lambda total, x: total.add_(x.abs().sum(0, dtype=torch.float64)), "sum"),
}
NEEDS: tuple[Need, ...] = tuple(_KINDS)


@dataclass(frozen=True, slots=True, eq=False)
class Stats:
    """Statistics of the inputs x of a layer, float32; None where one was not asked for, zeros where there was no token.

    tokens         how many, padding not counted
    gram           H [K, K], exactly symmetric
    second_moment  mean of x_j^2, [K]
    absmax         max of |x_j|, [K]
    absmean        mean of |x_j|, [K]
    """

    tokens: int
    gram: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    absmean: torch.Tensor | None = None


class Accumulator:
    """Collects statistics of one layer's inputs, chunk by chunk, until `result` is asked for.

    needs: which; columns: K, of the inputs; device: where the totals lie and are computed.
    """

    def __init__(self, needs: Collection[Need], columns: int, *, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.totals: dict[Need, torch.Tensor] = {
            need: torch.zeros(columns, dtype=torch.float64, device=device) for need in NEEDS if need in needs
        }
        if "gram" in self.totals:
            self.totals["gram"] = products(columns, device)

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take in x [..., K] of any float type; mask [...]: 0 where a token is padding.

        Raises ActivationError as `tokens` does, and ValueError for another K; then nothing was taken in.
        """
        rows = tokens(x, mask)
        if rows.shape[1] != self.columns:
            raise ValueError(f"activations have {rows.shape[1]} columns, not {self.columns}")
        for chunk in rows.split(CHUNK) if len(rows) else ():
            here = chunk.to(self.count.device, torch.float32)
            for need, total in self.totals.items():
                _KINDS[need].fold(total, here)
        self.count += len(rows)

    def state(self) -> Iterator[tuple[torch.Tensor, Reduction]]:
        """The totals themselves, always in the same order, with what an all-reduce in place has to do with each."""
        yield self.count, "sum"
        for need, total in self.totals.items():
            yield total, _KINDS[need].reduction

    def result(self) -> Stats:
        """Means and maxima of all that was added. This ends the collection: the result may be the totals themselves."""
        count = int(self.count)
        values: dict[Need, torch.Tensor] = {}
        for need in list(self.totals):
            total = self.totals.pop(need)
            if _KINDS[need].reduction == "sum":
                total.div_(max(count, 1))
            values[need] = _mirrored(total).float() if need == "gram" else total.float()
        return Stats(count, **values)


def products(columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Zeros [K, K] on `device` to add products of chunks to: float64, or float32 above WIDE columns."""
    dtype = torch.float64 if columns <= WIDE else torch.float32
    return torch.zeros((columns, columns), dtype=dtype, device=device)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [K, K] += a^T b, in place, for a few rows a and b, float32 [T, K]; the product itself is float32."""
    for first in range(0, len(total), STRIP):
        _add(total[first : first + STRIP], a[:, first : first + STRIP], b)


def _add_upper(total: torch.Tensor, x: torch.Tensor) -> None:
    """total [K, K] += x^T x for x float32 [T, K], but for what lies below the diagonal, which `_mirrored` fills."""
    for first in range(0, len(total), STRIP):
        _add(total[first : first + STRIP, first:], x[:, first : first + STRIP], x[:, first:])


def _add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a^T b; without a temporary of its size where both are float32."""
    if total.dtype == torch.float32:
        total.addmm_(a.T, b)
    else:
        total += a.T @ b


def _mirrored(total: torch.Tensor) -> torch.Tensor:
    """The total [K, K] made exactly symmetric, in place, from what lies on the diagonal and above."""
    for first in range(0, len(total), STRIP):
        rows = total[first : first + STRIP, first:]
        square = rows[:, : len(rows)]
        square.copy_((square + square.T) / 2)
        total[first:, first : first + STRIP] = rows.T.clone()
    return total


def tokens(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The tokens of x [..., K], [T, K]: those where `mask` [...] is not 0, all of them without a mask.

    Raises ValueError for a mask of another shape, and ActivationError for the first value that is NaN, infinite or
    above LARGEST, with its token (the place in [...]) and column; what padding holds does not matter.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask is {list(mask.shape)} for activations {list(x.shape)}")
        rows = rows[mask.reshape(-1).to(rows.device, torch.bool)]
    bad = ~(rows.abs() <= LARGEST)  # NaN compares as false
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        places = torch.ones(x.shape[:-1], dtype=torch.bool, device="cpu") if mask is None else mask.cpu().bool()
        place = [int(i) for i in places.nonzero()[row]]
        raise ActivationError(
            f"token {place}, column {column}: activation {float(rows[row, column])}; {int(bad.sum())} such values",
            "the model overflows in its own type: quantize from float32 or bfloat16, or skip the layer",
        )
    return rows
