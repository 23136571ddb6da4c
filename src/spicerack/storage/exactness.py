"""What an engine computes exactly of a model: the rules of `storage.engine`, applied to its layers.

holder     an engine with files of one kind, as `holding` asks
obstacles  layer, rule, source and nearest scheme, of what is not computed exactly
nearest    the scheme that a layer could have
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spicerack.errors import ShapeError
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage import format as formats
from spicerack.storage import holding
from spicerack.storage.engine import Engine, Obstacle, Reads, Tie
from spicerack.storage.format import Contents, StoredTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.holding import Held, Holder


def holder(engine: Engine, way: Reads) -> Holder:
    """The engine with files of one kind, as `holding` asks."""
    return _Way(engine, way)


def held(engine: Engine, way: Reads, contents: Contents) -> dict[str, Held]:
    """Module -> in which scheme the engine computes it, see `holding.hold`."""
    return holding.hold(holder(engine, way), contents)


def obstacle(engine: Engine, way: Reads, stored: StoredTensor) -> str | None:
    """Why a layer, whatever the others are, is not computed exactly; None if it is."""
    try:
        stored.scheme.check_shape(stored.module, stored.shape)
    except ShapeError as error:
        rule = next(iter(holder(engine, way).obstacles({stored.module: stored})), error.message)
        return rule.partition(": ")[2]
    one = held(engine, way, {stored.module: stored})[stored.module]
    return None if one.exact else str(one.rule).partition(": ")[2]


def obstacles(engine: Engine, way: Reads, contents: Contents, shared: Sequence[Sequence[str]] = ()) -> list[Obstacle]:
    """Why files of one kind with these contents are not computed exactly; empty if they are.

    contents: as they were chosen. shared: modules that read the same input. What is about single layers comes
    first; where there is none of that, what is tied, and what files have one scheme for.
    """
    each = held(engine, way, contents)
    reasons = [
        Obstacle(module, str(one.rule), nearest(engine, way, contents[module]), _source(engine, way, contents[module]))
        for module, one in each.items()
        if not one.exact
    ]
    if reasons:
        return reasons
    together = holder(engine, way).prepared({module: one.stored for module, one in each.items()})
    sentences = holder(engine, way).obstacles(together)
    common = [Obstacle(line.partition(":")[0], line, None, f"the format {way.to}") for line in sentences]
    return [*_tied(engine, together, shared), *common]


def nearest(engine: Engine, way: Reads, stored: StoredTensor) -> Scheme | None:
    """The scheme that a layer could have: its own if that is computed, the engine's own fallback where its rows are
    no whole blocks, else what is nearest; None where it stays float whatever the scheme is."""
    if obstacle(engine, way, stored) is None:
        return stored.scheme
    if (usual := engine.fallback(stored.scheme)) is not None:
        fallback = replace(stored, scheme=parse(usual))
        if fits(fallback) and not holder(engine, way).obstacles({stored.module: fallback}):
            return fallback.scheme
    return holding.nearest(holder(engine, way), stored)


def _source(engine: Engine, way: Reads, stored: StoredTensor) -> str:
    """Where the rule against a tensor is written: the format's own, or a limit's."""
    prepared = _Way(engine, way).prepared({stored.module: stored})[stored.module]
    speaking = (limit.source for limit in way.limits if limit.obstacle(prepared) is not None)
    return next(speaking, f"the format {way.to}")


def _tied(engine: Engine, contents: Contents, shared: Sequence[Sequence[str]]) -> list[Obstacle]:
    """Layers that need one scheme and have several, or stay float in part."""
    modules = list(dict.fromkeys([*contents, *(module for group in shared for module in group)]))
    groups = [(tie, group) for tie in engine.ties for group in tie.groups(modules, shared)]
    return [reason for tie, group in groups for reason in _mixed(engine, tie, group, contents)]


def _mixed(engine: Engine, tie: Tie, group: Sequence[str], contents: Contents) -> list[Obstacle]:
    """The layers of one group that are not as that of the most bits is."""
    schemes = [contents[module].scheme for module in group if module in contents]
    if not schemes or (len(set(schemes)) == 1 and len(schemes) == len(group)):
        return []
    most = max(schemes, key=lambda scheme: scheme.bits, default=None)
    kinds = sorted({scheme.name for scheme in schemes} | ({"float"} if len(schemes) < len(group) else set()))
    rule = f"{engine.name} makes one matrix of {_last(group)}, which are {' and '.join(kinds)}"
    others = [module for module in group if module not in contents or contents[module].scheme != most]
    return [Obstacle(module, f"{module}: {rule}", most, tie.source) for module in others]


def fits(stored: StoredTensor) -> bool:
    """Whether whole groups of its scheme tile a tensor."""
    try:
        stored.scheme.check_shape(stored.module, stored.shape)
    except ShapeError:
        return False
    return True


def _last(modules: Sequence[str]) -> str:
    """What modules are called in their layer."""
    return ", ".join(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules))


@dataclass(frozen=True, slots=True)
class _Types:
    """The types of GGUF, as a `Holder`: a tensor lies in the smallest that has its numbers."""

    def prepared(self, contents: Contents, /) -> Contents:
        """As they are."""
        return contents

    def obstacles(self, contents: Contents, /) -> list[str]:
        """What no type holds."""
        reasons = ((module, blocks.no_type(stored.scheme, stored.shape)) for module, stored in contents.items())
        return [f"{module}: {reason}" for module, reason in reasons if reason is not None]


@dataclass(frozen=True, slots=True)
class _Nothing:
    """Files that nobody here writes: limits are all that is known."""

    def prepared(self, contents: Contents, /) -> Contents:
        """As they are."""
        return contents

    def obstacles(self, _contents: Contents, /) -> list[str]:
        """None."""
        return []


@dataclass(frozen=True, slots=True)
class _Way:
    """An engine with files of one kind, as a `Holder`."""

    engine: Engine
    way: Reads

    @property
    def _files(self) -> formats.Format | _Types | _Nothing:
        if not self.way.written:
            return _Nothing()
        return _Types() if self.way.format == "gguf" else formats.get(self.way.format)

    def prepared(self, contents: Contents, /) -> Contents:
        """As the files have them."""
        return self._files.prepared(contents)

    def obstacles(self, contents: Contents, /) -> list[str]:
        """What files do not hold, and what the engine does not compute of them."""
        limited = []
        for module, stored in contents.items():
            reasons = (limit.obstacle(stored) for limit in self.way.limits)
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is not None:
                limited.append(f"{module}: {self.engine.name} computes no {reason}")
        return self._files.obstacles(contents) + limited
