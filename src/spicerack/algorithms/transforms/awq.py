"""AWQ: input channels that carry much are made larger before rounding (Lin et al. 2023, arXiv:2306.00978).

    W_q = Q(W diag(s)) diag(1 / s),    s_j = (mean |x_j|)^alpha,    alpha from 0.05 to 1

A weight's rounding error is a share of its group's step, whatever the weight; made s times as large it has the same
error, which then is divided by s. The group's step grows only if the channel holds the group's largest weight, so that
what is gained at channels with large inputs costs the others little.

Which alpha is best is decided by the output of the block, s = 1 (nothing moved) among the choices. The range of each
group is searched as always, weighted by the inputs' mean squares, which is the paper's second half: clipping.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spicerack.algorithms.stats import Stats
from spicerack.algorithms.transform import Scaling

EXPONENTS = tuple(i / 20 for i in range(1, 21))
"""alpha: the paper's grid of 20 over [0, 1], whose 0 is tried anyway."""
_LEAST = 1e-4
"""Of mean |x_j|: a channel that is always 0 would have a factor of 0."""


def candidates(inputs: Stats, _largest: torch.Tensor) -> Iterator[torch.Tensor]:
    """Factors s, float32 [K], for each alpha; normalized so that the largest is the inverse of the least.

    inputs: statistics of the layers' input, absmean among them.
    """
    assert inputs.absmean is not None
    for alpha in EXPONENTS:
        s = inputs.absmean.clamp(min=_LEAST) ** alpha
        yield s / (s.amax() * s.amin()).sqrt()


def memory(weights: int, _itemsize: int) -> int:
    """Bytes of a block's weights times factors: float32, and the block's own."""
    return 4 * weights


TRANSFORM = Scaling(candidates=candidates, needs=("absmean",), memory=memory)
