"""Narrow layers: the scheme of the same kind that fits where a scheme's groups do not tile a layer.

It is offered as rules to paste, or taken where the recipe says so (`fit_groups`), and always told. Which one that is,
`models.narrow` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spicerack.errors import ShapeError, listed
from spicerack.models.narrow import nearest
from spicerack.models.overview import pattern_of
from spicerack.numerics.scheme import Scheme
from spicerack.quantization.recipe import Rule

_LISTED = 8
"""Kinds of layers that a message names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """A layer that no whole groups of its scheme tile.

    module   its name, as recipes have it
    problem  what does not tile, with the layer's name in front
    asked    the scheme
    nearest  of the same kind that fits; None if there is none
    """

    module: str
    problem: ShapeError
    asked: Scheme
    nearest: Scheme | None


def obstacle(module: str, scheme: Scheme, shape: tuple[int, ...]) -> Misfit | None:
    """Why a layer [..., N, K] cannot have `scheme`, with what it could have; None if it can."""
    try:
        scheme.check_shape(f"{module}.weight" if module else "weight", shape)
    except ShapeError as error:
        return Misfit(module, error, scheme, nearest(scheme, shape))
    return None


def rules(misfits: Iterable[Misfit], modules: Iterable[str]) -> list[Rule]:
    """Rules, in a recipe's words, that give each misfit what fits it and touch none of the other `modules`."""
    fitting: dict[Scheme, list[str]] = {}
    for misfit in misfits:
        if misfit.nearest is not None:
            fitting.setdefault(misfit.nearest, []).append(misfit.module)
    every = list(modules)
    return [Rule(pattern, scheme) for scheme, them in fitting.items() for pattern in patterns(them, every)]


def patterns(these: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Patterns, as few as there are parents, that match `these` and none of the other `modules`.

    The last component stays as it is: a pattern that ends in a bare star does not mean heads and tables.
    """
    wanted = list(these)
    others = set(modules) - set(wanted)
    lasts: dict[str, list[str]] = {}
    for module in wanted:
        parent, _, last = module.rpartition(".")
        wide = _joined(pattern_of(parent), last)
        parent = parent if any(map(Rule(wide, None).matches, others)) else pattern_of(parent)
        if last not in lasts.setdefault(parent, []):
            lasts[parent].append(last)
    return [
        _joined(parent, names[0] if len(names) == 1 else f"{{{','.join(names)}}}") for parent, names in lasts.items()
    ]


def _joined(parent: str, last: str) -> str:
    """A path, of a parent that may be none."""
    return f"{parent}.{last}" if parent else last


def told(misfits: Iterable[Misfit]) -> list[str]:
    """A line for each kind of layer: `5 x model.layers.*.mlp.down_proj: K=172 ...: w4 fits`."""
    kinds: dict[tuple[str, str, str], list[Misfit]] = {}
    for misfit in misfits:
        what = misfit.problem.message.partition(": ")[2]
        fits = f": {misfit.nearest} fits" if misfit.nearest else ""
        kinds.setdefault((pattern_of(misfit.module), what, fits), []).append(misfit)
    return [
        f"{len(them)} x {pattern}: {what}{fits}" if len(them) > 1 else f"{them[0].problem.message}{fits}"
        for (pattern, what, fits), them in kinds.items()
    ]


def check(chosen: Mapping[str, tuple[Scheme, tuple[int, ...]]], *, fit_groups: bool) -> dict[str, Misfit]:
    """The misfits among layers, by module, where they may have what fits.

    chosen: module -> its scheme and shape [..., N, K]. fit_groups: whether they may. Raises ShapeError for all of them
    at once, with rules to paste, where they may not, and for those that nothing fits.
    """
    found = (obstacle(module, scheme, shape) for module, (scheme, shape) in chosen.items())
    misfits = {misfit.module: misfit for misfit in found if misfit is not None}
    hopeless = [misfit for misfit in misfits.values() if misfit.nearest is None]
    if hopeless:
        raise error(hopeless, "skip them: --skip 'PATTERN'")
    if misfits and not fit_groups:
        sets = " ".join(f"--set '{rule}'" for rule in rules(misfits.values(), chosen))
        raise error(misfits.values(), f"add --fit-groups (fit_groups=True) or, which is the same, {sets}")
    return misfits


def error(misfits: Iterable[Misfit], hint: str) -> ShapeError:
    """What is raised for these: all of them at once, because one after the other a person would mend a recipe as many
    times as there are kinds of layers."""
    return ShapeError(listed(told(misfits), _LISTED, between="\n  "), hint)


def fitted(schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Scheme]:
    """Module -> the scheme that it gets where groups may be fitted, for those that cannot have theirs.

    schemes: what was asked for. shapes: of the matrices, [..., N, K].
    """
    misfits = (obstacle(module, scheme, shapes[module]) for module, scheme in schemes.items())
    return {m.module: m.nearest for m in misfits if m is not None and m.nearest is not None}
