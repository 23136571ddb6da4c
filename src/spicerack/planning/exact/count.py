"""`plan --exact`: an engine's own count of what was planned, beside the plan's.

A GGUF file is counted as it lies there; of a float model a file without weights is made for it (`hollow`), which goes
again. What is planned for this machine is counted on its own devices, as planned; what is planned for another one as if
all of it lay in the processor's memory, since an engine counts only for devices that it has.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from spicerack.errors import UsageError
from spicerack.machine.catalogue import Device
from spicerack.planning.engine import DryRun
from spicerack.planning.exact import hollow
from spicerack.planning.placement import ALONE
from spicerack.planning.plan import Plan, Row, row_of

_ENOUGH = 1 << 20
"""GiB of the processor that everything is placed on where no device of the plan is here."""
_PARTS = {"weights": "weights", "cache": "cache", "table of tokens": "weights"}
"""Terms of a placement, by what engines call them."""


@dataclass(frozen=True, slots=True)
class Exact:
    """An engine's count, and the plan's for the same.

    row       of the plan that was counted
    run       what the engine said
    planned   bytes that the plan says for it: weights, cache, buffers of a device
    here      on this machine's devices, as planned; else everything in the processor's memory
    seconds   that it took
    """

    row: Row
    run: DryRun
    planned: tuple[int, int, int]
    here: bool
    seconds: float


def count(plan: Plan, file: Path | None, *, here: bool) -> Exact:
    """The engine's count for the row that is recommended, or for the smallest where nothing fits.

    file: the GGUF file that is planned, None for a float model. here: the plan is for this machine. Raises UsageError
    for an engine that cannot count, that is not installed or refuses, CheckpointError for a family without a name in
    GGUF.
    """
    goal, model = plan.goal, plan.model
    dry_run = goal.engine.dry_run
    if dry_run is None:
        raise UsageError(f"{goal.engine.name} has no dry run to ask", "--engine llama.cpp, or leave --exact out")
    row = plan.recommended or min(plan.rows, key=lambda row: row.weights.total)
    as_planned = here and row.placement.fits
    if not as_planned:
        ram = Device("RAM", "cpu", _ENOUGH, _ENOUGH)
        row = row_of(model, row.precision, dataclasses.replace(goal, devices=(ram,), host=ALONE))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="spicerack-") as folder:
        if file is None:
            file = Path(folder) / "hollow.gguf"
            hollow.write(model, row.precision.name, file)
        run = dry_run(file, model, goal.request, row.placement if as_planned else None)
    planned = {"weights": 0, "cache": 0}
    shares = [*row.placement.shares, *([row.placement.host] if row.placement.host else [])]
    for term in (term for share in shares for term in share.terms if term.name in _PARTS):
        planned[_PARTS[term.name]] += term.nbytes
    sizes = planned["weights"], planned["cache"], run.planned
    return Exact(row, run, sizes, as_planned, time.perf_counter() - begin)
