"""Learning rate and weight decay over the steps of a run, as factors of their highest values.

Both are functions of the step's number and of settings, and of nothing that happened before: a run that is continued
from a checkpoint needs no state of a scheduler to go on as if it had never stopped.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "two-stage"]
"""How the learning rate falls behind its warmup. cosine and linear end at 0; two-stage is BitNet b1.58's, see
`rate`."""

SECOND_STAGE = 2 / 3
"""What the rate is multiplied with in the second half of a two-stage run.

The training tips of BitNet b1.58 lower 1.5e-3 to 1e-3 and 1.2e-3 to 8e-4, which is the same share.
"""


def rate(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate, 0 to 1, in step `step` (from 0) of `steps`, the first `warmup` of them rising.

    schedule: cosine and linear fall to 0 at the end, constant does not. A rising rate reaches 1 in the last step of the
    warmup, and is never 0: the first step learns, too. A two-stage run falls as if to 0, and from half of the steps on
    by `SECOND_STAGE` more: ternary weights bear a high rate as long as they still change, and need a low one to settle
    (Ma et al., The Era of 1-bit LLMs: Training Tips, 2024).
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
    """The factor of the weight decay, 0 or 1: two-stage runs have none from half of the steps on, all others keep it.

    Decay pulls weights towards 0, which is one of the three levels of a ternary weight: in the second stage they are to
    stay where they are (the same training tips).
    """
    return 0.0 if schedule == "two-stage" and 2 * step >= steps else 1.0
