"""`Grid`: the scales and minima that columns are rounded with one after the other, chosen as the walk reaches them.

Scales of whole super-blocks (q4_k, w4g64m) are searched once more for what the walk has made of their weights by then:
errors of columns before are in them, and how much an error in each column will matter is known, because those behind
make good what they can. Other scales stay those of the start.
"""

from __future__ import annotations

import dataclasses

import torch

from spicerack.algorithms.columns import minima, scales, zeros
from spicerack.numerics import rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.superblocks.search import form_of, usable, values

WIDEST = 512
"""Columns of a super-block up to which it is searched again: errors inside it are made good column by column."""


class Grid:
    """Scales, zero points and minima of a weight [N, K], transposed so that those of a column lie in one piece.

    scale, inverse, zero, low   float32 [groups or 1, N or 1]; low is None where there are no minima
    span                        columns that are searched together again; None where nothing is
    """

    def __init__(self, start: QTensor) -> None:
        """start: the weight rounded to nearest."""
        self.start, (_, k) = start, start.shape
        self.scale, self.zero = scales(start).t().contiguous(), zeros(start).t().contiguous()
        self.low = None if start.min is None else minima(start).t().contiguous()
        self.inverse = torch.where(self.scale == 0, 0.0, 1 / self.scale)
        self.columns = k // len(self.scale)
        self.form = form_of(start.scheme, k, _source(start))
        span = None if self.form is None else self.form.groups * self.form.columns
        self.span = span if span is not None and span <= WIDEST else None
        self._scale, self._low = _parts(start.scale), _parts(start.min)

    def search(self, w: torch.Tensor, columns: torch.Tensor, importance: torch.Tensor) -> None:
        """Scales of one super-block for its weights w, float32 [span, N], in the order of `columns`, int64 [span].

        importance: of each column, float32 [span]. Rows for which a scale comes out that cannot be stored keep theirs.
        """
        assert self.form is not None and self.span is not None
        block = int(columns[0]) // self.span
        local = columns - block * self.span
        x, a = torch.empty_like(w.t(), memory_format=torch.contiguous_format), torch.empty_like(importance)
        x[:, local] = w.t()
        a[local] = importance
        fitted = rounding.fit_superblocks(x, self.form, a, threads=torch.get_num_threads())
        if fitted is None:
            return
        good = usable(fitted, self.form)
        groups = slice(block * self.form.groups, (block + 1) * self.form.groups)
        s, m = values(fitted)
        self.scale[groups] = torch.where(good, s.t(), self.scale[groups])
        self.inverse[groups] = torch.where(self.scale[groups] == 0, 0.0, 1 / self.scale[groups])
        _keep(self._scale, good, block, groups, fitted.scale, fitted.scale_codes)
        if self.low is not None:
            self.low[groups] = torch.where(good, m.t(), self.low[groups])
            _keep(self._low, good, block, groups, fitted.min, fitted.min_codes)

    def result(self, codes: torch.Tensor) -> QTensor:
        """The weight with these codes [N, K] and the scales as they are now."""
        if self.span is None:
            return dataclasses.replace(self.start, codes=codes)
        scheme = self.start.scheme
        return dataclasses.replace(
            self.start, codes=codes, scale=_part(scheme.scale, *self._scale),
            min=None if scheme.min is None else _part(scheme.min, *self._low),
        )  # fmt: skip


def _source(q: QTensor) -> torch.dtype:
    """A type of weights with which scales are stored in the types that q's have."""
    return torch.float32 if isinstance(q.scale, QTensor) else q.scale.dtype


def _parts(part: torch.Tensor | QTensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copies of floats [N, blocks], as stored, and of their integers [N, groups]; None for floats of each group."""
    if isinstance(part, QTensor):
        return part.plain_scale.clone(), part.codes.clone()
    return torch.empty(0, dtype=torch.float32, device="cpu") if part is None else part.clone(), None


def _part(kind: object, floats: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor | QTensor:
    """Inverse of `_parts`; kind: the scheme's."""
    if codes is None:
        return floats
    assert isinstance(kind, Scheme)
    return QTensor(kind, codes, floats)


def _keep(
    parts: tuple[torch.Tensor, torch.Tensor | None], good: torch.Tensor, block: int, groups: slice, value: torch.Tensor,
    integers: torch.Tensor,
) -> None:  # fmt: skip
    """Put a super-block's float [N] and integers [N, G] into their places, in good rows."""
    floats, codes = parts
    floats[:, block] = torch.where(good, value.to(floats.dtype), floats[:, block])
    if codes is not None:
        codes[:, groups] = torch.where(good[:, None], integers.to(codes.dtype), codes[:, groups])
