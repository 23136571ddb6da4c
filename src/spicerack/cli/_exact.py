"""What `plan --exact` shows: an engine's own count beside the plan's, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spicerack.cli._output import size

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.planning.exact.count import Exact


def show(exact: Exact, console: Console) -> None:
    """A line for each device, one with both sums, and what the engine counts otherwise."""
    run = exact.run
    where = "as planned" if exact.here else "as if all lay in RAM"
    console.print(
        f"\n{run.program} counts {exact.row.precision.name} {where}, rounded down to {size(run.step)},\n"
        f"in {exact.seconds:.2g} s, and reads no weight:",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    for one in run.counted:
        parts = f"weights {size(one.weights)}, cache {size(one.cache)}, buffers {size(one.buffers)}"
        console.print(f"  {one.device}: {parts}", markup=False, soft_wrap=True)
    weights, cache, buffers = exact.planned
    planned = f"weights {size(weights)}, cache {size(cache)}, buffers {size(buffers)}"
    console.print(
        f"  planned: {planned}{' for a device' if len(run.counted) > 1 else ''}", markup=False, soft_wrap=True
    )
    if run.note:
        console.print(run.note, markup=False, soft_wrap=True)


def as_dict(exact: Exact) -> dict[str, Any]:
    """The same as JSON's own types, in bytes and seconds."""
    weights, cache, buffers = exact.planned
    return {
        "program": exact.run.program,
        "numbers": exact.row.precision.name,
        "as_planned": exact.here,
        "rounded_down_to_bytes": exact.run.step,
        "devices": [
            {
                "device": one.device,
                "weight_bytes": one.weights,
                "cache_bytes": one.cache,
                "buffer_bytes": one.buffers,
                "memory_bytes": one.total,
            }
            for one in exact.run.counted
        ],
        "planned": {"weight_bytes": weights, "cache_bytes": cache, "buffer_bytes_of_a_device": buffers},
        "note": exact.run.note,
        "seconds": exact.seconds,
    }
