"""SmoothQuant: outliers of activations are moved into the weights (Xiao et al. 2022, arXiv:2211.10438).

    y = (W diag(c)) (x / c),    c_j = max |x_j|^a / max |W_:j|^(1 - a),    a from 0.1 to 0.95

which a is best is decided by the output of the block, with activations rounded as they will be; c = 1 is among the
choices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spicerack.algorithms.stats import Need, Stats

NEEDS: tuple[Need, ...] = ("absmax",)
STRENGTHS = tuple(i / 20 for i in range(2, 20))
_LEAST = 1e-5


def candidates(seen: Stats, largest: torch.Tensor) -> Iterator[torch.Tensor]:
    """Factors float32 [K]. seen: of the layers' input; largest: max |W_:j| over all layers that read it, [K].

    Channels that are always 0, of inputs or of weights, keep 1: there is nothing to balance.
    """
    assert seen.absmax is not None
    live = (seen.absmax > 0) & (largest > 0)
    inputs, weights = seen.absmax.clamp(min=_LEAST), largest.clamp(min=_LEAST)
    for strength in STRENGTHS:
        factors = inputs**strength / weights ** (1 - strength)
        factors = torch.where(live, factors, 1.0)
        yield torch.where(live, factors / factors[live].log().mean().exp(), 1.0)
