"""Which kernel runs what: the rows of the table on this machine, and the choice for each layer of a folder.

From config.json and headers alone; no weight is read. What is told is what `load` would do, by the function that it
asks: `kernels.kernel.pick`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from spicerack.kernels import kernel
from spicerack.kernels.kernel import Choice, Compute, Shape
from spicerack.models.config import architecture
from spicerack.models.opening import open_stored
from spicerack.models.overview import pattern_of
from spicerack.numerics import dtypes
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage import format
from spicerack.storage.format import StoredTensor

_CPU = torch.device("cpu")
_PROBES = ("w8", "w8a8", "ternary")
"""Between them they fit every row that the machine can run; the first one tells why a row does not run."""
_PROBED = (64, 64)
"""(N, K) that they are asked for: every kernel's tiles fit into it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the kernels' table, as people see it.

    name       the kernel's
    compute    what it multiplies with: "int8" or "float" activations
    obstacle   why this machine does not run it, as the end of a sentence; None: it does
    """

    name: str
    compute: Compute
    obstacle: str | None


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of one kind that get the same kernel.

    pattern      what a recipe calls them: `model.layers.*.mlp.up_proj`;  count: how many there are
    scheme       their numbers
    shape        (N, K)
    dtype        of the layer's inputs: what config.json says, else what the weight had before it was quantized
    kernel       the one that they get
    passed_over  faster kernel -> why it was not taken, fastest first
    """

    pattern: str
    count: int
    scheme: str
    shape: Shape
    dtype: str
    kernel: str
    passed_over: dict[str, str]


def rows() -> list[Row]:
    """The whole table of kernels, fastest first, each with why it does not run here."""
    return [Row(row.name, row.compute, _obstacle(row)) for row in kernel.table()]


def layers(folder: str | Path, compute: Compute | None = None, engine: str | None = None) -> list[Layers]:
    """What `load` would choose on the CPU for this `compute` and `engine`, in the order of the files.

    [] for a float model. folder: local, or a hub id. Raises CheckpointError, SchemeError and UsageError.
    """
    kernel.check_engine(engine)  # also where nothing is quantized
    checkpoint = open_stored(folder)
    fmt = format.of_folder(checkpoint)
    if fmt is None:
        return []
    declared = _dtype(architecture(fmt.float_config(checkpoint.config)).dtype)
    picked: dict[tuple[Scheme, Shape, torch.dtype], Choice] = {}
    counts: dict[tuple[str, Scheme, Shape, torch.dtype], int] = {}
    for stored in fmt.contents(checkpoint).values():
        rows, columns = stored.shape[-2:]
        key = (stored.scheme, (rows, columns), declared or stored.source_dtype)
        if key not in picked:
            picked[key] = kernel.pick(*key, _CPU, compute, engine)
        kind = (pattern_of(stored.module), *key)
        counts[kind] = counts.get(kind, 0) + 1
    return [
        Layers(
            pattern=pattern,
            count=count,
            scheme=scheme.name,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            kernel=picked[scheme, shape, dtype].kernel.name,
            passed_over=picked[scheme, shape, dtype].passed_over,
        )
        for (pattern, scheme, shape, dtype), count in counts.items()
    ]


def without_vectors(contents: Iterable[StoredTensor]) -> list[str]:
    """What of these a model on this processor would multiply without vector instructions: a sentence for each scheme.

    contents: what is quantized, or will be. Float layers are multiplied with vector instructions everywhere, so such a
    model is slower than its original, here: it is known before anything is quantized, and told then.
    """
    plain: dict[str, str] = {}
    asked: set[tuple[Scheme, Shape, torch.dtype]] = set()
    for stored in contents:
        rows, columns = stored.shape[-2:]
        key = (stored.scheme, (rows, columns), stored.source_dtype)
        if key not in asked and stored.role != "embedding":  # whose rows are looked up
            asked.add(key)
            chosen = kernel.pick(*key, _CPU).kernel
            if not chosen.vector:
                plain.setdefault(stored.scheme.name, chosen.name)
    return [
        f"{scheme} runs on {name} here, without vector instructions: slower than the float model "
        "(`spicerack kernels OUT` says why)"
        for scheme, name in plain.items()
    ]


def _obstacle(row: kernel.Kernel) -> str | None:
    """Why this machine does not run a kernel; None: it does."""
    reasons = [row.obstacle(parse(name), _PROBED, torch.float32, _CPU) for name in _PROBES]
    return None if None in reasons else reasons[0]


def _dtype(name: str | None) -> torch.dtype | None:
    """The float type of this name that kernels take; None for others."""
    return dtypes.SOURCE_BY_WORD.get(name or "")
