"""What stands against an export, and what it will be: all that can be refused, before a byte is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from spicerack._version import __version__
from spicerack.errors import OutputError, SchemeError, WeightError, listed
from spicerack.exports import verify
from spicerack.exports.source import Change, Source
from spicerack.exports.target import Asked, Target
from spicerack.models import census
from spicerack.numerics import codec, rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.storage import exactness, holding
from spicerack.storage import format as formats
from spicerack.storage.engine import Engine, Reads
from spicerack.storage.format import StoredTensor
from spicerack.storage.holding import Held

_LISTED = 3
"""Layers, and rules, that a refusal names before it counts the rest."""


_ELSEWHERE = "export it to something else"


@dataclass(frozen=True, slots=True)
class Planned:
    """An export that nothing speaks against.

    source  as the target gets it
    held    in which scheme each tensor is held, and whether exactly
    reader  who will read it back
    facts   for the ledger that travels
    """

    source: Source
    held: Mapping[str, Held]
    reader: verify.Reader
    facts: Mapping[str, Any]


def plan(given: Source, target: Target, to: str, *, requantize: bool = False, engine: Engine | None = None) -> Planned:
    """All of an export that can be refused, before a byte is written.

    engine: that the file is for, which may compute less than the format holds; None: whoever reads the format. Raises
    as `export` does.
    """
    way = None if engine is None else engine.reading(to, given.config.get("model_type"))
    held = holding.hold(
        Asked(target, to) if engine is None or way is None else exactness.holder(engine, way), given.contents
    )
    if not requantize:
        _refuse(held, given)
    source = changed(given, held, target, to)
    if engine is not None and way is not None:
        _refuse_together(engine, way, given, source)
    if lacking := target.obstacles(to, source.contents):
        raise SchemeError(_by_rule(lacking), _ELSEWHERE)
    if refused := target.refusals(to, source):
        raise SchemeError(listed(refused, _LISTED, "reasons", between="; "), _ELSEWHERE)
    if inexact := target.inexact(to, source):
        hint = "quantize the float model in another scheme"
        raise WeightError(listed(inexact, _LISTED, "tensors", between="; "), hint)
    _look_at_scales(source, held)
    reader = verify.choose(to, source)
    if reader is None:
        raise OutputError(f"nobody here reads {to}: what is written could not be verified", "install its reader")
    return Planned(source, held, reader, facts_of(to, reader))


def facts_of(to: str, reader: verify.Reader | None) -> dict[str, Any]:
    """What the ledger that travels says of the export."""
    return {"to": to, "spicerack": __version__, **verify.facts(reader)}


def _refuse_together(engine: Engine, way: Reads, given: Source, source: Source) -> None:
    """Raise SchemeError for what an engine does not compute of the tensors as the target gets them."""
    shared = census.take(given.described).shared_inputs
    if reasons := [one.rule for one in exactness.obstacles(engine, way, source.contents, shared)]:
        raise SchemeError(listed(reasons, _LISTED, "reasons", between="; "), "give them one scheme, or skip them")
    reading = source.reading(formats.get(way.format)) if way.rehearsed else None
    if reading is not None and reading.obstacle is not None:
        raise SchemeError(f"{engine.name} does not load it: {reading.obstacle}", "export it to something else")


def _refuse(held: Mapping[str, Held], given: Source) -> None:
    """Raise SchemeError for tensors that cannot be held exactly: layers, their rule, and the nearest scheme that fits.

    A rule stands there once, however many layers it speaks against.
    """
    inexact = {module: one for module, one in held.items() if not one.exact}
    if not inexact:
        return
    nearest = {
        module: one.stored.scheme
        for module, one in inexact.items()
        if one.stored.scheme != given.contents[module].scheme
    }
    reasons = [
        f"{one.rule}" + (f" (nearest: {nearest[module]})" if module in nearest else "")
        for module, one in inexact.items()
    ]
    again = "--requantize rounds to the nearest scheme again, and says what that costs"
    raise SchemeError(_by_rule(reasons), again if len(nearest) == len(inexact) else _ELSEWHERE)


def _by_rule(reasons: Sequence[str]) -> str:
    """Sentences that begin with `MODULE: `, as one message in which each rule stands once, behind its layers."""
    layers: dict[str, list[str]] = {}
    for reason in reasons:
        module, _, rule = reason.partition(": ")
        layers.setdefault(rule, []).append(module)
    rules = [f"{listed(modules, _LISTED, 'layers')}: {rule}" for rule, modules in layers.items()]
    return listed(rules, _LISTED, "reasons", between="; ")


def changed(given: Source, held: Mapping[str, Held], target: Target, to: str) -> Source:
    """The source as the target gets it: each tensor in the scheme that it is held in, or rounded to it."""
    contents = target.prepared(to, {module: one.stored for module, one in held.items()})
    changes = dict(given.changes)
    for module, wanted in contents.items():
        stored = given.contents[module]
        if (wanted.scheme, wanted.source_dtype) != (stored.scheme, stored.source_dtype):
            exact = held[module].exact
            whole = partial(holding.convert if exact else round_again, wanted=wanted)
            if (first := given.changes.get(module)) is not None:
                changes[module] = Change(partial(_after, first.decoded, whole))
            else:
                changes[module] = Change(whole, partial(holding.relabeled, wanted=wanted) if exact else None)
    return Source(given.folder, contents, changes)


def _after(first: Callable[[QTensor], QTensor], then: Callable[[QTensor], QTensor], q: QTensor) -> QTensor:
    """Both changes of q."""
    return then(first(q))


def round_again(q: QTensor, wanted: StoredTensor) -> QTensor:
    """q decoded and rounded to nearest in the scheme of `wanted`. Raises WeightError."""
    w = codec.decode(replace(q, transposed=False))
    rounded = rounding.to_nearest(w, wanted.scheme, name=wanted.module, source=wanted.source_dtype)
    return replace(rounded, transposed=q.transposed)


def _look_at_scales(source: Source, held: Mapping[str, Held]) -> None:
    """Raise WeightError for a scale that the target's type of scales does not hold: before a byte is written.

    Only scales are read where codes may lie as they are; tensors that are rounded again find new ones.
    """
    for module, wanted in source.contents.items():
        if module not in source.changes or not held[module].exact:
            continue
        stored = source.folder.contents[module]
        undecoded = source.folder.undecoded(stored) if stored.scheme.scale_obstacle is None else None
        if undecoded is None:
            source.packed(module)
        else:
            holding.stored_scale(undecoded.plain_scale, stored.scheme, wanted)
        source.release(stored)
