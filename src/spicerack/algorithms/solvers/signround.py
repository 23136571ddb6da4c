"""SignRound: which way each weight is rounded, and how wide its steps are, learned by a block's output (`descent`).

    q = clip(round(w / s + v) + z),  |v| <= 1/2,    s = stored(s_0 a),  1/2 <= a <= 3/2
    v -= eta sign(dL/dv),  a -= eta sign(dL/da),    eta from 1/T down to 0

w are the weights, moved as little as it takes to be rounded to the codes of `start`, where another solver chose those.
Rounding and storing pass gradients straight through, clipping stops them (Cheng et al. 2023, arXiv:2309.05516).

A weight goes to one of its two neighbours at most, because |v| <= 1/2, and zero points stay. Of a gradient only the
sign counts: a weight with little to say moves as far as one with much, which keeps the method free of learning rates by
layer, and needs no averages. a is the paper's alpha and beta in one: the paper scales the largest and the least weight
of a group, from which the scale follows; here the scale is what is searched already, and moves itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from spicerack.algorithms.columns import by_column, scales, zeros
from spicerack.algorithms.descent import Forward, Told, Tunable, descend, memory, obstacle, untold
from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import BlockSolver
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import store

STEPS = 200
"""T, as in the authors' program by default; what more of them would gain has not been measured."""

_CELL = 0.499
"""How far from a code a weight may be that is rounded to it: at 1/2 float32 could round to the neighbour."""


def solve(
    layers: Mapping[str, Tunable],
    forward: Forward,
    sequences: int,
    told: Told = untold,
    *,
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Solved]:
    """Name -> codes and scales with which the block's output is nearest; `start` where no step was nearer.

    layers, forward, sequences, told, seed: as in `descend`. steps: T; None is STEPS.
    """
    steps = STEPS if steps is None else steps
    return descend(layers, _Learned, forward, sequences, told, steps=steps, seed=seed)


class _Learned:
    """v [N, K] and a [N or 1, groups or 1] of one layer, and the best of them so far; see `descent.Learned`."""

    def __init__(self, layer: Tunable) -> None:
        q = layer.start
        self.start, self.levels, self.dtype = q, q.scheme.integers, q.plain_scale.dtype
        self.scale, self.zero = scales(q), zeros(q)
        self.weight = layer.weight.detach().float()
        self.weight = self._rounding_to(q.codes.float())
        self.v = torch.zeros_like(self.weight, requires_grad=True)
        self.a = torch.ones_like(self.scale, requires_grad=True)
        self.best: tuple[torch.Tensor, torch.Tensor] | None = None

    def _by_column(self, values: torch.Tensor) -> torch.Tensor:
        """A value for each group [N or 1, groups or 1] -> one for each weight [N, K]."""
        return by_column(values, *self.weight.shape)

    def _shift(self) -> torch.Tensor | float:
        """z, what stands between w / s and codes; half-integer levels are codes with a zero of -1/2."""
        return self.levels.offset(self._by_column(self.zero))

    def _rounding_to(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights, moved as little as it takes for them to be rounded to these codes."""
        scale, shift = self._by_column(self.scale), self._shift()
        u = self.weight / scale + shift
        low = torch.where(codes == self.levels.lo, -torch.inf, codes - _CELL)
        high = torch.where(codes == self.levels.hi, torch.inf, codes + _CELL)
        inside = torch.minimum(torch.maximum(u, low), high)
        same = torch.round(u).clamp(self.levels.lo, self.levels.hi) == codes
        return torch.where(same, self.weight, (inside - shift) * scale)

    def _scale(self) -> torch.Tensor:
        """s, float32 with values as stored; at first exactly what `start` has. Its gradient is that of s_0 a."""
        exact = self.scale * self.a
        stored = store(exact, self.dtype)
        return exact + (torch.where(stored == 0, self.scale, stored) - exact).detach()

    def _codes(self, scale: torch.Tensor) -> torch.Tensor:
        """q, float32 [N, K], whose gradient is that of what was rounded."""
        u = self.weight / self._by_column(scale) + self.v + self._shift()
        return (u + (torch.round(u) - u).detach()).clamp(self.levels.lo, self.levels.hi)

    def decoded(self) -> torch.Tensor:
        """The weight, float32 [N, K], as it would be shipped now, with gradients for v and a."""
        scale = self._scale()
        return self._by_column(scale) * self.levels.decode(self._codes(scale), self._by_column(self.zero))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move v and a by `rate` against the signs of their gradients, and keep them in their ranges."""
        for value, low, high in ((self.v, -0.5, 0.5), (self.a, 0.5, 1.5)):
            if value.grad is None:  # an expert to whom no token went
                continue
            value.sub_(rate * value.grad.sign()).clamp_(low, high)
            value.grad = None

    def keep(self) -> None:
        """Remember v and a as they are now."""
        self.best = self.v.detach().clone(), self.a.detach().clone()

    @torch.no_grad()
    def result(self) -> QTensor:
        """The codes of the v and a that were remembered; `start` if none were. Nothing is rounded again."""
        if self.best is None:
            return self.start
        self.v, self.a = self.best
        scale = self._scale()
        codes = self._codes(scale).to(self.start.codes.dtype)
        return dataclasses.replace(self.start, codes=codes.contiguous(), scale=scale.to(self.dtype).contiguous())


SOLVER = BlockSolver(solve=solve, starts_from="gptq", obstacle=obstacle, memory=memory)
