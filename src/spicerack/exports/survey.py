"""`spicerack.formats`: what each engine makes of a model, in each kind of file that it reads, before one is written.

Of a quantized folder: `exact` (an export writes it, and every weight stays what it is), `another scheme` (it would have
to be rounded again, or quantized anew) or `not at all`, with the reason and the bytes. Of a float model: the schemes in
which `quantize --for ENGINE` would take it. Both are what the commands decide by themselves, up to the first byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spicerack import plugins
from spicerack.arguments import checked
from spicerack.errors import SchemeError, ShapeError, SpicerackError, UsageError, listed
from spicerack.exports import target as targets
from spicerack.exports import verify
from spicerack.exports.planning import changed, facts_of, plan
from spicerack.exports.restoring import restored
from spicerack.exports.source import Source
from spicerack.exports.target import Order
from spicerack.models import census
from spicerack.models.overview import pattern_of
from spicerack.numerics.scheme import Scheme, parse
from spicerack.quantization import decisions, door, engines
from spicerack.quantization.recipe import Decision, Recipe
from spicerack.runtime.folder import Folder
from spicerack.storage import engine as known
from spicerack.storage import exactness
from spicerack.storage.engine import Engine, Obstacle, Reads

Verdict = Literal["exact", "another scheme", "not at all"]
_LISTED = 2
"""Layers that a reason names before it counts the rest."""
_NAME = "model"
"""What a file is called whose size is foretold: GGUF files have their name inside."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one engine makes of the model in one kind of file.

    engine, version  who, as its rules were looked at
    to               the kind of file, as `export --to` calls it
    verdict          whether an export writes it exactly
    nbytes           of what would be written, to the byte; None where nothing would, or nobody here writes it
    reasons          why it is not exact, layers of a kind once; and what is remarkable if it is
    schemes          what layers would have to be in, where another scheme would do
    checked          how it is known what the engine does
    needs            what must be installed beside the engine
    command          what writes it; "" where nothing does, and where nothing has to
    as_is            the engine reads the model as it lies there
    """

    engine: str
    version: str
    to: str
    verdict: Verdict
    nbytes: int | None
    reasons: tuple[str, ...]
    schemes: tuple[str, ...]
    checked: str
    needs: str
    command: str
    as_is: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """In which schemes one engine computes a float model exactly, from one kind of file.

    engine, version  who, as its rules were looked at
    to               the kind of file, as `export --to` calls it
    written          whether anybody here writes it
    schemes          in which every linear layer is computed, without bits to spare
    partly           in which some are, and the others stay float
    floats           which those are, and why, in the first of these schemes
    reason           why there is no scheme; "" where there are some
    usual            that of the schemes which people have there; "" where none is
    """

    engine: str
    version: str
    to: str
    written: bool
    schemes: tuple[str, ...]
    partly: tuple[str, ...]
    floats: tuple[str, ...]
    reason: str
    usual: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What engines make of a model: `lines` of a quantized one, `choices` of a float one."""

    model: Path
    lines: tuple[Line, ...] = ()
    choices: tuple[Choice, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """By the names of the command line's contract."""
        lines = [{**asdict(line), "bytes": line.nbytes} for line in self.lines]
        for line in lines:
            del line["nbytes"]
        what = {"formats": lines} if self.lines else {"schemes": [asdict(choice) for choice in self.choices]}
        return {"model": str(self.model), "quantized": bool(self.lines), **what}


@checked
def formats(model: str | Path) -> Survey:
    """What each engine makes of a model: a folder, GGUF file or hub id, quantized or float.

    No weight is decoded; scales are looked at where a type could fail to hold them. Raises CheckpointError for what is
    no model, or lacks a part of it.
    """
    folder = Folder.open(model)
    place = folder.checkpoint.folder
    if folder.format is None:
        return Survey(place, choices=tuple(_choices(folder)))
    given = restored(Source.of(folder))
    given.refuse_gaps()
    shared = census.take(given.described).shared_inputs
    lines = (_line(given, engine, way, shared, str(model)) for engine in known.every() for way in engine.reads)
    return Survey(place, lines=tuple(lines))


# ---- quantized -------------------------------------------------------------------------------------------------------


def _line(given: Source, engine: Engine, way: Reads, shared: Sequence[Sequence[str]], model: str) -> Line:
    """One engine with one kind of file."""

    def line(verdict: Verdict, reasons: Sequence[str], nbytes: int | None = None, schemes: Sequence[str] = ()) -> Line:
        out = "model.gguf" if way.to == "gguf" else f"OUT-{way.to}"
        again = " --requantize" if verdict == "another scheme" else ""
        command = f"spicerack export {model} --to {way.to} --for {engine.name}{again} -o {out}"
        return Line(
            engine.name, engine.version, way.to, verdict, nbytes, tuple(reasons), tuple(schemes), way.checked,
            way.needs, command if nbytes is not None else "",
        )  # fmt: skip

    if (reason := way.family_obstacle(engine.name, given.config.get("model_type"))) is not None:
        return line("not at all", [reason])
    obstacles = exactness.obstacles(engine, way, given.contents, shared)
    if not way.written:
        codes = _told(obstacles) or ["its codes would be exact there"]
        return line("not at all", [f"spicerack does not write {way.to} yet", *codes])
    if not obstacles:
        return _exact(given, engine, way, line)
    if any(one.nearest is None for one in obstacles):
        return line("not at all", _told([one for one in obstacles if one.nearest is None]))
    try:
        nbytes = _rounded_bytes(given, engine, way)
    except SpicerackError as error:
        return line("not at all", [error.message])
    near = {one.nearest.name for one in obstacles if one.nearest is not None}
    return line("another scheme", _told(obstacles), nbytes, sorted(near))


def _exact(given: Source, engine: Engine, way: Reads, line: Callable[..., Line]) -> Line:
    """What the headers have nothing against."""
    target = targets.find(way.to)
    try:
        planned = plan(given, target, way.to, engine=engine)
    except UsageError as error:
        return line("not at all", [error.message])
    except SpicerackError as error:  # a scale
        return line("another scheme", [error.message])
    nbytes = target.nbytes(planned.source, _order(way, planned.facts))
    notes = target.notes(way.to, planned.source)
    doubt = way.doubt(engine.name, given.config.get("model_type"))
    exact = line("exact", [*notes, *filter(None, (doubt, way.remark))], nbytes)
    own = given.folder.format
    if own is None or own.name != way.format or planned.source.changes:
        return exact
    return replace(exact, command="", as_is=True)


def _rounded_bytes(given: Source, engine: Engine, way: Reads) -> int | None:
    """Bytes of what `--requantize` would write. Raises UsageError where that would be refused, too."""
    target = targets.find(way.to)
    source = changed(given, exactness.held(engine, way, given.contents), target, way.to)
    if refused := target.obstacles(way.to, source.contents) + target.refusals(way.to, source):
        raise UsageError(listed(refused, _LISTED, "reasons", between="; "))
    return target.nbytes(source, _order(way, facts_of(way.to, verify.choose(way.to, source))))


def _order(way: Reads, facts: Mapping[str, Any]) -> Order:
    """What would be asked of the target."""
    name = f"{_NAME}.gguf" if way.to == "gguf" else _NAME
    return Order(way.to, Path(name), lambda _path: None, facts)


def _told(obstacles: Sequence[Obstacle]) -> list[str]:
    """A sentence for each kind of layer: `7 x model.layers.*.q_proj: awq has no 8 bits (nearest: w4g32)`."""
    kinds: dict[str, list[str]] = {}
    for one in obstacles:
        rule = one.rule.partition(": ")[2] + (
            f" (nearest: {one.nearest})" if one.nearest else " (it stays float there)"
        )
        kinds.setdefault(rule, []).append(pattern_of(one.module))
    lines = []
    for rule, patterns in kinds.items():
        named = [f"{patterns.count(p)} x {p}" if patterns.count(p) > 1 else p for p in dict.fromkeys(patterns)]
        lines.append(f"{listed(named, _LISTED, 'kinds')}: {rule}")
    return lines


# ---- float -----------------------------------------------------------------------------------------------------------


def _schemes() -> Iterator[Scheme]:
    """What is tried: widths, groups and zero points of the grammar, and schemes with a file of their own."""
    for bits in (2, 3, 4, 5, 6, 8):
        for group in ("", "g128", "g64", "g32"):
            yield from (parse(f"w{bits}{group}{zero}") for zero in ("", "z"))
    yield from map(parse, ("w8a8", "w2g32h", *plugins.names("numerics.schemes")))


def _choices(folder: Folder) -> Iterator[Choice]:
    """Of each engine."""
    source = decisions.Source.of(folder.checkpoint)
    door.check(source)
    decided = decisions.decide(source, Recipe(parse("w8")))
    layers: dict[tuple[object, ...], str] = {}  # one of each kind
    for name, decision in decided.items():
        entry = source.census.entries[name]
        if decision.scheme is not None:
            layers.setdefault((pattern_of(entry.module), entry.matrix_shape, entry.info.dtype), name)
    for engine in known.every():
        for way in engine.reads:
            yield _choice(engine, way, source, list(layers.values()))


def _choice(engine: Engine, way: Reads, source: decisions.Source, layers: Sequence[str]) -> Choice:
    """In which schemes one engine computes these layers: as `quantize --for` decides."""
    whole: list[str] = []
    partly: list[str] = []
    floats: tuple[str, ...] = ()
    reason = ""
    for scheme in _schemes():
        asked = engines.Asked(
            source.checkpoint, {name: Decision(scheme, "recipe") for name in layers}, source.stored, (), False
        )
        try:
            decided = engines.of_way(engine, way, asked)
        except (SchemeError, ShapeError) as error:
            reason = reason or error.message
            continue
        except UsageError as error:  # of the model, and not of the scheme
            return Choice(engine.name, engine.version, way.to, way.written, (), (), (), error.message, "")
        contents = {name: source.stored(name, scheme) for name, one in decided.items() if one.scheme is not None}
        held = exactness.held(engine, way, contents)
        if not contents or any(one.stored.scheme != scheme for one in held.values()):
            continue  # the same numbers in more bits: not what anybody would choose
        if len(contents) == len(layers):
            whole.append(scheme.name)
            continue
        kept = {pattern_of(decisions.module_of(name)): one.why for name, one in decided.items() if one.scheme is None}
        floats = floats or tuple(f"{pattern}: {why}" for pattern, why in kept.items())
        partly.append(scheme.name)
    reason = "" if whole or partly else reason or "no layer has the shape for it"
    usual = next((name for name in engine.usual if name in (whole or partly)), "")
    return Choice(engine.name, engine.version, way.to, way.written, tuple(whole), tuple(partly), floats, reason, usual)
