"""`--for ENGINE`: what a recipe decided, held against what an engine computes exactly, before a weight is read.

Layers that the engine has in float whatever their scheme stay float, and the reason is told. What it does not compute
in the scheme that was chosen is refused, all of it at once, with the rule and rules to paste for what is nearest; where
whole groups do not tile a layer and the recipe may fit it, it gets what the engine takes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from spicerack.errors import CheckpointError, SchemeError, ShapeError, UsageError, listed
from spicerack.models.gguf import config as gguf_configs
from spicerack.models.gguf import layers
from spicerack.models.gguf.family import PACKAGE, of_type
from spicerack.models.gguf.names import Names
from spicerack.models.overview import pattern_of
from spicerack.numerics.scheme import Scheme, parse
from spicerack.quantization import fitting
from spicerack.quantization.fitting import Misfit
from spicerack.quantization.recipe import Decision
from spicerack.storage import engine as engines
from spicerack.storage import exactness
from spicerack.storage.engine import Engine, Reads
from spicerack.storage.format import StoredTensor
from spicerack.storage.reader import Checkpoint
from spicerack.text.gguf.folder import words_of

_WITHOUT_SCALE = parse("mxfp4")
"""What is nearest to NVFP4 where an engine does not multiply by the scale of a tensor."""
_LISTED = 8
"""Kinds of layers that a message names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be computed.

    checkpoint  the float model
    decisions   tensor -> its scheme, as the recipe has it
    stored      tensor, scheme -> what it would be stored as
    shared      modules that read the same input
    fit_groups  whether layers that groups do not tile may have what fits
    """

    checkpoint: Checkpoint
    decisions: Mapping[str, Decision]
    stored: Callable[[str, Scheme], StoredTensor]
    shared: Sequence[Sequence[str]]
    fit_groups: bool


@dataclass(frozen=True, slots=True)
class Computed:
    """What an engine computes exactly.

    engine     the engine
    way        the files that it reads it from
    decisions  tensor -> its scheme, some of them float now
    doubt      what is not known of the model's family; None if nothing is
    """

    engine: Engine
    way: Reads
    decisions: dict[str, Decision]
    doubt: str | None = None

    def notes(self, fmt: str, contents: Mapping[str, StoredTensor]) -> list[str]:
        """What a person should know: how the folder, in the format `fmt`, gets there, and what is remarkable."""
        name, to = self.engine.name, self.way.to
        held = exactness.held(self.engine, self.way, contents)
        others = {
            (contents[module].scheme.name, one.stored.scheme.name)
            for module, one in held.items()
            if one.stored.scheme != contents[module].scheme
        }
        direct = not others and fmt == self.way.format
        how = f"{name} reads the folder as it is"
        if not self.way.written:
            how = f"{name} computes all of it exactly; spicerack does not write {to} yet"
        elif not direct:
            place = "model.gguf" if to == "gguf" else f"OUT-{to}"
            how = (
                f"{name} computes all of it exactly, once it is exported: "
                f"spicerack export OUT --to {to} --for {name} -o {place}"
            )
        said = [f"{name} has {given} as {theirs}, the same numbers" for given, theirs in sorted(others)]
        doubt = [self.doubt] if self.doubt is not None else []
        return [how, *doubt, *said, *([f"{name}: {self.way.remark}"] if self.way.remark else [])]


def computed(name: str, asked: Asked) -> Computed:
    """What the engine of that name computes: of the kinds of files that it reads, by the first of those by which it has
    the fewest layers in float.

    Raises UsageError for a model that it has not, with the reasons of the kind that is recommended; SchemeError for
    layers in schemes that it does not compute exactly.
    """
    engine, errors = engines.find(name), []
    outcomes: list[Computed] = []
    for way in engine.reads:
        try:
            doubt = way.doubt(engine.name, asked.checkpoint.config.get("model_type"))
            outcomes.append(Computed(engine, way, of_way(engine, way, asked), doubt))
        except ShapeError:
            if not outcomes:  # the recipe is to be mended, and not another kind of files to be taken
                raise
        except UsageError as error:
            errors.append(error)
    if not outcomes:
        # of several the one which the model is in, rather than one that has no such models
        raise min(errors, key=lambda error: not isinstance(error, SchemeError))
    return min(outcomes, key=lambda one: sum(decision.scheme is None for decision in one.decisions.values()))


def of_way(engine: Engine, way: Reads, asked: Asked) -> dict[str, Decision]:
    """The decisions for files of one kind, some of them float now. Raises as `computed` does, and ShapeError for layers
    that whole groups do not tile."""
    _refuse_model(engine, way, asked.checkpoint)
    decisions, misfits = dict(asked.decisions), []
    known: dict[tuple[object, ...], tuple[str | None, Scheme | None]] = {}
    for name, decision in asked.decisions.items():
        if decision.scheme is None:
            continue
        stored = asked.stored(name, decision.scheme)
        # layers of a kind are alike, and a model has hundreds
        key = (pattern_of(stored.module), stored.scheme, stored.shape, stored.role, stored.source_dtype)
        if key not in known:
            known[key] = _judged(engine, way, asked.checkpoint, stored)
        reason, near = known[key]
        if reason is None:
            continue
        if near is None:
            named = reason.startswith(engine.name)
            decisions[name] = decision.kept(reason if named else f"for {engine.name}: {reason}")
        elif asked.fit_groups and not exactness.fits(stored):
            decisions[name] = Decision(near, f"{decision.why}; {engine.name} has {near} there", decision.rule)
        else:
            misfits.append(Misfit(stored.module, ShapeError(f"{stored.module}: {reason}"), decision.scheme, near))
    _refuse(engine, misfits, asked)
    chosen = [asked.stored(name, one.scheme) for name, one in decisions.items() if one.scheme is not None]
    _refuse_together(engine, way, {stored.module: stored for stored in chosen}, asked)
    return decisions


def _judged(
    engine: Engine, way: Reads, checkpoint: Checkpoint, stored: StoredTensor
) -> tuple[str | None, Scheme | None]:
    """Why a layer is not computed exactly in its scheme, None if it is; and what is nearest, None for float."""
    if way.families == PACKAGE:
        names = Names(of_type(checkpoint.config.get("model_type")))
        if (reason := layers.place_obstacle(names, stored)) is not None:
            return reason, None
        if (reason := layers.scale_obstacle(names, stored)) is not None:
            other = replace(stored, scheme=_WITHOUT_SCALE)
            return reason, _WITHOUT_SCALE if exactness.fits(other) else None
    reason = exactness.obstacle(engine, way, stored)
    return reason, None if reason is None else exactness.nearest(engine, way, stored)


def _refuse_together(engine: Engine, way: Reads, contents: Mapping[str, StoredTensor], asked: Asked) -> None:
    """Raise SchemeError for what is not computed exactly because of other layers."""
    _refuse_uniform(engine, way, contents)
    reasons = exactness.obstacles(engine, way, contents, asked.shared)
    _refuse(engine, [Misfit(r.module, ShapeError(r.rule), r.nearest, r.nearest) for r in reasons if r.nearest], asked)
    if reasons:
        raise SchemeError(listed([one.rule for one in reasons], _LISTED, "layers"), "give all layers one scheme")


def _refuse_uniform(engine: Engine, way: Reads, contents: Mapping[str, StoredTensor]) -> None:
    """Raise SchemeError where layers would get more bits because files have one scheme for all: nobody asked for it."""
    held = exactness.held(engine, way, contents)
    own = {module: one.stored for module, one in held.items()}
    together = exactness.holder(engine, way).prepared(own)
    if changed := [module for module, stored in together.items() if stored.scheme != own[module].scheme]:
        module = changed[0]
        raise SchemeError(
            f"{module}: {way.to} has one scheme for all layers, so that {own[module].scheme} would be "
            f"{together[module].scheme} (and {len(changed) - 1} more)",
            "give all layers one scheme",
        )


def _refuse(engine: Engine, misfits: Sequence[Misfit], asked: Asked) -> None:
    """Raise SchemeError for layers that are not computed exactly, all at once, with rules to paste."""
    if not misfits:
        return
    tensors = {asked.stored(name, one.scheme).module: name for name, one in asked.decisions.items() if one.scheme}
    modules = list(tensors)
    sets = " ".join(f"--set '{rule}'" for rule in fitting.rules(misfits, modules))
    narrow = all(not exactness.fits(asked.stored(tensors[m.module], m.asked)) for m in misfits)
    fit = "add --fit-groups (fit_groups=True) or, which is the same, " if narrow else ""
    usual = f"; usual there: {', '.join(engine.usual)}" if not narrow else ""
    error = ShapeError if narrow else SchemeError
    raise error(
        f"{engine.name} does not compute this exactly:\n  " + listed(fitting.told(misfits), _LISTED, between="\n  "),
        f"{fit}{sets}{usual}",
    )


def _refuse_model(engine: Engine, way: Reads, checkpoint: Checkpoint) -> None:
    """Raise UsageError for a model that the engine has not, or computes otherwise; its tokenizer is looked at, too."""
    model_type = checkpoint.config.get("model_type")
    if (reason := way.family_obstacle(engine.name, model_type)) is not None:
        raise UsageError(reason, "spicerack formats MODEL says who reads it")
    if way.families != PACKAGE:
        return
    family, config = of_type(model_type), gguf_configs.whole(checkpoint.config)
    if reasons := gguf_configs.obstacles(family, config):
        raise CheckpointError(f"{engine.name}: {'; '.join(reasons)}", "spicerack formats MODEL says who reads it")
    words_of(checkpoint, family, config)
