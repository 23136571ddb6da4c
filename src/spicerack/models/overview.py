"""What is in a model folder, and what it would weigh under each scheme: from headers alone, without torch.

A folder that spicerack quantized is described from its ledger: which scheme each layer got, and the error it made.

What is given up. Roles are told by names here and not by transformers (`architecture`), which takes seconds. For the
families of `names.TOLD_BY_NAMES` that is the same; for others whoever shows an estimate asks which tensors stay in
float (`quantization.door.promised`), as `inspect` does.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spicerack.errors import CheckpointError, UsageError
from spicerack.models.census import BY_DEFAULT, Census, Entry, take
from spicerack.models.config import Architecture, difference, nested
from spicerack.models.families import names
from spicerack.models.opening import open_model, open_stored
from spicerack.models.sizes import FLOATS, sized
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage import files, ledger
from spicerack.storage.ledger import Ledger
from spicerack.storage.reader import Checkpoint, TensorInfo

COMMON_SCHEMES = ("w8", "w4g128", "w4g32z", "w3g64", "w2g32z", "ternary")
"""What a float model's size is estimated in."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a ledger says became of one tensor.

    kind     the scheme, or safetensors' type of what was copied
    nbytes   of all that it became
    error    ||decoded - w|| / ||w||; None for what is not quantized
    """

    kind: str
    nbytes: int
    error: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """All tensors of one kind: a row of the table that people see.

    pattern      what a recipe calls them: `model.layers.*.mlp.down_proj`
    role         what they do
    count        how many they are
    shape        stored shape; None if they differ
    stored       safetensors type, or the scheme
    parameters   numbers in all of them
    nbytes       their bytes in the files
    error        ||decoded - w|| / ||w||, root mean square over the tensors; None for what is not quantized
    """

    pattern: str
    role: str
    count: int
    shape: tuple[int, ...] | None
    stored: str
    parameters: int
    nbytes: int
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Indivisible:
    """Layers that a scheme's groups do not tile: `quantize` refuses them, unless it may take what fits.

    pattern   what a recipe calls them
    count     how many they are
    remedy    K, and the scheme that fits, which is counted
    """

    pattern: str
    count: int
    remedy: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the model weighs with its linear layers in `scheme` and the rest as it is.

    nbytes           of all tensors that `quantize` writes; headers of files are left out
    bits_per_weight  of the quantized layers;  bits_per_weight_total: of the whole model
    indivisible      layers that the scheme's groups do not tile, counted in the scheme that fits them
    """

    scheme: str
    nbytes: int
    bits_per_weight: float
    bits_per_weight_total: float
    indivisible: tuple[Indivisible, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that headers, config and ledger tell of a folder: what `inspect` shows, and its JSON.

    folder               where it is
    architecture         what config.json says
    parameters, nbytes   of all tensors, tied ones counted once
    shards               files of weights
    types                type or scheme -> tensors, parameters, bytes
    rows                 kinds of tensors, in the order of the files
    tied                 alias -> owner
    estimates            sizes in common schemes; none of a quantized model
    by_names             whether names tell what `quantize` does; else transformers has to be asked
    quantized            the recipe, or the tool where there is no ledger; None for a float model
    notes                what was noticed and left alone
    refused              why `quantize` would not take the folder; None where it would, or nobody asked
    """

    folder: Path
    architecture: Architecture
    parameters: int
    nbytes: int
    shards: int
    types: dict[str, tuple[int, int, int]]
    rows: tuple[Row, ...]
    tied: dict[str, str]
    estimates: tuple[Estimate, ...]
    by_names: bool
    quantized: str | None
    notes: tuple[str, ...]
    refused: str | None = None


def look(model: str | Path) -> Report:
    """Describe a folder or hub id, of which only headers are read.

    A folder of spicerack's own is described by its ledger: under the names that the float model had, with what became
    of each tensor. Estimates are made of float models only. Raises CheckpointError.
    """
    checkpoint = open_model(model)
    quantized = quantized_with(checkpoint.config)
    stored: dict[str, Stored] = {}
    written = ledger.read(checkpoint.folder) if quantized else None
    if written is not None:
        checkpoint, stored, quantized = source_of(checkpoint, written), _stored(written), written.recipe or quantized
    elif packed := {name: told for name in checkpoint.tensors if (told := checkpoint.packed(name)) is not None}:
        stored = {name: Stored(type_, checkpoint.tensors[name].nbytes, None) for name, (type_, _) in packed.items()}
        checkpoint = _unpacked(checkpoint, {name: shape for name, (_, shape) in packed.items()})
    census = take(checkpoint)
    rows = _rows(census, stored)
    return Report(
        folder=checkpoint.folder,
        architecture=census.architecture,
        parameters=sum(row.parameters for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        shards=len(checkpoint.shards),
        types=_by_type(rows),
        rows=rows,
        tied=census.tied,
        estimates=() if quantized else estimates(census),
        by_names=told_by_names(census, checkpoint),
        quantized=quantized,
        notes=checkpoint.notes,
    )


def quantized_with(config: Mapping[str, Any]) -> str | None:
    """Who quantized the model that has this config.json, as its `quant_method` says; None for a float model.

    Our own container says so by its model_type. mlx-lm names no method: it has a section `quantization`, and in newer
    versions the same again under the name that others use.
    """
    if config.get("model_type") == files.CONTAINER:
        return files.CONTAINER
    section, mlx = config.get("quantization_config"), config.get("quantization")
    unnamed = "mlx" if isinstance(mlx, dict) and {"bits", "group_size"} <= mlx.keys() else None
    return str(section.get("quant_method") or unnamed or "unknown") if isinstance(section, dict) else unnamed


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a model that is quantized already, with the tool; checkpoint: as `released` has it."""
    if (tool := quantized_with(checkpoint.config)) is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is quantized already, with {tool}",
            "start from the float model: every rounding adds up",
        )


def refuse_sides(out: Path, source: Path, command: str, *, swapped: bool) -> None:
    """Raise UsageError for a `source` that is quantized where the float model belongs, beside `out`.

    command: which of ours compares them, for the line that would be right. swapped: whether `out` is a float model.
    """
    raise UsageError(
        f"--against {source} is quantized itself, and {out} is {'not' if swapped else 'compared with float models'}",
        shlex.join(["spicerack", command, str(source), "--against", str(out)])
        if swapped
        else "give the float model that it was made from",
    )


def refuse_strangers(out: Checkpoint, source: Checkpoint) -> None:
    """Raise UsageError where config.json says that the folder `out` was not made from the model `source`."""
    configs = [_float_config(checkpoint.config) for checkpoint in (out, source)]
    if (reason := difference(*configs)) is not None:
        raise UsageError(
            f"{out.folder} {reason.format(other=source.folder)}",
            "compare it with the model that it was made from",
        )


def _float_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config that a model had before it was quantized, as far as sizes and classes go."""
    inner = config.get("config") if config.get("model_type") == files.CONTAINER else None
    return inner if isinstance(inner, dict) else config


def check_sides(out: str | Path, source: str | Path, command: str) -> None:
    """Open both folders, and refuse what headers tell: what is no model, a `source` that is quantized itself, and
    models of two architectures.

    Of a source without our ledger nothing is said here: what others wrote may be read as floats. Raises CheckpointError
    and UsageError.
    """
    quantized, original = open_stored(out), open_stored(source)
    ours = quantized_with(original.config) is not None and (original.folder / files.LEDGER).is_file()
    if ours:
        swapped = quantized_with(quantized.config) is None
        refuse_sides(quantized.folder, original.folder, command, swapped=swapped)
    refuse_strangers(quantized, original)


def source_of(checkpoint: Checkpoint, written: Ledger) -> Checkpoint:
    """The float checkpoint that a quantized folder came from, as its ledger describes it: names, types and shapes of
    tensors that are no longer there, and the config from before. It cannot be read from."""
    tensors = {e.tensor: TensorInfo(e.tensor, e.dtype, e.shape, e.bytes_before, "") for e in written.entries}
    dropped = frozenset(e.tensor for e in written.entries if e.action == "drop")
    return _Listed(
        checkpoint.folder, dict(_float_config(checkpoint.config)), tensors, checkpoint.shards, checkpoint.side_files,
        checkpoint.notes, dropped=dropped,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Listed(Checkpoint):
    """What a ledger tells of a checkpoint.

    dropped  tensors that were the same as another one, and so were not written
    """

    dropped: frozenset[str]

    def same(self, a: str, b: str) -> bool:
        """Whether one of them was left out because the other has the same numbers: two that were written are two."""
        return a in self.dropped or b in self.dropped


def _unpacked(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint whose tensors of bytes have the shapes of the weights that are packed in them. It cannot be read
    from, and who asks whether two of its tensors are the same is told so of those without a file."""
    tensors = {
        name: replace(info, dtype="F32", shape=shapes[name], file="") if name in shapes else info
        for name, info in checkpoint.tensors.items()
    }
    return Checkpoint(
        checkpoint.folder, checkpoint.config, tensors, checkpoint.shards, checkpoint.side_files, checkpoint.notes
    )


def _stored(written: Ledger) -> dict[str, Stored]:
    """Tensor of the source -> what became of it."""
    return {e.tensor: Stored(e.scheme or e.dtype, e.bytes_after, e.error) for e in written.entries}


def estimates(census: Census, kept: Collection[str] = ()) -> tuple[Estimate, ...]:
    """The size of a model in `COMMON_SCHEMES`. kept: tensors that stay in float although their names say otherwise."""
    return tuple(estimate(census, parse(name), kept) for name in COMMON_SCHEMES)


def told_by_names(census: Census, checkpoint: Checkpoint) -> bool:
    """Whether `quantize` does with a folder what its names say: it is of a family where that was compared, its layers
    are as many as config.json says, and nothing in it looks as if it were another model's."""
    types = {part["model_type"] for part in nested(checkpoint.config) if isinstance(part.get("model_type"), str)}
    if not types or not types <= names.TOLD_BY_NAMES:
        return False
    parts = [name.split(".") for name in checkpoint.tensors]
    blocks = {tuple(name[: i + 1]) for name in parts for i, part in enumerate(name) if part.isdigit()}
    as_many = census.architecture.layers is None or len(blocks) >= census.architecture.layers
    wrapped = any(part.startswith("_") or part == "module" for name in parts for part in name)
    floats = all(entry.info.dtype in FLOATS for entry in census.entries.values() if entry.role in BY_DEFAULT)
    return as_many and floats and not wrapped


def estimate(census: Census, scheme: Scheme, kept: Collection[str] = ()) -> Estimate:
    """The size of a model in this scheme, by the roles and shapes of its tensors.

    What is quantized by default is, but for `kept`; layers that the scheme's groups do not tile are counted in the
    nearest one that fits, and are listed.
    """
    quantized_bits = weights = nbytes = 0
    misfits: dict[tuple[str, str], int] = {}
    for name, became in sized(census, scheme, kept).items():
        entry = census.entries[name]
        nbytes += became.nbytes
        if became.scheme is not None:
            quantized_bits += became.scheme.stored_bits(entry.matrix_shape)
            weights += entry.info.numel
        if became.remedy:
            kind = (pattern_of(entry.module), became.remedy)
            misfits[kind] = misfits.get(kind, 0) + 1
    return Estimate(
        scheme=scheme.name,
        nbytes=nbytes,
        bits_per_weight=quantized_bits / weights if weights else 0.0,
        bits_per_weight_total=8 * nbytes / max(census.parameters, 1),
        indivisible=tuple(Indivisible(pattern, count, remedy) for (pattern, remedy), count in misfits.items()),
    )


def pattern_of(module: str) -> str:
    """The glob that names a module in all layers, as recipes take it: `model.layers.3.mlp` is `model.layers.*.mlp`."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _rows(census: Census, stored: Mapping[str, Stored]) -> tuple[Row, ...]:
    """One row per pattern, role and stored type, in the order of the files."""
    groups: dict[tuple[str, str, str], list[tuple[Entry, Stored]]] = {}
    for name, entry in census.entries.items():
        if name not in census.tied:
            kept = stored.get(name) or Stored(entry.info.dtype, entry.info.nbytes, None)
            groups.setdefault((pattern_of(entry.module), entry.role, kept.kind), []).append((entry, kept))
    return tuple(
        Row(
            pattern=pattern,
            role=role,
            count=len(members),
            shape=_common({entry.info.shape for entry, _ in members}),
            stored=kind,
            parameters=sum(entry.info.numel for entry, _ in members),
            nbytes=sum(kept.nbytes for _, kept in members),
            error=_root_mean_square([kept.error for _, kept in members if kept.error is not None]),
        )
        for (pattern, role, kind), members in groups.items()
    )


def _root_mean_square(values: list[float]) -> float | None:
    """As errors of layers of one size add up; None without any."""
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else None


def _common(shapes: set[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The one shape that all have; None where they differ."""
    return next(iter(shapes)) if len(shapes) == 1 else None


def _by_type(rows: Iterable[Row]) -> dict[str, tuple[int, int, int]]:
    """Type or scheme -> tensors, parameters, bytes; the largest first."""
    totals: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        tensors, parameters, nbytes = totals.get(row.stored, (0, 0, 0))
        totals[row.stored] = tensors + row.count, parameters + row.parameters, nbytes + row.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1][2]))
