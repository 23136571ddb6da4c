"""Units: tensors that have one scheme together, the schemes that each may have, and what it takes in them.

Tensors go together that read the same input (q, k and v; gate and up), because engines make one matrix of them, all
experts of a block that have the same role, and whatever else an engine ties. What a rule names, what stays in float,
and what no text reaches is in no unit: nothing is left to choose there.

Which schemes are tried (`LADDER`) is a ladder of steps of a third to a whole bit: groups of 128, which lose least for
their bits, and between them super-blocks, whose scales are quantized themselves. Of 19 that were estimated on the
project's model these are the lower hull, but for a hair (docs/quantization/budgets.md). For an engine those schemes are
tried that it computes exactly for the tensor and holds in no more bits than we do: three bits that it would say in four
save nothing there. Levels of a bit and a half and less are not tried: they are for models that were trained in them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spicerack import plugins
from spicerack.errors import ShapeError, UsageError
from spicerack.models.narrow import nearest
from spicerack.models.overview import pattern_of
from spicerack.numerics.scheme import Scheme, parse
from spicerack.quantization.job import Job
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.storage import engine as engines
from spicerack.storage import exactness, layouts
from spicerack.storage.engine import Engine, Reads
from spicerack.storage.format import StoredTensor
from spicerack.storage.gguf import blocks

LADDER = ("w2g128h", "q2_k", "w3g128", "q3_k", "w4g128", "q4_k", "w5g128", "q5_k", "q6_k", "w8g128")
"""Of our own formats, which hold every scheme, fewest bits first."""
PLAIN = "w8"
"""What tiles every matrix: the scheme of a recipe that only lists what is quantized."""
_AFFINE = tuple(f"w{bits}{group}z" for bits in (2, 3, 4, 5, 6, 8) for group in ("g128", "g64", "g32"))
_SYMMETRIC = tuple(f"w{bits}{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("", "g128", "g64", "g32"))
"""What engines are asked about beside the ladder and the schemes that have names of their own."""
_MOST = 10
"""Schemes of a unit that are tried for an engine: each is solved for every layer."""
_NOMINAL = (4096, 4096)
"""A shape by which schemes are ordered, so that all units get the same ones."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A unit before anything is known of what it loses.

    name      for people: the first module and the last parts of the others' names
    pattern   that matches its modules and no others
    tensors   names in the checkpoint
    stored    what each would be stored as, in whatever scheme
    schemes   that it may have, fewest bits first
    """

    name: str
    pattern: str
    tensors: tuple[str, ...]
    stored: tuple[StoredTensor, ...]
    schemes: tuple[Scheme, ...]

    @property
    def weights(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(one.shape) for one in self.stored)

    def bits(self, scheme: Scheme) -> int:
        """Bits that its weights take, scales counted."""
        return sum(scheme.stored_bits(one.shape) for one in self.stored)


@dataclass(frozen=True, slots=True)
class Choices:
    """All units of a model.

    units    in the order of the files
    nbytes   unit's name -> scheme's name -> bytes of all that it becomes, headers left out
    notes    what a person should know: what has no choice, and why
    """

    units: tuple[Choice, ...]
    nbytes: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]


def listing(asked: Recipe) -> Recipe:
    """The recipe by which it is listed what would be quantized: that of the rules, with a scheme that tiles all."""
    return dataclasses.replace(asked, scheme=parse(PLAIN), for_=None, fit_groups=True)


def choices(job: Job, shared: Sequence[Sequence[str]], reached: Iterable[str], engine: str | None) -> Choices:
    """The units of a model.

    job      of a `listing` recipe
    shared   modules that read the same input, of the census
    reached  tensors that lie in blocks that text runs through: of others nobody knows what they lose
    engine   that must compute all of it exactly; None for our own formats

    Raises UsageError where there is no unit that has a choice.
    """
    known = set(reached)
    candidates = [a for a in job.actions if a.stored is not None and not a.why.startswith("rule ")]
    stored = {a.stored.module: (a.info.name, a.stored) for a in candidates if a.stored and a.info.name in known}
    units, stuck = [], []
    found = None if engine is None else engines.find(engine)
    ways: Sequence[Reads | None] = [None] if found is None else found.reads
    groups = _groups(list(stored), shared, found)
    for way in ways:
        legal = _legal_of([[stored[m][1] for m in group] for group in groups], found, way)
        units = [_unit(g, stored, schemes, list(stored)) for g, schemes in zip(groups, legal, strict=True) if schemes]
        stuck = [group for group, schemes in zip(groups, legal, strict=True) if not schemes]
        if any(len(unit.schemes) > 1 for unit in units):
            break
    if not any(len(unit.schemes) > 1 for unit in units):
        reason = "nothing of this model" if found is None else f"{found.name} leaves nothing of this model that"
        raise UsageError(f"{reason} has a choice of schemes", "name the scheme: --scheme w4g128")
    beside = [a.stored.module for a in candidates if a.stored and a.info.name not in known]
    notes = [
        *([f"outside of the blocks that text runs through, in 8 bits: {_listed(beside)}"] if beside else []),
        *([f"no scheme of {engine or 'ours'} fits, float: {_listed([m for g in stuck for m in g])}"] if stuck else []),
    ]
    return Choices(tuple(units), _nbytes(units), tuple(notes))


def recipe_of(base: Recipe, choice: Choices, chosen: Mapping[str, str]) -> Recipe:
    """The recipe of a mix: a rule for each unit, behind the person's own.

    base     as asked for, its scheme of no account
    choice   the units
    chosen   unit's name -> scheme's name
    """
    rules = [Rule(unit.pattern, parse(chosen[unit.name])) for unit in choice.units]
    weights: dict[str, int] = {}
    for unit in choice.units:
        weights[chosen[unit.name]] = weights.get(chosen[unit.name], 0) + unit.weights
    usual = parse(PLAIN) if base.for_ is None else max(choice.units, key=lambda unit: unit.weights).schemes[-1]
    return dataclasses.replace(base, scheme=usual, fit_groups=True).then(rules)


def _groups(modules: Sequence[str], shared: Sequence[Sequence[str]], engine: Engine | None) -> list[tuple[str, ...]]:
    """Modules that go together, in the order of the files."""
    joined = {module: [module] for module in modules}

    def join(group: Sequence[str]) -> None:
        merged: list[str] = []
        for module in group:
            if joined[module] is not merged:
                merged.extend(m for m in joined[module] if m not in merged)
        for module in merged:
            joined[module] = merged

    for group in shared:
        present = [module for module in group if module in joined]
        if len(present) > 1:
            join(present)
    experts: dict[str, list[str]] = {}
    for module in modules:
        if (role := _role(module)) is not None:
            experts.setdefault(role, []).append(module)
    for group in (
        *experts.values(),
        *(g for tie in (engine.ties if engine else ()) for g in tie.groups(modules, shared)),
    ):
        join(group)
    order = {module: place for place, module in enumerate(modules)}
    distinct = {id(group): tuple(sorted(group, key=order.__getitem__)) for group in joined.values()}
    return sorted(distinct.values(), key=lambda group: order[group[0]])


def _role(module: str) -> str | None:
    """What all experts of a block that do the same have in common; None for what is no expert's."""
    role = re.sub(r"(\.experts)\.\d+\.", r"\1.", module)
    return role if role != module else None


def _unit(
    group: tuple[str, ...],
    stored: Mapping[str, tuple[str, StoredTensor]],
    schemes: tuple[Scheme, ...],
    modules: Sequence[str],
) -> Choice:
    lasts = list(dict.fromkeys(module.rpartition(".")[2] for module in group))
    parents = {re.sub(r"(\.experts)\.\d+$", r"\1.*", module.rpartition(".")[0]) for module in group}
    if len(parents) == 1:
        parent = parents.pop()
        name = f"{parent}.{'+'.join(lasts)}" if parent else "+".join(lasts)
        pattern = f"{parent}.{_either(lasts)}" if parent else _either(lasts)
    else:
        name, pattern = f"{group[0]}+{len(group) - 1}", _either(list(group))
    rule = Rule(pattern, None)
    if {module for module in modules if rule.matches(module)} != set(group):
        pattern = _either(list(group))
    tensors = tuple(stored[module][0] for module in group)
    return Choice(name, pattern, tensors, tuple(stored[module][1] for module in group), schemes)


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def _legal_of(
    groups: Sequence[Sequence[StoredTensor]], engine: Engine | None, way: Reads | None
) -> list[tuple[Scheme, ...]]:
    """`_legal` of each group; groups of the same shapes and roles are asked about once."""
    known: dict[tuple[object, ...], tuple[Scheme, ...]] = {}
    legal = []
    for group in groups:
        last = {one.module.rpartition(".")[2] for one in group}
        key = (*sorted({(one.shape, one.role, one.transposed, one.bias) for one in group}), *sorted(last))
        if key not in known:
            known[key] = _legal(group, engine, way)
        legal.append(known[key])
    return legal


def _legal(group: Sequence[StoredTensor], engine: Engine | None, way: Reads | None) -> tuple[Scheme, ...]:
    """Schemes that all tensors of a unit may have, fewest bits first."""
    if engine is None or way is None:
        fitting = {scheme.name: scheme for name in LADDER if (scheme := _fitted(parse(name), group)) is not None}
        return tuple(sorted(fitting.values(), key=lambda scheme: sum(scheme.stored_bits(one.shape) for one in group)))
    shapes = {(one.shape, one.role): one for one in group}.values()
    legal = [
        scheme
        for scheme in map(parse, _pool(engine))
        if scheme.activations is None and not scheme.is_ternary and scheme.bits > 1 and _tiles(scheme, group)
        and all(_at_home(engine, way, dataclasses.replace(one, scheme=scheme)) for one in shapes)
    ]  # fmt: skip
    return _thinned(legal)


def _fitted(scheme: Scheme, group: Sequence[StoredTensor]) -> Scheme | None:
    """The scheme, or what is nearest to it that tiles all tensors; None where nothing does."""
    for one in group:
        if not _tiles(scheme, [one]):
            near = nearest(scheme, one.shape)
            return near if near is not None and _tiles(near, group) else None
    return scheme


def _pool(engine: Engine) -> list[str]:
    """Names of schemes that an engine is asked about; those that are taken of equal bits come first."""
    usual = [name for name in (*engine.usual, *LADDER) if parse(name).activations is None]
    return list(dict.fromkeys((*usual, *_SYMMETRIC, *_AFFINE, *plugins.names("numerics.schemes"))))


def _at_home(engine: Engine, way: Reads, stored: StoredTensor) -> bool:
    """Whether an engine computes a tensor exactly, and does not say its numbers in more bits."""
    if exactness.obstacle(engine, way, stored) is not None:
        return False
    own, numbers = stored.scheme.stored_bits(stored.shape), math.prod(stored.shape)
    if way.format == "gguf":
        types = blocks.types_for(stored.scheme, stored.shape)
        return bool(types) and 8 * types[0].nbytes / types[0].block <= own / numbers
    held = exactness.held(engine, way, {stored.module: stored})[stored.module].stored
    return held.scheme.stored_bits(held.shape) <= own


def _thinned(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """At most `_MOST` of these, spread over their bits, both ends among them; of equal bits the first."""
    by_bits = {scheme.stored_bits(_NOMINAL): scheme for scheme in reversed(schemes)}
    kept = [by_bits[bits] for bits in sorted(by_bits)]
    if len(kept) <= _MOST:
        return tuple(kept)
    places = sorted({round(i * (len(kept) - 1) / (_MOST - 1)) for i in range(_MOST)})
    return tuple(kept[place] for place in places)


def _tiles(scheme: Scheme, group: Sequence[StoredTensor]) -> bool:
    try:
        for one in group:
            scheme.check_shape(one.module, one.shape)
    except ShapeError:
        return False
    return True


def _nbytes(units: Sequence[Choice]) -> dict[str, dict[str, int]]:
    """Bytes by unit and scheme, in the layout of the first format that holds all of them in all their schemes."""
    pairs = [(one, scheme) for unit in units for scheme in unit.schemes for one in unit.stored]
    layout = layouts.choose({dataclasses.replace(one, scheme=scheme).matrix for one, scheme in pairs})

    def taken(one: StoredTensor, scheme: Scheme) -> int:
        matrix = dataclasses.replace(one, scheme=scheme).matrix
        return layouts.nbytes(layout(scheme, matrix.shape, matrix.source))

    return {
        unit.name: {scheme.name: sum(taken(one, scheme) for one in unit.stored) for scheme in unit.schemes}
        for unit in units
    }


def _listed(modules: Sequence[str]) -> str:
    patterns = list(dict.fromkeys(pattern_of(module) for module in modules))
    return ", ".join(patterns[:8]) + (f" and {len(patterns) - 8} more" if len(patterns) > 8 else "")
