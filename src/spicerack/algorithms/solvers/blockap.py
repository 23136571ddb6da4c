"""Block-AP: all that a block's layers are rounded from, learned by the block's output (`descent`).

    w^ = s (clip(round(w / s + z)) - z),  s and z as stored       the fake quantization of training, `numerics/fake.py`
    w -= eta |s_0| m,   s -= eta |s_0| m / (hi - lo),   z -= eta m       m: Adam's direction;  eta from 2/T down to 0

w begins as what `start` decodes to, in the middle of its cells: from the weights that were rounded, moved into their
cells, what is found is farther off (docs/quantization/quality.md). A step moves a weight's place among the levels,
or their ends, by eta at most, whatever the group's first scale s_0 and the number of levels (the first half of
EfficientQAT, Chen et al. 2024, arXiv:2407.11062, which begins with the float weights, and has one rate for all).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from spicerack.algorithms.descent import Forward, Told, Tunable, descend, memory, obstacle, untold
from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import BlockSolver
from spicerack.numerics.fake import Grid, Parts, fake, rounded, stored
from spicerack.numerics.qtensor import QTensor

STEPS = 200
"""T, as many as `signround` takes: what the two gain is compared at the same cost (docs/quantization/quality.md)."""

_FARTHEST = 2.0
"""Twice the levels that a weight can move in all steps."""
_MEAN, _SQUARE = 0.9, 0.99
"""What Adam's averages keep of themselves in a step: the gradients of the last ten, squares of the last hundred."""
_LEAST = 1e-16
"""Added to roots of squares: far below the gradients of a mean over a batch."""


def solve(
    layers: Mapping[str, Tunable],
    forward: Forward,
    sequences: int,
    told: Told = untold,
    *,
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Solved]:
    """Name -> codes, scales and zero points with which the block's output is nearest; `start` where none was nearer.

    layers, forward, sequences, told, seed: as in `descend`. steps: T; None is STEPS.
    """
    steps = STEPS if steps is None else steps
    return descend(layers, _Learned, forward, sequences, told, steps=steps, seed=seed)


class _Learned:
    """w in tiles, s and z of one layer, what moves them, and the best codes so far; see `descent.Learned`."""

    def __init__(self, layer: Tunable) -> None:
        q = layer.start
        self.best, self.dtype, self.levels = q, q.plain_scale.dtype, q.scheme.integers
        self.grid = Grid(self.levels, q.scheme.group_shape(*q.shape))
        self.scale = q.plain_scale.float().clone()
        self.zero = None if q.zero is None else q.zero.float()
        unit = self.scale.abs()
        self.weight = self.grid.tiles(self.grid.decode(self.grid.tiles(q.codes.float()), (self.scale, self.zero)))
        span = self.levels.hi - self.levels.lo
        self.moved = [_Moved(self.weight, unit[:, None, :, None]), _Moved(self.scale, unit / span)]
        if self.zero is not None:
            self.moved.append(_Moved(self.zero, torch.ones((), dtype=torch.float32, device="cpu")))

    def _parts(self) -> Parts:
        """s and z as they would be stored now, with gradients."""
        zero = None if self.zero is None else rounded(self.zero, self.levels)
        return stored(self.scale, self.dtype), zero

    def _matrix(self) -> torch.Tensor:
        """w [N, K], out of its tiles."""
        return self.weight.flatten(2).flatten(0, 1)

    def decoded(self) -> torch.Tensor:
        """w^, float32 [N, K], the weight as it would be shipped now, with gradients for w, s and z."""
        return fake(self._matrix(), self._parts(), self.grid)

    def step(self, rate: float) -> None:
        """Move w, s and z against Adam's direction of each."""
        for part in self.moved:
            part.step(_FARTHEST * rate)

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the codes, scales and zero points of now: exactly those that `decoded` computes with."""
        scale, zero = self._parts()
        codes = self.grid.round(self.grid.places(self._matrix(), (scale, zero))).flatten(2).flatten(0, 1)
        self.best = dataclasses.replace(
            self.best,
            codes=codes.to(self.best.codes.dtype).contiguous(),
            scale=scale.to(self.dtype),
            zero=None if zero is None else zero.to(torch.int8),
        )

    def result(self) -> QTensor:
        """What was remembered last; `start` if nothing was."""
        return self.best


class _Moved:
    """A value that Adam (Kingma and Ba 2014, arXiv:1412.6980) moves, by `unit` at rate 1 (a number for each, or
    shared).
    """

    def __init__(self, value: torch.Tensor, unit: torch.Tensor) -> None:
        self.value, self.unit = value.requires_grad_(), unit
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.count = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the value by its gradient, which is then gone; without one, as of an expert no token went to, not at
        all.
        """
        grad, self.value.grad = self.value.grad, None
        if grad is None:
            return
        self.count += 1
        self.mean.lerp_(grad, 1 - _MEAN)
        self.square.lerp_(grad.square_(), 1 - _SQUARE)
        unbiased = (1 - _SQUARE**self.count) ** 0.5 / (1 - _MEAN**self.count)
        direction = torch.sqrt(self.square).add_(_LEAST).reciprocal_().mul_(self.mean)
        self.value.sub_(direction.mul_(self.unit), alpha=rate * unbiased)


SOLVER = BlockSolver(solve=solve, starts_from="gptq", obstacle=obstacle, memory=memory)
