"""Memory of large results: when nobody has one any more, the next one gets it (native/kernels/pool.cpp).

Where a model computes large batches, malloc hands the memory of each layer's result back to the system, and the next
result waits while the system finds, clears and maps pages anew (docs/kernels.md has what that costs). What is kept is
bounded, 256 MB; nothing is kept that a tensor still points into.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spicerack import _native
from spicerack.kernels.panels import TYPES

LARGE = 1 << 18
"""Values of a result from which on its memory comes from here: below, malloc keeps it by itself, and is faster."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape on the CPU that holds anything: float32, float16 or bfloat16. Raises MemoryError."""
    return _native.pooled(shape, TYPES[dtype])


def release_memory() -> int:
    """Give the memory that is kept for results, and for runs of plans, back to the system; returns how many bytes.

    What tensors still point into stays theirs. Long-lived programs may call it after their largest batch.
    """
    return _native.release()
