"""RTN: the codes of rounding to nearest, as they are. Every solver starts from them, and this one ends there.

Which scale and zero point a group gets is decided before a solver is asked, by the search of `numerics/search.py`; with
calibration text its errors are weighted by the mean square of each input.
"""

from __future__ import annotations

import torch

from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import WeightSolver
from spicerack.numerics.qtensor import QTensor


def solve(_w: torch.Tensor, start: QTensor) -> Solved:
    """`start` itself, which is a weight [..., N, K] rounded to nearest."""
    return Solved(start)


def memory(n: int, k: int) -> int:
    """Bytes that rounding a weight [N, K] to nearest takes, 24 of a weight: as much as six float32 matrices.

    They are the weight, a copy in groups, and of the one candidate that the search in torch judges at a time the
    levels, the errors, and the products of both with importances. Where C++ searches it is less.
    """
    return 24 * n * k


SOLVER = WeightSolver(solve=solve, obstacle=lambda _scheme: None, memory=memory)
