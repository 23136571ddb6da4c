"""What quantizing will need in memory, told from config and headers before a weight is read, and how much of the
calibration text goes through a block at once.

A block's weights are mapped from their files, and made float32 a layer at a time; its codes stay, one byte a weight,
for rounding to nearest and for the solution. On top come either statistics (two K x K matrices for the layers that
share an input, one for an expert) and a chunk's activations, or what a solver needs of one layer:

    statistics    2 w K^2 + one temporary,   w = 8 bytes up to 8192 columns, 4 above
    solving       H once more and factored, in float64 up to 4096 columns;  four matrices of the weight's shape

`PROCESS` is the interpreter with torch and transformers in it. What was measured is in docs/calibrate.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spicerack.algorithms.solvers import gptq
from spicerack.algorithms.stats import WIDE
from spicerack.errors import UsageError
from spicerack.models.config import architecture
from spicerack.quantization.job import Action, Job

PROCESS = 700 << 20
TOKENS = 8192
"""Of a chunk, at most, but at least one sequence."""
STATISTICS = 2 << 30
"""Bytes of experts' statistics at once, unless one's are more."""
_ACTIVATIONS = 2 << 30
"""Bytes of a chunk's activations where no limit is given, unless one sequence's are more."""
_GRID = 0.3
"""Bytes of scales and zero points of a weight, twice, at groups of 32."""


@dataclass(frozen=True, slots=True)
class Plan:
    """sequences: of a chunk, 0 without calibration. peak_bytes: the most that will be in memory, but for pages that are
    mapped from files; where: during what. block_bytes: the most that a block at work takes, on its device; if that is
    not the CPU, the peak counts them all the same.
    """

    sequences: int
    peak_bytes: int
    where: str
    block_bytes: int = 0


def make(job: Job, text: tuple[int, int] | None, memory: int | None = None) -> Plan:
    """text: sequences and their length, None without calibration. memory: bytes that the peak must not exceed.

    Raises UsageError if it would whatever the chunk.
    """
    largest = max((a.info.numel * 4 for a in job.actions), default=0)
    writing = Plan(0, PROCESS + 3 * largest, "reading, rounding and writing the largest tensor")
    plans = [writing]
    if text is not None:
        plans = [
            p if p.peak_bytes >= writing.peak_bytes
            else replace(writing, sequences=p.sequences, block_bytes=p.block_bytes)
            for p in _calibrating(job, *text)
        ]  # fmt: skip
    if memory is None:
        return plans[0]
    for plan in plans:
        if plan.peak_bytes <= memory:
            return plan
    raise UsageError(
        f"--memory {_gb(memory)} GB: at least {_gb(plans[-1].peak_bytes)} GB are needed, {plans[-1].where}",
        "use more memory, or another method or scheme for that layer" if text else "use more memory",
    )


@dataclass(frozen=True, slots=True)
class _Matrix:
    """rows, columns: of one; count: experts."""

    layer: str
    parent: str
    rows: int
    columns: int
    count: int
    expert: bool
    itemsize: int


def _calibrating(job: Job, count: int, length: int) -> Iterator[Plan]:
    """With ever smaller chunks; the first is the one to take where nothing limits it."""
    blocks = _blocks(job)
    sequences = min(max(TOKENS // length, 1), count)
    while sequences > 1 and max(_activations(job, b, sequences * length) for b in blocks) > _ACTIVATIONS:
        sequences //= 2
    while sequences:
        yield max((_of_block(job, b, sequences, length) for b in blocks), key=lambda plan: plan.peak_bytes)
        sequences //= 2


def _blocks(job: Job) -> list[list[Action]]:
    """The actions of each block: those that differ by the first number in their names only."""
    stacks: dict[str, dict[str, list[Action]]] = {}
    for action in job.actions:
        found = re.match(r"(.*?)\.(\d+)\.", action.info.name)
        if found is not None:
            stacks.setdefault(found[1], {}).setdefault(found[2], []).append(action)
    if not stacks:
        return [list(job.actions)]
    largest = max(stacks.values(), key=lambda stack: sum(a.info.nbytes for actions in stack.values() for a in actions))
    return list(largest.values())


def _matrices(block: Sequence[Action]) -> list[_Matrix]:
    found = []
    for action in block:
        if action.planned is None:
            continue
        *experts, rows, columns = action.planned.shape
        parent = action.planned.module.rpartition(".")[0]
        is_expert = "experts" in action.info.name
        found.append(_Matrix(
            action.planned.module, parent, rows, columns, math.prod(experts), is_expert,
            action.planned.source_dtype.itemsize,
        ))  # fmt: skip
    return found


def _activations(job: Job, block: Sequence[Action], tokens: int) -> int:
    """What lives at once in a feed-forward part, and inputs that are kept. The copies of the block run in turn."""
    hidden = architecture(job.source.config).hidden or 0
    matrices = _matrices(block)
    widest = max((m.rows for m in matrices), default=0)
    longest = max((m.columns for m in matrices), default=0)
    return 4 * tokens * (6 * hidden + 4 * widest + 3 * longest)


def _of_block(job: Job, block: Sequence[Action], sequences: int, length: int) -> Plan:
    matrices = _matrices(block)
    method = job.recipe.method
    assert method is not None, "decided before work starts"
    weights = sum(m.rows * m.columns * m.count for m in matrices)
    rest = sum(a.info.numel for a in block if a.planned is None)
    held = PROCESS + int((2 + _GRID) * weights) + 8 * rest
    if method.rotates:
        held += max((m.itemsize for m in matrices), default=0) * weights
    if {"awq", "smoothquant"} & set(method.transforms):
        held += 4 * weights
    activations = _activations(job, block, sequences * length)
    plans = []
    for group in _groups(matrices):
        first, largest = group[0], max(group, key=lambda m: m.rows)
        size = largest.rows * largest.columns
        made = 8 * size  # a weight, and what it is decoded by
        plans.append((f"gathering statistics for {first.layer}", _statistics(group) + activations + made))
        plans.append((f"solving {largest.layer}", _solving(group, method.solver)))
    if method.solver in ("signround", "blockap"):
        plans.append(("learning the codes of a block", 40 * weights + activations))
    where, most = max(plans, key=lambda pair: pair[1], default=("", 0))
    return Plan(sequences, held + most, f"while {where}", held + most - PROCESS)


def _groups(matrices: Sequence[_Matrix]) -> list[list[_Matrix]]:
    """Those that may share an input: of one parent and as many columns."""
    found: dict[tuple[str, int], list[_Matrix]] = {}
    for matrix in matrices:
        found.setdefault((matrix.parent, matrix.columns), []).append(matrix)
    return list(found.values())


def _gram(columns: int) -> int:
    return (8 if columns <= WIDE else 4) * columns**2


def _statistics(group: Sequence[_Matrix]) -> int:
    first = group[0]
    temporary = 4 * first.columns**2 if first.columns <= WIDE else 0  # the gram is float32 in the end
    if first.expert:
        return max(STATISTICS, _gram(first.columns)) + temporary
    return 2 * _gram(first.columns) + temporary


def _solving(group: Sequence[_Matrix], solver: str) -> int:
    first, largest = group[0], max(m.rows * m.columns for m in group)
    grams = max(STATISTICS // 2, 4 * first.columns**2) if first.expert else 4 * first.columns**2
    if solver in ("rtn", "hqq"):
        return grams + 24 * largest
    double = first.columns <= gptq.DOUBLE
    factor = (20 if double else 4) * first.columns**2
    pulls = 0 if first.expert else 4 * sum(m.rows * m.columns for m in group)
    return grams + pulls + factor + 16 * largest + (256 << 20)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f}"
