"""Block-AP: all that a block's layers are rounded from, learned by the block's output (`descent`).

    w^ = s (clip(round(w / s + z)) - z),  s and z as stored         the fake quantization of training, `nn/fake.py`
    w -= eta |s_0| m,   s -= eta |s_0| m / (hi - lo),   z -= eta m       m: Adam's direction;  eta from 2/T down to 0

w begins as what `start` decodes to, in the middle of its cells: from the weights that were rounded, moved into their
cells, what is found is farther off (docs/quality.md). A step moves a weight's place among the levels, or their ends, by
eta at most, whatever the block's first scale s_0 and the number of levels (the first half of EfficientQAT, Chen et al.
2024, arXiv:2407.11062, which begins with the float weights, and has one rate for all).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from spicerack.algorithms.descent import Forward, Layer, descend
from spicerack.algorithms.solved import Solved
from spicerack.numerics.fake import Grid, Parts, fake, rounded, stored
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.qtensor import QTensor

STEPS = 200

_FARTHEST = 2.0
"""Twice the levels that a weight can move in all steps."""
_MEAN, _SQUARE = 0.9, 0.99
"""What Adam's averages keep of themselves in a step: the gradients of the last ten, squares of the last hundred."""
_LEAST = 1e-16
"""Added to roots of squares: far below the gradients of a mean over a batch."""


def solve(
    layers: Mapping[str, Layer], forward: Forward, sequences: int, *, steps: int | None = None, seed: int = 0
) -> dict[str, Solved]:
    """Name -> codes, scales and zero points with which the block's output is nearest; `start` where none was nearer.

    forward, sequences: as in `descend`. steps: None is STEPS.
    """
    return descend(layers, _Learned, forward, sequences, steps=STEPS if steps is None else steps, seed=seed)


class _Learned:
    """w in tiles, s and z of one layer, and the best codes so far."""

    def __init__(self, layer: Layer) -> None:
        q = layer.start
        assert isinstance(q.scale, torch.Tensor) and isinstance(q.scheme.levels, IntLevels)
        self.best, self.dtype, self.levels = q, q.scale.dtype, q.scheme.levels
        self.grid = Grid(q.scheme.levels, q.scheme.block_shape(*q.shape))
        self.scale = q.scale.float().clone()
        self.zero = None if q.zero is None else q.zero.float()
        unit = self.scale.abs()
        self.weight = self.grid.tiles(self.grid.decode(self.grid.tiles(q.codes.float()), (self.scale, self.zero)))
        span = self.levels.hi - self.levels.lo
        self.moved = [_Moved(self.weight, unit[:, None, :, None]), _Moved(self.scale, unit / span)]
        if self.zero is not None:
            self.moved.append(_Moved(self.zero, torch.ones(())))

    def _parts(self) -> Parts:
        zero = None if self.zero is None else rounded(self.zero, self.levels)
        return stored(self.scale, self.dtype), zero

    def _matrix(self) -> torch.Tensor:
        return self.weight.flatten(2).flatten(0, 1)

    def decoded(self) -> torch.Tensor:
        """The weight [N, K] as it would be shipped now."""
        return fake(self._matrix(), self._parts(), self.grid)

    def step(self, rate: float) -> None:
        """Against Adam's direction."""
        for one in self.moved:
            one.step(_FARTHEST * rate)

    @torch.no_grad()
    def keep(self) -> None:
        """What is learned now is the best so far: its codes are those that `decoded` has."""
        scale, zero = self._parts()
        codes = self.grid.round(self.grid.places(self._matrix(), (scale, zero))).flatten(2).flatten(0, 1)
        self.best = dataclasses.replace(
            self.best,
            codes=codes.to(self.best.codes.dtype).contiguous(),
            scale=scale.to(self.dtype),
            zero=None if zero is None else zero.to(torch.int8),
        )

    def result(self) -> QTensor:
        """The best."""
        return self.best


class _Moved:
    """A value that Adam (Kingma and Ba 2014, arXiv:1412.6980) moves, by `unit` at rate 1."""

    def __init__(self, value: torch.Tensor, unit: torch.Tensor) -> None:
        self.value, self.unit = value.requires_grad_(), unit
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.count = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Nothing moves an expert to whom no token went."""
        grad, self.value.grad = self.value.grad, None
        if grad is None:
            return
        self.count += 1
        self.mean.lerp_(grad, 1 - _MEAN)
        self.square.lerp_(grad.square_(), 1 - _SQUARE)
        unbiased = (1 - _SQUARE**self.count) ** 0.5 / (1 - _MEAN**self.count)
        direction = torch.sqrt(self.square).add_(_LEAST).reciprocal_().mul_(self.mean)
        self.value.sub_(direction.mul_(self.unit), alpha=rate * unbiased)
