"""What methods have in common that learn codes by a block's output: the steps, and which of them is kept.

    minimise  || block_q(x) - y ||^2

x are hidden states behind quantized blocks, y what the float block made of the float model's. The best of some steps is
kept, the first (nothing learned) among them, judged on the same sequences each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack.algorithms.solved import Solved
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme

BATCH = 8
"""Sequences of a step."""
_LOOKS = 10
"""How often the loss over the judging sequences is taken, after the first time."""

Forward = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]
"""Numbers of sequences -> (the block's output now, what it should be), both [rows, H] without padding."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the block, its weight [N, K], and how that is rounded to begin with."""

    module: nn.Linear | Conv1D
    weight: torch.Tensor
    start: QTensor


class Learned(Protocol):
    """What is learned of one layer, and the best of it so far."""

    def decoded(self) -> torch.Tensor:
        """The weight [N, K] as it would be shipped now, with gradients."""

    def step(self, rate: float) -> None:
        """By the gradients that there are; none where no token came. rate: from 1/T down to 0, in T steps."""

    def keep(self) -> None:
        """What is learned now is the best so far."""

    def result(self) -> QTensor:
        """The best: its codes themselves, nothing is rounded again."""


def fits(scheme: Scheme) -> bool:
    """Whether levels are integers, and scales plain numbers."""
    plain = scheme.min is None and not isinstance(scheme.scale, Scheme) and scheme.block[0] in (1, None)
    return plain and isinstance(scheme.levels, IntLevels)


def descend(
    layers: Mapping[str, Layer],
    learn: Callable[[Layer], Learned],
    forward: Forward,
    sequences: int,
    *,
    steps: int,
    seed: int,
) -> dict[str, Solved]:
    """Name -> codes and scales with which the block's output is nearest, of those that are learned on the way.

    forward: runs the block whose layers these are; while it does they multiply by what is being learned.
    """
    learned = {name: learn(layer) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    judges = range(0, sequences, max(sequences // (4 * BATCH), 1))
    with _in_place(layers, learned):
        best = _loss(forward, judges)
        for step in range(steps):
            some = torch.randint(sequences, (BATCH,), generator=generator).tolist()
            with torch.enable_grad():
                output, wanted = forward(some)
                (output - wanted).square().mean().backward()
            for one in learned.values():
                one.step((1 - step / steps) / steps)
            if (step + 1) % max(steps // _LOOKS, 1) == 0 and (loss := _loss(forward, judges)) < best:
                best = loss
                for one in learned.values():
                    one.keep()
    return {name: Solved(one.result()) for name, one in learned.items()}


@contextmanager
def _in_place(layers: Mapping[str, Layer], learned: Mapping[str, Learned]) -> Iterator[None]:
    """The modules multiply by what is learned."""

    def forward(module: nn.Linear | Conv1D, one: Learned, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, one.decoded(), module.bias)

    for name, layer in layers.items():
        changed: Any = layer.module
        changed.forward = partial(forward, layer.module, learned[name])
    try:
        yield
    finally:
        for layer in layers.values():
            changed = layer.module
            del changed.forward


@torch.no_grad()
def _loss(forward: Forward, sequences: Sequence[int]) -> float:
    wrong = count = 0.0
    for first in range(0, len(sequences), BATCH):
        output, wanted = forward(sequences[first : first + BATCH])
        wrong += float((output - wanted).square().sum(dtype=torch.float64))
        count += output.numel()
    return wrong / count
