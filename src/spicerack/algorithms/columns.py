"""What a quantized weight is made of, column by column: for solvers whose arithmetic is that of matrices [N, K].

Scales and zero points are one for each group, and groups lie within a row or are the whole tensor; here each stands for
all of its weights. All of it is float32, on the device of the codes.
"""

from __future__ import annotations

import torch

from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor


def by_column(values: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """A value for each group [N or 1, groups or 1] -> one for each weight, [N, K]; rows of one value share memory."""
    return values.repeat_interleave(k // values.shape[1], dim=1).expand(n, k)


def scales(q: QTensor) -> torch.Tensor:
    """The scales of a QTensor, as they count in arithmetic, float32 [N or 1, groups or 1]."""
    return codec.decode(q.scale) if isinstance(q.scale, QTensor) else q.scale.float()


def minima(q: QTensor) -> torch.Tensor:
    """The minima of a QTensor, float32 [N or 1, groups or 1]; a single 0, [1, 1], where the scheme has none."""
    if q.min is None:
        return torch.zeros((1, 1), dtype=torch.float32, device=q.codes.device)
    return codec.decode(q.min) if isinstance(q.min, QTensor) else q.min.float()


def zeros(q: QTensor) -> torch.Tensor:
    """The zero points of a QTensor, float32 [N or 1, groups or 1]; a single 0, [1, 1], where the scheme has none."""
    return torch.zeros((1, 1), dtype=torch.float32, device=q.codes.device) if q.zero is None else q.zero.float()


def level_of_each(q: QTensor) -> torch.Tensor:
    """level[code] - zero of every weight, float32 [N, K]: what it counts for in units of its scale."""
    return q.scheme.levels.decode(q.codes, by_column(zeros(q), *q.codes.shape))


def decoded(q: QTensor) -> torch.Tensor:
    """The weight that the codes stand for, float32 [N, K]; as `codec.decode` has it."""
    w = level_of_each(q) * by_column(scales(q), *q.codes.shape)
    return w if q.min is None else w + by_column(minima(q), *q.codes.shape)
