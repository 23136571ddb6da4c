"""What solvers have in common that learn codes by a block's output: the steps, which of them is kept, what it takes.

    minimise  || block_q(x) - y ||^2

x are hidden states behind quantized blocks, y what the float block made of the float model's. A step is one gradient,
taken through the block with all of its layers rounded; what is done with it is the learner's (`Learned`). The best of
some steps is kept, the first (nothing learned) among them, judged on a tenth of the sequences, which no step is taken
for: what is kept is better on text that it has not seen, or it is what there was before.

Rounding has no gradient of its own: what is learned passes it straight through, so that a step knows which way a weight
should go, and not whether it crosses a border between two codes. That is why steps are many and small, why they shrink
to 0 at the end, and why the loss of a step is not trusted but taken again at some of them, without noise of batches.

What is given up: learners see a block alone, so that what a later block could make good is not used; and all of the
block's layers are in memory with their gradients, where GPTQ needs one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from spicerack.algorithms.solved import Solved
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme

BATCH = 8
"""Sequences of a step."""
_LOOKS = 10
"""How often the loss over the judging sequences is taken, after the first time: each look is a forward pass over a
tenth of the text, beside the twenty steps with gradients that are between two of them at 200 steps."""
_HELD_OUT = 10
"""Every tenth sequence judges. From those that learn one cannot tell when they are only learned by heart. All steps are
taken all the same: losses rise at first, while steps are large (ending behind four looks without a better one kept
`gptq`'s codes at w2g32 where all steps found nearer ones, KL .309 and .293)."""
_BYTES = 40
"""Of a weight while its block learns: ten float32 values. They are the weight, what is learned of it, its gradient, the
best so far and, for Adam, two averages, besides what autograd keeps of the rounding until the step's end, for all
layers of the block. `tests/quantization/calibration/test_memory.py` holds runs to it."""

Forward = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]
"""Numbers of sequences -> (the block's output now, what it should be), both [rows, H] without padding."""
Told = Callable[[int, int], None]
"""Called with how many steps are taken, and how many there will be."""


def untold(_step: int, _steps: int) -> None:
    """Nobody looks on."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """A layer of the block whose codes are learned.

    module   it computes in float32 on the device of all
    weight   float32 [N, K]
    start    how that is rounded to begin with
    """

    module: nn.Module
    weight: torch.Tensor
    start: QTensor


class Learned(Protocol):
    """What is learned of one layer, and the best of it so far."""

    def decoded(self) -> torch.Tensor:
        """The weight, float32 [N, K], as it would be shipped now, with gradients for what is learned."""

    def step(self, rate: float) -> None:
        """Learn from the gradients of one step; there are none where no token came, as to an expert.

        rate: from 1/T down to 0, in T steps.
        """

    def keep(self) -> None:
        """Remember what is learned now: it is the best so far."""

    def result(self) -> QTensor:
        """The codes that were best, or those of the beginning; they themselves, nothing is rounded again."""


def obstacle(scheme: Scheme) -> str | None:
    """Why the codes of a scheme cannot be learned by gradients of rounding; None if they can."""
    return scheme.scale_obstacle or scheme.rows_obstacle or scheme.levels_obstacle


def memory(n: int, k: int) -> int:
    """Bytes for a weight [N, K] while its block learns, beside hidden states."""
    return _BYTES * n * k


def descend(
    layers: Mapping[str, Tunable],
    learn: Callable[[Tunable], Learned],
    forward: Forward,
    sequences: int,
    told: Told = untold,
    *,
    steps: int,
    seed: int,
) -> dict[str, Solved]:
    """Learn the codes of a block's layers in some steps, and return the best that there were, by name.

    layers      what is learned, of schemes without an obstacle
    learn       a layer -> what is learned of it, at its beginning
    forward     runs the block whose layers these are; while it does they multiply by what is being learned
    sequences   how many `forward` can be asked for
    told        called behind each step
    steps       T; 0 keeps how the layers are rounded already
    seed        decides which sequences a step is given
    """
    learned = {name: learn(layer) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    judges = range(0, sequences, _HELD_OUT)
    learners = [number for number in range(sequences) if number % _HELD_OUT] or [0]  # one sequence does both
    with _in_place(layers, learned):
        least = _loss(forward, judges)
        for step in range(steps):
            drawn = torch.randint(len(learners), (BATCH,), generator=generator, device="cpu")
            batch = [learners[i] for i in drawn.tolist()]
            with torch.enable_grad():
                output, target = forward(batch)
                (output - target).square().mean().backward()
            for layer in learned.values():
                layer.step((1 - step / steps) / steps)
            if (step + 1) % max(steps // _LOOKS, 1) == 0 and (loss := _loss(forward, judges)) < least:
                least = loss
                for layer in learned.values():
                    layer.keep()
            told(step + 1, steps)
    return {name: Solved(layer.result()) for name, layer in learned.items()}


@contextmanager
def _in_place(layers: Mapping[str, Tunable], learned: Mapping[str, Learned]) -> Iterator[None]:
    """Within, the layers' modules multiply by what is learned, and not by their parameters."""

    def forward(module: nn.Module, layer: Learned, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, layer.decoded(), module._parameters.get("bias"))

    for name, layer in layers.items():
        changed: Any = layer.module
        changed.forward = partial(forward, layer.module, learned[name])  # the instance's own, before the class's
    try:
        yield
    finally:
        for layer in layers.values():
            changed = layer.module
            del changed.forward


@torch.no_grad()
def _loss(forward: Forward, sequences: Sequence[int]) -> float:
    """Mean squared error of the block's output over these sequences, a batch at a time, summed in float64."""
    total = count = 0.0
    for first in range(0, len(sequences), BATCH):
        output, target = forward(sequences[first : first + BATCH])
        total += float((output - target).square().sum(dtype=torch.float64))
        count += output.numel()
    return total / count
