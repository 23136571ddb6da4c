"""Where models and the calibrated loop compute: a device that torch can use.

Files, results (QTensors) and random choices stay on the CPU; what a block is computed with goes to the device. So the
same seed chooses the same text everywhere, and what is written does not depend on the device but for rounding.

Which devices there are is asked of torch alone, by using them: a list of our own would be wrong with its next version.
"""

from __future__ import annotations

import torch

from spicerack.errors import UsageError

CPU = torch.device("cpu")
"""Where everything is that does not say otherwise."""


def find(name: str | torch.device, dtype: torch.dtype = torch.float64) -> torch.device:
    """The device of this name, as torch writes it: "cpu", "cuda", "cuda:1", "mps" ...

    It is tried, with one number, because a name may be right and the driver, the build or the device's number not.
    dtype: that must be computed in there; float64, which statistics are in, is not to be had everywhere. Raises
    UsageError, with torch's own reason, if torch cannot.
    """
    try:
        device = torch.device(name)
        float(torch.ones(1, dtype=dtype, device=device).sum())
    except (RuntimeError, AssertionError, TypeError, ModuleNotFoundError) as error:  # all of them come, by device
        reason = str(error).split("\n")[0].rstrip(".")
        raise UsageError(
            f"--device {name}: torch cannot compute there: {reason}", "use --device cpu, or install torch for it"
        ) from error
    return device


def of_rank(name: str, local: int) -> str:
    """The name of the device of process number `local` (from 0) of a machine, where several quantize together.

    name: as given for all of them: "cpu", which they share, or "cuda", of which each has one of its own. Raises
    UsageError for what they cannot share their sums through ("mps"), and for one GPU of all ("cuda:0").
    """
    if name == "cpu":
        return name
    if name != "cuda":
        raise UsageError(
            f"--device {name}: processes of torchrun compute on cpu, or each on a GPU of its own", "use --device cuda"
        )
    return f"cuda:{local}"
