"""Learning rate and weight decay over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "two-stage"]
"""cosine, linear: down to 0. two-stage: BitNet b1.58's, see `rate`."""

SECOND_STAGE = 2 / 3
"""Of the first stage's rate: 1.5e-3 and 1e-3, 1.2e-3 and 8e-4 in the training tips of BitNet b1.58."""


def rate(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate in step `step` (from 0) of `steps`, the first `warmup` of them rising.

    two-stage: falling as if to 0, from half of the steps on two thirds of that; ternary weights bear a high rate as
    long as they still change, and need a low one to settle (Ma et al., The Era of 1-bit LLMs: Training Tips, 2024).
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return max(1 - done, 0.0) * (SECOND_STAGE if schedule == "two-stage" and 2 * step >= steps else 1.0)


def decay(schedule: Schedule, step: int, steps: int) -> float:
    """The factor of the weight decay: two-stage runs have none from half of the steps on."""
    return 0.0 if schedule == "two-stage" and 2 * step >= steps else 1.0
