"""What quantizing will need in memory, told from config and headers before a weight is read, and how much of the
calibration text goes through a block at once.

A block's weights are mapped from their files, and made float32 a layer at a time; its codes stay, one byte a weight,
for rounding to nearest and for the solution. On top come either statistics (two K x K matrices for the layers that
share an input, one for an expert) and a chunk's activations, or what the solver needs of one layer or of the block:

    statistics    2 w K^2 + one temporary,   w = 8 bytes up to 8192 columns, 4 above
    solving       H once more in float32, the targets' pulls, and what the solver says of itself (`Solver.memory`)
    learning      what a solver of whole blocks says of itself, for all of its layers, and a chunk's activations

Transforms say what they leave in memory of a block (`Transform.memory`). The plan is a promise: `execute` keeps to the
number of sequences, and what was measured beside it is in docs/quantization/calibration.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spicerack.algorithms import solver as solvers
from spicerack.algorithms import transform
from spicerack.algorithms.method import Method
from spicerack.algorithms.solver import Solver
from spicerack.algorithms.stats import WIDE
from spicerack.algorithms.transform import Rotation
from spicerack.errors import UsageError
from spicerack.models.config import architecture
from spicerack.quantization.job import Action, Job

PROCESS = 700 << 20
"""Bytes of the interpreter with torch and transformers in it, measured before any model is loaded."""
TOKENS = 8192
"""Of a chunk, at most, but at least one sequence."""
STATISTICS = 2 << 30
"""Bytes of experts' statistics at once, unless one's are more."""
_ACTIVATIONS = 2 << 30
"""Bytes of a chunk's activations where no limit is given, unless one sequence's are more."""
_GRID = 0.3
"""Bytes of scales and zero points of a weight, twice, at groups of 32."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a quantization goes about its memory.

    sequences    of a chunk of calibration text; 0 without calibration
    peak_bytes   the most that will be in the process's memory, but for pages that are mapped from files
    where        during what that is
    block_bytes  the most that a block at work takes, on its device; the peak counts it, even if that is not the CPU
    """

    sequences: int
    peak_bytes: int
    where: str
    block_bytes: int = 0


def make(job: Job, text: tuple[int, int] | None, memory: int | None = None) -> MemoryPlan:
    """The plan with the largest chunks of text that fit.

    job     what was decided of the model; with text its recipe has a method
    text    sequences and their length; None without calibration
    memory  bytes that the peak must not exceed; None: no limit

    Raises UsageError if it would whatever the chunk.
    """
    largest = max((a.info.numel * 4 for a in job.actions), default=0)
    # The float32 weight, its codes and blocks while it is rounded, and what is written of it: three of its size.
    writing = MemoryPlan(0, PROCESS + 3 * largest, "reading, rounding and writing the largest tensor")
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
        f"--memory {memory / 1e9:.3g} GB: at least {_gb(plans[-1].peak_bytes)} GB are needed, {plans[-1].where}",
        "use more memory, or another method or scheme for that layer" if text else "use more memory",
    )


@dataclass(frozen=True, slots=True)
class _Weight:
    """One source tensor that gets codes: `count` matrices [rows, columns], of experts if more than one.

    layer           name of its module
    parent          name of the module around it
    rows, columns   N and K
    count           how many matrices
    expert          whether it is an expert's, alone or with others
    itemsize        bytes of a stored value
    """

    layer: str
    parent: str
    rows: int
    columns: int
    count: int
    expert: bool
    itemsize: int


def _calibrating(job: Job, count: int, length: int) -> Iterator[MemoryPlan]:
    """Plans with ever smaller chunks; the first is the one to take where nothing limits it."""
    blocks = _blocks(job)
    sequences = min(max(TOKENS // length, 1), count)
    while sequences > 1 and max(_activations(job, b, sequences * length) for b in blocks) > _ACTIVATIONS:
        sequences //= 2
    while sequences:
        yield max((_of_block(job, b, sequences, length) for b in blocks), key=lambda plan: plan.peak_bytes)
        sequences //= 2


def _blocks(job: Job) -> list[list[Action]]:
    """The actions of each block: those whose names differ by the first number in them only.

    Of several stacks the one with the most bytes counts, which is what is calibrated; a model without numbers is one
    block.
    """
    stacks: dict[str, dict[str, list[Action]]] = {}
    for action in job.actions:
        numbered = re.match(r"(.*?)\.(\d+)\.", action.info.name)
        if numbered is not None:
            stacks.setdefault(numbered[1], {}).setdefault(numbered[2], []).append(action)
    if not stacks:
        return [list(job.actions)]
    largest = max(stacks.values(), key=lambda stack: sum(a.info.nbytes for actions in stack.values() for a in actions))
    return list(largest.values())


def _weights(block: Sequence[Action]) -> list[_Weight]:
    """What is quantized of a block."""
    weights = []
    for action in block:
        if action.stored is None:
            continue
        *experts, rows, columns = action.stored.shape
        weights.append(_Weight(
            layer=action.stored.module, parent=action.stored.module.rpartition(".")[0], rows=rows, columns=columns,
            count=math.prod(experts), expert="experts" in action.info.name,
            itemsize=action.stored.source_dtype.itemsize,
        ))  # fmt: skip
    return weights


def _activations(job: Job, block: Sequence[Action], tokens: int) -> int:
    """Bytes that live at once in a feed-forward part, float32, and inputs that are kept, for so many tokens.

    Counted are six times the hidden states, four times the widest output and three times the longest input of the
    block's quantized layers. The two copies of the block run in turn.
    """
    hidden = architecture(job.source.config).hidden or 0
    weights = _weights(block)
    widest = max((w.rows for w in weights), default=0)
    longest = max((w.columns for w in weights), default=0)
    return 4 * tokens * (6 * hidden + 4 * widest + 3 * longest)


def _of_block(job: Job, block: Sequence[Action], sequences: int, length: int) -> MemoryPlan:
    """The plan for one block: what is held all the time, and the most that one of its steps takes."""
    weights = _weights(block)
    method = job.recipe.method
    assert method is not None, "decided before work starts"
    total = sum(w.rows * w.columns * w.count for w in weights)
    rest = sum(a.info.numel for a in block if a.stored is None)
    # Two codes a weight (rounded to nearest, and solved), their scales, and all else float32 in both copies.
    held = PROCESS + int((2 + _GRID) * total) + 8 * rest
    held += _transformed(method, total, max((w.itemsize for w in weights), default=0))
    activations = _activations(job, block, sequences * length)
    where, most = max(_steps(method, weights, activations), key=lambda step: step[1], default=("", 0))
    return MemoryPlan(sequences, held + most, f"while {where}", held + most - PROCESS)


def _transformed(method: Method, total: int, itemsize: int) -> int:
    """Bytes of a block's weights that transforms leave in memory instead of in their files."""
    transforms = [transform.get(name) for name in method.transforms]
    rotated = [t.memory(total, itemsize) for t in transforms if isinstance(t, Rotation)]
    scaled = [t.memory(total, itemsize) for t in transforms if not isinstance(t, Rotation)]
    return sum(rotated) + max(scaled, default=0)  # scalings share one copy


def _steps(method: Method, weights: Sequence[_Weight], activations: int) -> Iterator[tuple[str, int]]:
    """What a block goes through, as the end of a sentence, and the bytes that each step takes.

    method: transforms and solver. weights: of the block. activations: bytes of a chunk's.
    """
    solver = solvers.get(method.solver)
    opening = solvers.opening(method.solver)
    for readers in _readers(weights):
        first, largest = readers[0], max(readers, key=lambda w: w.rows)
        decoded = 8 * largest.rows * largest.columns  # a weight, and what it is decoded by
        yield f"gathering statistics for {first.layer}", _statistics(readers) + activations + decoded
        yield f"solving {largest.layer}", _solving(readers, opening)
    if solver.needs == "block":
        learning = sum(w.count * solver.memory(w.rows, w.columns) for w in weights)
        yield "learning the codes of a block", learning + activations


def _readers(weights: Sequence[_Weight]) -> list[list[_Weight]]:
    """Weights of a block, put together that may read one input: of one parent and with as many columns.

    That they do is told by the text later; until then they are planned for as if they did.
    """
    readers: dict[tuple[str, int], list[_Weight]] = {}
    for weight in weights:
        readers.setdefault((weight.parent, weight.columns), []).append(weight)
    return list(readers.values())


def _gram(columns: int) -> int:
    """Bytes of a K x K matrix while products are added to it."""
    return (8 if columns <= WIDE else 4) * columns**2


def _statistics(readers: Sequence[_Weight]) -> int:
    """Bytes of the statistics of one input at once, gram and shift, while they are gathered."""
    first = readers[0]
    temporary = 4 * first.columns**2 if first.columns <= WIDE else 0  # the gram is float32 in the end
    if first.expert:
        return max(STATISTICS, _gram(first.columns)) + temporary
    return 2 * _gram(first.columns) + temporary


def _solving(readers: Sequence[_Weight], opening: Solver) -> int:
    """Bytes while the largest of an input's readers is solved: its own, and what waits meanwhile for the others.

    readers: of one input. opening: the solver of single weights. Experts' grams are bounded together (`STATISTICS`).
    """
    first, rows = readers[0], max(w.rows for w in readers)
    grams = max(STATISTICS // 2, 4 * first.columns**2) if first.expert else 4 * first.columns**2
    pulls = 0
    if opening.needs == "gram" and not first.expert:  # targets of experts are not shifted
        pulls = 4 * sum(w.rows * w.columns for w in readers)
    return grams + pulls + opening.memory(rows, first.columns)


def _gb(nbytes: int) -> str:
    """Bytes in gigabytes, to a tenth, for messages."""
    return f"{nbytes / 1e9:.1f}"
