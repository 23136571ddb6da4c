"""`prepare`: all of a quantization that is knowable before a weight is read, and the refusals that are.

    Checkpoint -> Source (what is known of each tensor) -> Decision (its scheme) -> Action (what the output has for it)

A `Job` is the whole of it, frozen: the loop, the writer, the memory plan and the dry run read it and decide nothing.
Weights are read here for one purpose alone: two tensors that config.json says are tied are compared (`census`), because
two that differ are two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spicerack._version import __version__
from spicerack.errors import RecipeError, SchemeError, counted, listed
from spicerack.models.architecture import cuts, host_of, on_meta
from spicerack.models.fit import relying_on_ties
from spicerack.models.opening import open_stored
from spicerack.models.overview import refuse_quantized
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import decisions, door, engines, fitting
from spicerack.quantization.decisions import Source
from spicerack.quantization.engines import Computed
from spicerack.quantization.recipe import Decision, Recipe
from spicerack.quantization.rotation import original, rotate
from spicerack.storage import format, released
from spicerack.storage.cutting import cut
from spicerack.storage.format import Format, Layout, Reading, StoredTensor
from spicerack.storage.ledger import Entry, Fate
from spicerack.storage.reader import Checkpoint, TensorInfo
from spicerack.storage.writer import SHARD_BYTES, OutputTensor, Shard, Unit, shards_of, stem_of

_LISTED = 8
"""Tensors that a message names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Action:
    """What becomes of one tensor of the source.

    info         the tensor, as the source's header has it
    fate         it is quantized, copied, or dropped (the same tensor is there under another name)
    why          the rule, or the reason, for people
    role         what the tensor does in the model
    layer_type   what all layers of its kind are called
    tensors      the tensors that the output has for it, by name, type and shape
    stored       what it is stored as, if it is quantized
    """

    info: TensorInfo
    fate: Fate
    why: str
    role: str
    layer_type: str
    tensors: tuple[OutputTensor, ...]
    stored: StoredTensor | None = None

    def entry(self, error: float | None = None, events: Iterable[str] = ()) -> Entry:
        """The ledger's entry of the tensor: what was decided, and what became of it. error: of its codes, if known."""
        info, stored = self.info, self.stored
        return Entry(
            info.name, self.fate, self.why, self.layer_type, None if stored is None else stored.scheme.name, info.dtype,
            info.shape, info.nbytes, sum(tensor.nbytes for tensor in self.tensors), error, tuple(events),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a folder weighs, before and after.

    scheme                  the recipe's
    bytes_before, bytes_after   of all tensors; before as floats, whatever the files hold
    bytes_stored            of the source's tensors as its files hold them, which a release in FP8 or MXFP4 decodes to
                            more
    bits_per_weight         of a quantized weight, with its share of scales and zero points; 0 if none is
    bits_per_weight_total   of a parameter, over all of them
    """

    scheme: str
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    bits_per_weight_total: float
    bytes_stored: int


@dataclass(frozen=True, slots=True)
class Job:
    """A quantization, decided: every source tensor has its action, every output tensor its name, type and shape.

    source        the float folder, rotated where the method says so
    recipe        as it was asked for
    format        of the output
    actions       one for each tensor, in the order of the source's files
    notes         what a person should know before work starts
    config        config.json of the output
    parameters    numbers that the model has, tied ones counted once
    shard_bytes   the largest file to write
    """

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
        units = [Unit(a.info.name, a.tensors) for a in self.actions if a.tensors]
        return shards_of(units, self.shard_bytes, stem_of(self.source.shards))

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(a.info.nbytes for a in self.actions)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the output, headers left out."""
        return sum(tensor.nbytes for a in self.actions for tensor in a.tensors)

    def identity(self) -> dict[str, Any]:
        """Facts in which a resumed run must agree, and provenance in the ledger: no times, no paths."""
        return {
            "recipe": self.recipe.as_dict(),
            "source": self.source.fingerprint(),
            "format": self.format.name,
            "shard_bytes": self.shard_bytes,
            "versions": {"spicerack": __version__, "torch": torch.__version__},
        }

    def sizes(self) -> Sizes:
        """What the folder weighs, before and after; known exactly, because the layout is."""
        contents = [a.stored for a in self.actions if a.stored is not None]
        weights = sum(torch.Size(p.shape).numel() for p in contents)
        bits = sum(p.scheme.stored_bits(p.shape) for p in contents)
        return Sizes(
            scheme=self.recipe.scheme.name,
            bytes_before=self.bytes_before,
            bytes_after=self.bytes_after,
            bits_per_weight=bits / weights if weights else 0.0,
            bits_per_weight_total=8 * self.bytes_after / self.parameters,
            bytes_stored=original(self.source).stored_bytes,
        )


def prepare(model: str | Path, asked: Recipe, *, with_text: bool = False, shard_bytes: int = SHARD_BYTES) -> Job:
    """Decide everything for the folder (or hub id) `model`.

    with_text: whether there is calibration text; towers for pictures or sound then stay in float unless a rule names
    them.

    Raises CheckpointError (not a folder we read, quantized already, or not what its class needs), RecipeError (a rule
    that matches nothing, or asks for what cannot be had; a recipe that quantizes nothing),
    SchemeError (an embedding with int8 activations), ShapeError (all tensors that no whole groups tile, at once),
    UsageError (static activations in a model without blocks to calibrate).
    """
    return decide(open_stored(model), asked, with_text=with_text, shard_bytes=shard_bytes)


def decide(checkpoint: Checkpoint, asked: Recipe, *, with_text: bool = False, shard_bytes: int = SHARD_BYTES) -> Job:
    """The same for a folder that is open, or a part of it.

    checkpoint: of a float model. asked: the recipe; a rotation in its method turns the checkpoint first. Raises as
    `prepare` does, and CheckpointError for a model that is quantized already.
    """
    checkpoint = released.decoded(checkpoint)
    refuse_quantized(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    checkpoint = cut(checkpoint, cuts(on_meta(checkpoint.config), shapes))
    if asked.method is not None and asked.method.rotation is not None:
        checkpoint = rotate(checkpoint, asked.method.rotation)
    source = Source.of(checkpoint)
    unread = door.check(source)
    decided = decisions.decide(source, asked, with_text=with_text)
    asked_for, engine = decided, _computed(source, decided, asked)
    decided = _fitted(source, decided if engine is None else engine.decisions, asked)
    stored_tensors = {name: source.stored(name, choice.scheme) for name, choice in decided.items() if choice.scheme}
    contents = {stored.module: stored for stored in stored_tensors.values()}
    fmt = format.choose(contents)
    tied = source.tied
    floats = [name for name in source.linears() if name not in contents and tied.get(name) not in contents]
    config = _untied(source, contents)
    reading = fmt.reading(config, contents, host_of(config, _headers(checkpoint), contents, floats))
    if engine is not None and engine.way.rehearsed and fmt.name == engine.way.format and reading.obstacle is not None:
        several = len({stored.scheme for stored in contents.values()}) > 1
        hint = "take one scheme for all" if several else "take another scheme, or another engine"
        raise SchemeError(f"{engine.engine.name} does not load this: {reading.obstacle}", hint)
    return Job(
        source=checkpoint,
        recipe=asked,
        format=fmt,
        actions=tuple(_actions(source, decided, stored_tensors, fmt)),
        notes=(
            *checkpoint.notes,
            *unread,
            *_refitted(source, asked_for, decided),
            *([] if engine is None else engine.notes(fmt.name, contents)),
            *_notes(source, asked, decided, contents, reading),
        ),
        config=fmt.config(config, contents, reading),
        parameters=source.census.parameters,
        shard_bytes=shard_bytes,
    )


def _computed(source: Source, decided: Mapping[str, Decision], asked: Recipe) -> Computed | None:
    """What the recipe's engine computes exactly of what was decided; None where the recipe is for nobody.

    Raises UsageError of all kinds for what it does not.
    """
    if asked.for_ is None:
        return None
    shared = source.census.shared_inputs
    computed = engines.computed(
        asked.for_, engines.Asked(source.checkpoint, decided, source.stored, shared, fit_groups=asked.fit_groups)
    )
    decisions.check(source, asked, computed.decisions)
    return computed


def _headers(checkpoint: Checkpoint) -> Layout:
    """What the float folder holds: name -> type and shape."""
    return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


def _untied(source: Source, contents: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The model's config.json, which must not call tied what is not: a reader would put one tensor in both places.

    Where both are floats transformers sees from the files that they differ, and the word stays: other tensors may be
    tied by it, and not be in the folder at all. Raises RecipeError where one is packed and there are such.
    """
    config = dict(source.checkpoint.config)
    entries = source.census.entries
    packed = any(stored.role == "embedding" for stored in contents.values()) or any(
        entries[name].module in contents for name in source.census.apart
    )
    if not source.census.apart or source.census.tied or not packed:
        return config
    if source.model is not None and (missing := relying_on_ties(source.model, source.checkpoint.tensors)):
        raise RecipeError(
            f"{source.census.apart[0]} differs from what config.json ties it to, and {missing[0]} is really tied: "
            "one word says both",
            f"leave it in float: --skip '{entries[source.census.apart[0]].module}', and its embedding",
        )
    for key, value in config.items():
        if isinstance(value, dict) and value.get("tie_word_embeddings"):
            config[key] = {**value, "tie_word_embeddings": False}
    return {**config, "tie_word_embeddings": False} if config.get("tie_word_embeddings", True) else config


def _refitted(source: Source, before: Mapping[str, Decision], after: Mapping[str, Decision]) -> Iterator[str]:
    """A note for each scheme that took another's place because groups did not tile layers."""
    entries = source.census.entries
    changed: dict[tuple[Scheme, Scheme], list[str]] = {}
    for name, choice in after.items():
        old = before[name].scheme
        if old is not None and choice.scheme is not None and choice.scheme != old:
            changed.setdefault((old, choice.scheme), []).append(entries[name].module)
    for (old, new), modules in changed.items():
        patterns = fitting.patterns(modules, [entry.module for entry in entries.values()])
        are = "is" if len(modules) == 1 else "are"
        yield f"{counted(len(modules), 'layer')} that {old} does not tile {are} {new}: {listed(patterns, _LISTED)}"


def _notes(
    source: Source,
    asked: Recipe,
    decided: Mapping[str, Decision],
    contents: Mapping[str, StoredTensor],
    reading: Reading,
) -> Iterator[str]:
    """What a person should know before work starts."""
    for note, modules in decisions.notes(source, decided, asked):
        yield f"{listed(modules, _LISTED)}: {note}" if modules else note
    yield from format.portability(contents, source.census.shared_inputs, reading)


def _fitted(source: Source, decided: Mapping[str, Decision], asked: Recipe) -> dict[str, Decision]:
    """What was decided, with the nearest scheme that fits for tensors that no whole groups tile, if the recipe says so.

    Raises ShapeError for all of them at once if it does not, with rules to paste, and for those that nothing fits.
    """
    entries = source.census.entries
    chosen = {
        entries[name].module: (choice.scheme, entries[name].matrix_shape)
        for name, choice in decided.items()
        if choice.scheme is not None
    }
    misfits = fitting.check(chosen, fit_groups=asked.fit_groups)
    return {
        name: choice
        if entries[name].module not in misfits or choice.scheme is None
        else Decision(
            misfits[entries[name].module].nearest,
            f"{choice.why}; groups of {choice.scheme} do not tile it",
            choice.rule,
        )
        for name, choice in decided.items()
    }


def _actions(
    source: Source, decided: Mapping[str, Decision], stored_tensors: Mapping[str, StoredTensor], fmt: Format
) -> Iterator[Action]:
    """One for each tensor, in the order of the files.

    decided: tensor -> its scheme and why. stored_tensors: of those that are quantized. fmt: the output's.
    """
    tied = source.census.tied
    for name, entry in source.census.entries.items():
        info, stored, why = entry.info, stored_tensors.get(name), decided[name].why
        if stored is not None:
            tensors = tuple(OutputTensor(key, dtype, shape) for key, (dtype, shape) in fmt.layout(stored).items())
            yield Action(info, "quantize", why, entry.role, entry.layer_type, tensors, stored)
        elif name in tied:
            yield Action(info, "drop", f"the same tensor as {tied[name]}", entry.role, entry.layer_type, ())
        else:
            tensor = OutputTensor(name, info.dtype, info.shape)
            yield Action(info, "copy", why, entry.role, entry.layer_type, (tensor,))
