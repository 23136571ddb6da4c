"""SmoothQuant: outliers of activations are moved into the weights (Xiao et al. 2022, arXiv:2211.10438).

    y = (W diag(s)) (x / s),    s_j = max |x_j|^alpha / max |W_:j|^(1 - alpha),    alpha from 0.1 to 0.95

A token's inputs share one int8 step, which its largest channel decides; the same channels are large for every token. So
they are divided by s, and the weights that read them take the factor, whose steps are by output row or group and have
room for it. alpha says how much of the difficulty moves: all of it would only turn the tables.

Which alpha is best is decided by the output of the block, with activations rounded as they will be; s = 1 is among the
choices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spicerack.algorithms.stats import Stats
from spicerack.algorithms.transform import Scaling

STRENGTHS = tuple(i / 20 for i in range(2, 20))
"""alpha: around the paper's 0.5, up to the 0.9 that it takes for models with larger outliers, and a step beyond."""
_LEAST = 1e-5
"""Of max |x_j| and max |W_:j|: a channel that is all but 0 is balanced as if it were this large."""


def candidates(inputs: Stats, largest: torch.Tensor) -> Iterator[torch.Tensor]:
    """Factors s, float32 [K], for each alpha; normalized so that their geometric mean is 1.

    inputs: statistics of the layers' input, absmax among them. largest: max |W_:j| over all layers that read it, [K].
    Channels that are always 0, of inputs or of weights, keep 1: there is nothing to balance.
    """
    assert inputs.absmax is not None
    live = (inputs.absmax > 0) & (largest > 0)
    x, w = inputs.absmax.clamp(min=_LEAST), largest.clamp(min=_LEAST)
    for alpha in STRENGTHS:
        s = torch.where(live, x**alpha / w ** (1 - alpha), 1.0)
        yield torch.where(live, s / s[live].log().mean().exp(), 1.0)


def memory(weights: int, _itemsize: int) -> int:
    """Bytes of a block's weights times factors: float32, and the block's own."""
    return 4 * weights


TRANSFORM = Scaling(candidates=candidates, needs=("absmax",), memory=memory)
