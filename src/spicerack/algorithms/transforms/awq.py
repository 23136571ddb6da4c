"""AWQ: input channels that carry much are made larger before rounding (Lin et al. 2023, arXiv:2306.00978).

    W_q = Q(W diag(c)) diag(1 / c),    c_j = (mean |x_j|)^r,    r from 0.05 to 1

which r is best is decided by the output of the block, c = 1 (nothing moved) among the choices. The range of each group
is searched as always, weighted by the inputs' mean squares, which is the paper's second half: clipping.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spicerack.algorithms.stats import Need, Stats

NEEDS: tuple[Need, ...] = ("absmean",)
EXPONENTS = tuple(i / 20 for i in range(1, 21))
_LEAST = 1e-4


def candidates(seen: Stats, _largest: torch.Tensor) -> Iterator[torch.Tensor]:
    """Factors float32 [K], normalized so that the largest is the inverse of the least. seen: of the layers' input."""
    assert seen.absmean is not None
    for exponent in EXPONENTS:
        factors = seen.absmean.clamp(min=_LEAST) ** exponent
        yield factors / (factors.amax() * factors.amin()).sqrt()
