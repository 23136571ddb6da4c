"""`prepare`: all of a quantization that is knowable before a weight is read, and the refusals that are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from spicerack._version import __version__
from spicerack.errors import CheckpointError, SchemeError, ShapeError, listed
from spicerack.models import blocks, census
from spicerack.models.architecture import destinations, modules_of, on_meta
from spicerack.nn import kinds
from spicerack.numerics.dtypes import SOURCE_BY_NAME
from spicerack.quantization import recipe
from spicerack.quantization.recipe import Decision, Recipe
from spicerack.quantization.rotation import rotate
from spicerack.storage import format
from spicerack.storage.files import CONTAINER
from spicerack.storage.format import Format, Planned
from spicerack.storage.reader import Checkpoint, TensorInfo
from spicerack.storage.writer import SHARD_BYTES, Shard, Slot, Unit, plan_shards

_CLASSES = {kind.name: kind.float_class.__name__ for kind in kinds.KINDS} | {
    "head": "Linear", "router": "Linear", "experts": "experts",
}  # fmt: skip
"""Role of a tensor -> the class of the module that must read it, as `architecture.modules_of` tells it."""
_OUTSIDE = "an expert, or outside of the blocks that are calibrated: a scale per token, none that is static"
_LISTED = 8


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to one source tensor, and why; `planned` if it is quantized."""

    info: TensorInfo
    what: Literal["quantize", "copy", "drop"]
    why: str
    role: str
    layer_type: str
    slots: tuple[Slot, ...]
    planned: Planned | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A quantization, decided: every source tensor has its action, every output tensor its name, type and shape."""

    source: Checkpoint
    recipe: Recipe
    format: Format
    actions: tuple[Action, ...]
    notes: tuple[str, ...]
    config: Mapping[str, Any]
    parameters: int
    shard_bytes: int = SHARD_BYTES

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Files of the output. Units keep the source's order, so that both sides stream."""
        return plan_shards([Unit(a.info.name, a.slots) for a in self.actions if a.slots], self.shard_bytes)

    @property
    def bytes_before(self) -> int:
        return sum(a.info.nbytes for a in self.actions)

    @property
    def bytes_after(self) -> int:
        return sum(slot.nbytes for a in self.actions for slot in a.slots)

    def identity(self) -> dict[str, Any]:
        """Facts in which a resumed run must agree, and provenance in the ledger: no times, no paths."""
        return {
            "recipe": self.recipe.as_dict(),
            "source": self.source.fingerprint(),
            "format": self.format.name,
            "shard_bytes": self.shard_bytes,
            "versions": {"spicerack": __version__, "torch": torch.__version__},
        }

    def summary(self) -> dict[str, Any]:
        """The sizes, as the command line's contract names them. Bits include scales and zero points."""
        planned = [a.planned for a in self.actions if a.planned is not None]
        weights = sum(torch.Size(p.shape).numel() for p in planned)
        stored = sum(p.scheme.stored_bits(p.shape) for p in planned)
        return {
            "scheme": self.recipe.scheme.name,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": stored / weights if weights else 0.0,
            "bits_per_weight_total": 8 * self.bytes_after / self.parameters,
        }


def prepare(model: str | Path, what: Recipe, *, shard_bytes: int = SHARD_BYTES) -> Job:
    """Decide everything for the folder (or hub id) `model`.

    Raises CheckpointError (not a folder we read, or quantized already), RecipeError (a rule that matches nothing),
    SchemeError (an embedding with int8 activations), ShapeError (all tensors that no whole blocks tile, at once),
    UsageError (static activations in a model without blocks to calibrate).
    """
    return decide(Checkpoint.open(model), what, shard_bytes=shard_bytes)


def decide(source: Checkpoint, what: Recipe, *, shard_bytes: int = SHARD_BYTES) -> Job:
    """The same for a folder that is open, or a part of it."""
    if "quantization_config" in source.config or source.config.get("model_type") == CONTAINER:
        raise CheckpointError(
            f"{source.folder} is quantized already", "start from the float model: every rounding adds up"
        )
    if what.method is not None and what.method.rotates:
        source = rotate(source)
    seen = census.take(source)
    entries = seen.entries
    tied = {_module(alias): _module(owner) for alias, owner in seen.tied.items()}
    decisions = recipe.resolve(what, {entry.module: entry.role for entry in entries.values()}, tied)
    modules = modules_of(source.config, source.tensors)
    calibrated = _calibrated(source) if what.is_static else frozenset()
    planned: dict[str, Planned] = {}
    reasons: dict[str, str] = {}
    for name, entry in entries.items():
        decision = _checked(decisions[entry.module], entry, modules, name in seen.tied)
        if decision.scheme is not None and decision.scheme.activations == "static" and name not in calibrated:
            decision = Decision(decision.scheme.dynamic, f"{decision.why}; {_OUTSIDE}")
        reasons[name] = decision.why
        if decision.scheme is not None:
            planned[name] = _plan(entry, decision, f"{entry.module}.bias" in source.tensors)
    _check_shapes(planned)
    plan = {p.module: p for p in planned.values()}
    chosen = format.choose(plan)
    actions = tuple(_actions(entries, seen, planned, reasons, chosen, source))
    if modules is None:  # transformers does not know the architecture: names are all there is to go by
        linears = [entry.module for entry in entries.values() if _CLASSES.get(entry.role) == "Linear"]
    else:
        linears = [module for module, kind in modules.items() if kind == "Linear"]
    linears += [alias for alias in tied if alias not in linears]
    floats = [module for module in linears if module not in plan and tied.get(module) not in plan]
    return Job(
        source=source,
        recipe=what,
        format=chosen,
        actions=actions,
        notes=tuple(_notes(source, seen, plan, modules, reasons)),
        config=chosen.config(dict(source.config), plan, floats),
        parameters=seen.parameters,
        shard_bytes=shard_bytes,
    )


def _notes(
    source: Checkpoint,
    seen: census.Census,
    plan: Mapping[str, Planned],
    modules: Mapping[str, str] | None,
    reasons: Mapping[str, str],
) -> Iterator[str]:
    """What a person should know before work starts."""
    yield from source.notes
    outside = [_module(name) for name, why in reasons.items() if why.endswith(_OUTSIDE)]
    if outside:
        yield f"{listed(outside, _LISTED)}: {_OUTSIDE}"
    if modules is None:
        yield "transformers does not know this architecture: what each tensor is was told from names alone"
    left = [entry for entry in seen.entries.values() if entry.role == "experts" and not _runs_packed(entry, modules)]
    if left:
        share = sum(entry.info.nbytes for entry in left) / seen.nbytes
        yield f"{len(left)} fused expert tensors ({share:.0%} of the model) stay in float: their code needs them whole"
    yield from format.portability(plan, seen.shared_inputs)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _checked(decision: Decision, entry: census.Entry, modules: Mapping[str, str] | None, alias: bool) -> Decision:
    """The recipe's decision, unless the tensor is of a type or in a module that cannot be quantized."""
    if decision.scheme is None or alias:
        return decision if not alias else Decision(None, "tied")
    if entry.info.dtype not in SOURCE_BY_NAME:
        return Decision(None, f"{entry.info.dtype} tensors are copied as they are")
    if entry.role == "experts" and not _runs_packed(entry, modules):
        return Decision(None, "the architecture's code needs its experts whole")
    kind = modules.get(entry.module) if modules is not None else _CLASSES[entry.role]
    if kind != _CLASSES[entry.role] and kind != "experts":
        return Decision(None, f"the architecture has {kind or 'no module'} there, not {_CLASSES[entry.role]}")
    if decision.scheme.activations is not None and entry.role == "embedding":
        raise SchemeError(f"{entry.module}: an embedding has no activations to quantize", "use the scheme without a8")
    return decision


def _runs_packed(entry: census.Entry, modules: Mapping[str, str] | None) -> bool:
    """Whether a tensor of all experts is multiplied by one expert at a time."""
    return modules is not None and modules.get(entry.module) == "experts" and len(entry.info.shape) == 3


def _calibrated(source: Checkpoint) -> frozenset[str]:
    """The tensors of linear layers that lie in the model's blocks, as they are: what calibration sees the inputs of."""
    model = on_meta(source.config)
    if model is None:
        return frozenset()
    path, stack = blocks.repeated(model)
    inside = {f"{path}.{i}.{layer}.weight" for i, block in enumerate(stack) for layer in blocks.layers(block)}
    places = destinations(model, source.tensors).items()
    return frozenset(t for t, place in places if place.parameter in inside and not place.operations)


def _plan(entry: census.Entry, decision: Decision, bias: bool) -> Planned:
    assert decision.scheme is not None
    dtype = SOURCE_BY_NAME[entry.info.dtype]
    return Planned(entry.module, decision.scheme, entry.matrix_shape, entry.role, dtype, entry.transposed, bias)


def _check_shapes(planned: Mapping[str, Planned]) -> None:
    problems = []
    for name, p in planned.items():
        try:
            p.scheme.check_shape(name, p.shape)
        except ShapeError as error:
            problems.append(error)
    if not problems:
        return
    hints = sorted({p.hint for p in problems})
    raise ShapeError(
        listed([p.message for p in problems], _LISTED, between="\n  "),
        "; ".join(hints) + ": --set 'PATTERN=SCHEME' or --skip 'PATTERN'",
    )


def _actions(
    entries: Mapping[str, census.Entry],
    seen: census.Census,
    planned: Mapping[str, Planned],
    reasons: Mapping[str, str],
    chosen: Format,
    source: Checkpoint,
) -> Iterator[Action]:
    for name, entry in entries.items():
        info = entry.info
        p = planned.get(name)
        if p is not None:
            slots = tuple(Slot(key, dtype, shape) for key, (dtype, shape) in chosen.layout(p).items())
            yield Action(info, "quantize", reasons[name], entry.role, entry.layer_type, slots, p)
        elif name in seen.tied and _equal(source, name, seen.tied[name]):
            yield Action(info, "drop", f"the same tensor as {seen.tied[name]}", entry.role, entry.layer_type, ())
        else:
            slot = Slot(name, info.dtype, info.shape)
            yield Action(info, "copy", reasons[name], entry.role, entry.layer_type, (slot,))


def _equal(source: Checkpoint, alias: str, owner: str, rows: int = 4096) -> bool:
    a, b = source.tensors[alias], source.tensors[owner]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    starts = range(0, a.shape[0], rows)
    return all(torch.equal(source.read_rows(alias, i, i + rows), source.read_rows(owner, i, i + rows)) for i in starts)
