"""`superblocks.fit` by native code: the same numbers bit for bit, whatever the threads and the processor."""

from __future__ import annotations

import torch

from spicerack import _native
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.native import team
from spicerack.numerics.search import Range
from spicerack.numerics.superblocks.search import REFINEMENTS, ROUNDS, SHARE_STEP, SHARES, Fitted, Form, steps

_ALIGNED = 16
"""Super-blocks that the widest instruction set fits at once: pieces of threads are multiples."""


def fit(
    w: torch.Tensor,
    form: Form,
    range_: Range,
    importance: torch.Tensor | None = None,
    *,
    threads: int = 1,
    isa: str = "",
) -> tuple[Fitted, torch.Tensor, bool] | None:
    """Super-blocks, their codes, and whether all of their floats are usable; None if a weight is not finite.

    w           [S, groups * columns], float32, float16 or bfloat16, contiguous, on the CPU
    form        how they are stored
    range_      as in `superblocks.fit`
    importance  float32, one value per weight, or of a length that repeats along the flattened weights
    threads     how many share the super-blocks
    isa         one of `native.ISAS`; "" is the widest

    The codes [S, groups * columns] are bytes, int8 also where codes go up to 255.
    """
    count, size = w.shape
    floats = torch.empty((2, count), dtype=torch.float32, device="cpu")
    integers = torch.empty((2, count, form.groups), dtype=torch.int8, device="cpu")
    codes = torch.empty((count, size), dtype=torch.int8, device="cpu")
    period = 1 if importance is None else min(importance.numel() // size, count)
    shares = [1.0 - i * SHARE_STEP for i in range(SHARES)]

    def work(first: int, last: int) -> tuple[bool, bool]:
        part = importance
        if importance is not None and importance.numel() == w.numel():
            part = importance[first * size : last * size]
        some = slice(first, last)
        return _native.superblocks(
            w[some], (form.levels.lo, form.levels.hi), (form.groups, form.columns), form.has_min,
            _share(form.scale, form.scale_dtype), _share(form.min, form.min_dtype),
            steps(form) if range_ == "opt" else (), shares, REFINEMENTS, ROUNDS, part,
            floats[0][some], floats[1][some], integers[0][some], integers[1][some], codes[some], isa,
        )  # fmt: skip

    with team(threads) as workers:
        finite, fits = zip(*workers.run(work, count, _ALIGNED if period == count else period), strict=True)
    if not all(finite):
        return None
    return Fitted(floats[0], integers[0], floats[1], integers[1]), codes, all(fits)


def _share(levels: IntLevels | None, dtype: torch.dtype) -> tuple[bool, int, int, str]:
    """Integers of scales or minima, and the type of their float, in the form that native code takes."""
    name = str(dtype).removeprefix("torch.")
    return (False, 0, 1, name) if levels is None else (True, levels.lo, levels.hi, name)
