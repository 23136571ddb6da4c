"""The plan: every precision of an engine on a set of devices, what is recommended, and what would make the rest fit.

Recommended is the precision that loses least of those that fit whole on the devices; of equal losses the smaller, and
losses below the noise of bfloat16 are equal. Where
none fits, changes are tried in the order of what they cost the person, each planned anew, and those that work are
named: a cache in fewer bits, a shorter context, another engine, more memory beside the cards, more cards.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spicerack.errors import UsageError
from spicerack.machine.catalogue import GIB, Device
from spicerack.planning import engine as engines
from spicerack.planning import gguf, speed
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.placement import ALONE, Host, place
from spicerack.planning.places import Placement
from spicerack.planning.precisions import Precision, Weighed, weighed
from spicerack.planning.speed import Speed, kind_of
from spicerack.storage import engine as stored_engines

DEFAULT_CONTEXT = 8192
"""Tokens that are planned for where nobody says how many, or the model's positions if those are fewer."""
_STEP = 256
"""Contexts are named in multiples of it."""
_HIGHER = 0.95
"""Share of a card that vLLM can be given where .92 is too little, without a screen on it."""
NOISE = 0.0003
"""KL in nats below which a loss is that of computing in bfloat16 (.00018 on the same model, w8 .00027): of what loses
no more than this the smallest is recommended."""
LOSSES = ((2.5, 1.059), (3.59, 0.1296), (4.62, 0.0311), (5.66, 0.0061), (6.69, 0.0014), (8.5, 0.0001))
"""Bits of a weight -> KL in nats of plain rounding, measured on stdlib-lm (4.5 M parameters; w2g32h, w3g32z ... w8g32):
a large model loses less, and calibration saves most of it. Between them its logarithm is linear in the bits."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a model shall run, and with what.

    devices   in the order that layers follow
    engine    that runs it
    request   context, users, cache
    host      memory and disk beside cards
    measured  the device is this machine, whose bandwidth was measured
    """

    devices: tuple[Device, ...]
    engine: Engine
    request: Request
    host: Host = ALONE
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One precision.

    precision   the numbers
    weights     bytes, by who holds them
    bits        of a weight of a layer, scales counted
    loss        what was measured of it (`Precision.lost`); else KL in nats, typical (`LOSSES`), 0 of floats
    placement   what lies where
    speed       tokens a second; None where none can be said, and `speechless` says why
    """

    precision: Precision
    weights: Weighed
    bits: float
    loss: float
    placement: Placement
    speed: Speed | None
    speechless: str | None


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change that makes it fit, planned anew.

    change   in words, as the end of "it fits with"
    row      what then fits
    goal     with the change
    """

    change: str
    row: Row
    goal: Goal


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a model on a goal.

    rows         precisions, those of the best quality first
    recommended  the row that is; None where none fits
    longest      tokens that the recommended one fits with, at most; None without one, or where any number does
    remedies     changes that make it fit, the smallest first; none where something is recommended
    flags        lines to paste for what is recommended, or for the first remedy
    """

    model: Model
    goal: Goal
    rows: tuple[Row, ...]
    recommended: Row | None
    longest: int | None
    remedies: tuple[Remedy, ...]
    flags: tuple[str, ...]


def context_of(model: Model, asked: int | None) -> int:
    """Tokens to plan for. asked: by the person; None takes `DEFAULT_CONTEXT`, or what the model has.

    Of pictures it is what they become. Raises UsageError for more than the model's positions, which config.json says.
    """
    positions = model.positions
    if (picture := model.picture) is not None:
        if asked not in (None, picture.tokens):
            raise UsageError(
                f"a picture of {picture.height} x {picture.width} is {picture.tokens:,} tokens, not {asked:,}",
                "leave --context out; --users says how many pictures at once",
            )
        return picture.tokens
    if asked is None:
        return min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    if positions is not None and asked > positions:
        raise UsageError(
            f"a context of {asked:,} tokens is beyond the model's {positions:,} positions",
            f"--context {positions}, or a config.json whose positions are scaled further",
        )
    return asked


def default_engine(model: Model, devices: Sequence[Device], among: Sequence[Engine] = ()) -> Engine:
    """Ours for processors, llama.cpp for everything else: it runs on most. Where that does not run the model, the first
    that does. among: the engines there are; () stands for all."""
    kinds = [kind_of(device) for device in devices]
    name = "spicerack" if all(kind == "cpu" for kind in kinds) else "llama.cpp"
    known = among or engines.all_engines()
    able = [engine for engine in known if engine.obstacle(model, devices, kinds) is None] or known
    return next((engine for engine in able if engine.name == name), able[0])


def check(model: Model, goal: Goal, among: Sequence[Engine] = ()) -> None:
    """Raise UsageError where the engine cannot run the model there, or has no such cache, with those that can."""
    kinds = [kind_of(device) for device in goal.devices]
    reason = goal.engine.obstacle(model, goal.devices, kinds)
    if reason is not None:
        able = [other for other in among or engines.all_engines() if other.obstacle(model, goal.devices, kinds) is None]
        others = [other.name for other in able]
        nobody = "spicerack export writes it for other engines" if among else "no engine that is known does"
        raise UsageError(reason, f"--engine {' or '.join(others)}" if others else nobody)
    most = goal.engine.most_users
    if most is not None and goal.request.users > most:
        raise UsageError(f"{goal.engine.name} has room for {most} sequences at once", f"--users {most}")
    widths = goal.engine.cache_bytes
    if goal.request.cache_bits not in widths:
        raise UsageError(
            f"{goal.engine.name} has no cache of {goal.request.cache_bits} bits",
            f"--cache {' or '.join(map(str, widths))}",
        )


def plan(model: Model, goal: Goal, *, scheme: str | None = None, among: Sequence[Engine] = ()) -> Plan:
    """Rows, the recommendation, and what would help where nothing fits.

    scheme: the only precision to plan, by its name or that of our scheme; None plans all of the engine. among: engines
    that the model may go to; () stands for all. Raises UsageError as `check` does, and for a scheme that the engine
    does not have.
    """
    check(model, goal, among)
    rows = tuple(row_of(model, precision, goal) for precision in _precisions(model, goal.engine, scheme))
    recommended = _recommended(rows)
    if recommended is not None:
        longest = longest_context(model, recommended.precision, goal)
        flags = goal.engine.flags(model, recommended.precision, goal.request, recommended.placement)
        return Plan(model, goal, rows, recommended, longest, (), tuple(flags))
    smallest = min(rows, key=lambda row: row.weights.total)
    remedies = tuple(_remedies(model, smallest, goal, among))
    flags = []
    if remedies:
        first = remedies[0]
        flags = first.goal.engine.flags(model, first.row.precision, first.goal.request, first.row.placement)
    return Plan(model, goal, rows, None, None, remedies, tuple(flags))


def to_quantize(model: Model, goal: Goal) -> Row:
    """The row that `quantize --fit` makes: of those in a scheme of ours, the one that loses least of what fits.

    Raises UsageError as `check` does, where the engine reads no scheme of ours, and where none fits, with the smallest
    change that helps.
    """
    check(model, goal)
    rows = [row_of(model, precision, goal) for precision in goal.engine.precisions(model) if precision.scheme]
    if not rows:
        raise UsageError(
            f"{goal.engine.name} computes with no numbers that quantize writes",
            "its own tools make them: spicerack plan says which",
        )
    recommended = _recommended(rows)
    if recommended is not None:
        return recommended
    smallest = min(rows, key=lambda row: row.weights.total)
    remedy = next(_remedies(model, smallest, goal), None)
    raise UsageError(
        f"nothing fits: {smallest.precision.name} has the fewest bytes, and lacks {-smallest.placement.spare:,} bytes",
        f"it fits with {remedy.change}" if remedy else "spicerack plan shows what each would take",
    )


def written_for(model: Model) -> tuple[Engine, ...]:
    """The engines that compute with numbers that `quantize` writes, in files that something here makes of them."""
    able = []
    for engine in engines.all_engines():
        known = [stored_engines.find(engine.name)] if engine.name in stored_engines.names() else []
        ways = [way for one in known for way in one.reads if way.written]
        reads = any(way.family_obstacle(engine.name, model.config.get("model_type")) is None for way in ways)
        if any(precision.scheme for precision in engine.precisions(model)) and (reads or not known):
            able.append(engine)
    return tuple(able)


def tables_of(model: Model, precision: Precision) -> dict[str, str]:
    """Module -> our scheme, of the tables of tokens and the head, where a precision has them in few bits."""
    if precision.tables is None:
        return {}
    table, head = precision.tables
    found = {}
    for weight in model.weights:
        entry = weight.entry
        if entry.role == "head" or (entry.role == "embedding" and weight.place == "input" and model.tied):
            found[entry.module] = head
        elif entry.role == "embedding" and weight.place == "input" and not gguf.is_place(entry.module):
            found[entry.module] = table
    return found


def row_of(model: Model, precision: Precision, goal: Goal) -> Row:
    """One precision on the goal."""
    weights = weighed(model, precision)
    placement = place(model, precision, goal.engine, goal.request, goal.devices, goal.host)
    speechless = speed.obstacle(model, goal.engine, placement)
    estimated = None
    if speechless is None:
        estimated = speed.estimate(model, precision, goal.engine, goal.request, placement, measured=goal.measured)
    numbers = sum(weight.numel for weight in model.weights if weight.layer is not None)
    held = sum(block.total for block in weights.blocks)
    # of a model without layers that have numbers (ALBERT, CLIP) all of it
    bits = 8 * held / numbers if numbers else 8 * weights.file / max(model.parameters, 1)
    return Row(precision, weights, bits, loss_of(precision, bits), placement, estimated, speechless)


def loss_of(precision: Precision, bits: float) -> float:
    """What was measured of it; else KL in nats of plain rounding to so many bits of a weight, scales counted, on our
    small model; 0 of floats."""
    if precision.lost is not None:
        return precision.lost.mean
    if precision.bits >= 16 or precision.released:
        return 0.0
    points = LOSSES
    for (low, worse), (high, better) in itertools.pairwise(points):
        if bits <= high or (high, better) == points[-1]:
            part = (bits - low) / (high - low)
            return math.exp(math.log(worse) + part * (math.log(better) - math.log(worse)))
    raise AssertionError("the last pair takes everything")


def _precisions(model: Model, engine: Engine, scheme: str | None) -> list[Precision]:
    """Those of the engine, or the one that was asked for."""
    known = engine.precisions(model)
    if scheme is None:
        return known
    chosen = [p for p in known if scheme.lower() in (p.name.lower(), p.scheme and p.scheme.lower())]
    if not chosen:
        raise UsageError(
            f"{engine.name} does not run {scheme!r} here",
            f"one of {', '.join(p.name for p in known)}",
        )
    return chosen[:1]


def _recommended(rows: Sequence[Row]) -> Row | None:
    """What loses least of what fits without the processor's help; else of what fits with it."""
    fitting = [row for row in rows if row.placement.fits]
    whole = [row for row in fitting if row.placement.host is None or not row.placement.host.read]
    chosen = whole or fitting
    return min(chosen, key=lambda row: (max(row.loss, NOISE), row.weights.total), default=None)


def longest_context(model: Model, precision: Precision, goal: Goal) -> int | None:
    """Tokens that still fit, in steps of 256, up to the model's positions, and what was asked for at least, if that
    fits; None where more tokens cost nothing, and for pictures."""
    if model.recurrent or model.picture:
        return None
    most = (model.positions or 1 << 20) // _STEP
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(model, precision, goal, middle * _STEP):
            low = middle
        else:
            high = middle
    if low == most:
        return model.positions or low * _STEP
    asked = goal.request.context
    return asked if asked > low * _STEP and _fits(model, precision, goal, asked) else low * _STEP


def _fits(model: Model, precision: Precision, goal: Goal, context: int) -> bool:
    request = dataclasses.replace(goal.request, context=context)
    return place(model, precision, goal.engine, request, goal.devices, goal.host).fits


def _remedies(model: Model, smallest: Row, goal: Goal, among: Sequence[Engine] = ()) -> Iterator[Remedy]:
    """Changes that make it fit, each tried. smallest: the row that has the fewest bytes."""
    yield from _smaller_cache(model, smallest, goal)
    longest = longest_context(model, smallest.precision, goal)
    if longest:
        changed = _with(goal, context=longest)
        yield Remedy(f"a context of {longest:,} tokens", row_of(model, smallest.precision, changed), changed)
    if goal.engine.name == "vllm":
        changed = _with(goal, utilization=_HIGHER)
        row = row_of(model, smallest.precision, changed)
        if row.placement.fits:
            yield Remedy(f"--gpu-memory-utilization {_HIGHER:g}", row, changed)
    yield from _other_engines(model, goal, among)
    if goal.engine.offload and goal.host == ALONE and all(device.kind == "gpu" for device in goal.devices):
        beside = place(model, smallest.precision, goal.engine, goal.request, goal.devices, Host(ram=1 << 44))
        if beside.host is not None and beside.fits:
            needed = math.ceil(beside.host.total / GIB)
            changed = dataclasses.replace(goal, host=Host(ram=needed * GIB))
            yield Remedy(f"{needed} GiB of RAM beside the cards", row_of(model, smallest.precision, changed), changed)
    yield from _more_devices(model, smallest, goal)


def _smaller_cache(model: Model, smallest: Row, goal: Goal) -> Iterator[Remedy]:
    """The widest cache below the one that was asked for that makes it fit."""
    for bits in sorted((b for b in goal.engine.cache_bytes if b < goal.request.cache_bits), reverse=True):
        changed = _with(goal, cache_bits=bits)
        row = row_of(model, smallest.precision, changed)
        if row.placement.fits:
            yield Remedy(f"a cache of {bits} bits", row, changed)
            return


def _other_engines(model: Model, goal: Goal, among: Sequence[Engine]) -> Iterator[Remedy]:
    """The best precision of each engine that takes the model as it was asked for."""
    kinds = [kind_of(device) for device in goal.devices]
    for other in among or engines.all_engines():
        able = other.obstacle(model, goal.devices, kinds) is None and goal.request.cache_bits in other.cache_bytes
        crowded = other.most_users is not None and goal.request.users > other.most_users
        if other.name == goal.engine.name or not able or crowded:
            continue
        changed = dataclasses.replace(goal, engine=other, request=dataclasses.replace(goal.request, utilization=None))
        row = _recommended([row_of(model, precision, changed) for precision in other.precisions(model)])
        if row is not None:
            yield Remedy(f"--engine {other.name} ({row.precision.name})", row, changed)


def _more_devices(model: Model, smallest: Row, goal: Goal) -> Iterator[Remedy]:
    """The fewest of the first device that do it, where an engine splits at all."""
    if goal.engine.split == "none" or goal.devices[0].kind not in ("gpu", "memory"):
        return
    first = goal.devices[0]
    for count in range(len(goal.devices) + 1, 17):
        changed = dataclasses.replace(goal, devices=(*goal.devices, *[first] * (count - len(goal.devices))))
        row = row_of(model, smallest.precision, changed)
        if row.placement.fits:
            yield Remedy(f"{count} devices, {count - len(goal.devices)} more of {first.name}", row, changed)
            return


def _with(goal: Goal, **changes: Any) -> Goal:
    """The goal with another request."""
    return dataclasses.replace(goal, request=dataclasses.replace(goal.request, **changes))
