"""SignRound: which way each weight is rounded, and how wide its steps are, learned by a block's output (`descent`).

    q = clip(round(w / s + v) + z),  |v| <= 1/2,    s = stored(s_0 a),  1/2 <= a <= 3/2
    v -= eta sign(dL/dv),  a -= eta sign(dL/da),    eta from 1/T down to 0

w are the weights, moved as little as it takes to be rounded to the codes of `start`, where another solver chose those.
Rounding and storing pass gradients straight through, clipping stops them (Cheng et al. 2023, arXiv:2309.05516).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from spicerack.algorithms.descent import Forward, Layer, descend
from spicerack.algorithms.solved import Solved
from spicerack.numerics.levels import IntLevels, level_values
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import store

STEPS = 200

_CELL = 0.499
"""How far from a code a weight may be that is rounded to it."""


def solve(
    layers: Mapping[str, Layer], forward: Forward, sequences: int, *, steps: int | None = None, seed: int = 0
) -> dict[str, Solved]:
    """Name -> codes and scales with which the block's output is nearest; `start` where nothing better was found.

    forward, sequences: as in `descend`. steps: None is STEPS.
    """
    return descend(layers, _Learned, forward, sequences, steps=STEPS if steps is None else steps, seed=seed)


class _Learned:
    """v and a of one layer, and the best of them so far."""

    def __init__(self, layer: Layer) -> None:
        q = layer.start
        assert isinstance(q.scale, torch.Tensor)
        self.start, self.levels, self.dtype = q, q.scheme.levels, q.scale.dtype
        self.scale = q.scale.float()
        self.zero = torch.zeros((1, 1), device=q.codes.device) if q.zero is None else q.zero.float()
        self.weight = layer.weight.detach().float()
        self.weight = self._rounding_to(q.codes.float())
        self.v = torch.zeros_like(self.weight, requires_grad=True)
        self.a = torch.ones_like(self.scale, requires_grad=True)
        self.best: tuple[torch.Tensor, torch.Tensor] | None = None

    def _by_column(self, grid: torch.Tensor) -> torch.Tensor:
        n, k = self.weight.shape
        return grid.repeat_interleave(k // grid.shape[1], dim=1).expand(n, k)

    def _shift(self) -> torch.Tensor | float:
        """From w / s to codes."""
        assert isinstance(self.levels, IntLevels)
        return -0.5 if self.levels.half else self._by_column(self.zero)

    def _rounding_to(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights, moved as little as it takes for them to be rounded to these codes."""
        assert isinstance(self.levels, IntLevels)
        scale, shift = self._by_column(self.scale), self._shift()
        u = self.weight / scale + shift
        low = torch.where(codes == self.levels.lo, -torch.inf, codes - _CELL)
        high = torch.where(codes == self.levels.hi, torch.inf, codes + _CELL)
        inside = torch.minimum(torch.maximum(u, low), high)
        same = torch.round(u).clamp(self.levels.lo, self.levels.hi) == codes
        return torch.where(same, self.weight, (inside - shift) * scale)

    def _scale(self) -> torch.Tensor:
        """As stored; at first exactly what `start` has."""
        wanted = self.scale * self.a
        stored = store(wanted, self.dtype)
        return wanted + (torch.where(stored == 0, self.scale, stored) - wanted).detach()

    def _codes(self, scale: torch.Tensor) -> torch.Tensor:
        """Floats; rounded ones, whose gradient is that of what was rounded."""
        assert isinstance(self.levels, IntLevels)
        u = self.weight / self._by_column(scale) + self.v + self._shift()
        return (u + (torch.round(u) - u).detach()).clamp(self.levels.lo, self.levels.hi)

    def decoded(self) -> torch.Tensor:
        """The weight [N, K] as it would be shipped now."""
        scale = self._scale()
        return self._by_column(scale) * level_values(self._codes(scale), self.levels, self._by_column(self.zero))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Against the sign of the gradient."""
        for value, low, high in ((self.v, -0.5, 0.5), (self.a, 0.5, 1.5)):
            if value.grad is None:  # an expert to whom no token went
                continue
            value.sub_(rate * value.grad.sign()).clamp_(low, high)
            value.grad = None

    def keep(self) -> None:
        """What is learned now is the best so far."""
        self.best = self.v.detach().clone(), self.a.detach().clone()

    @torch.no_grad()
    def result(self) -> QTensor:
        """The codes themselves: nothing is rounded again."""
        if self.best is None:
            return self.start
        self.v, self.a = self.best
        scale = self._scale()
        codes = self._codes(scale).to(self.start.codes.dtype)
        return dataclasses.replace(self.start, codes=codes.contiguous(), scale=scale.to(self.dtype).contiguous())
