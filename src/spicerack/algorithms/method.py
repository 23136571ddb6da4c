"""How codes are chosen: a chain of transforms of the float model, then one solver. `awq+gptq`, `smoothquant`, `rtn`.

Transforms leave what the model computes as it is and make it easier to round; a chain without a solver ends in rounding
to nearest. What each can and needs is told by its own file in `transforms/` or `solvers/`; here are only their names,
and which of them is best for what, as it was measured. Importing this loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spicerack import plugins
from spicerack.errors import RecipeError
from spicerack.numerics.scheme import Scheme

NEAREST = "rtn"
"""The solver of a chain that names none."""


@dataclass(frozen=True, slots=True)
class Method:
    """A chain: the names of transforms, in the order in which they are applied, and of the solver behind them."""

    transforms: tuple[str, ...] = ()
    solver: str = NEAREST

    @property
    def needs_text(self) -> bool:
        """Whether a part of it looks at what flows through the model."""
        if self == Method():  # known without asking its file, which loads torch
            return False
        from spicerack.algorithms import solver, transform

        return bool(transform.scalings(self.transforms)) or solver.get(self.solver).needs != "nothing"

    @property
    def rotation(self) -> str | None:
        """The name of the transform that rotates the model's residual stream before all else; None if there is none."""
        return next(iter(_rotations(self.transforms)), None)

    def __str__(self) -> str:
        return "+".join((*self.transforms, self.solver))


def parse(text: str) -> Method:
    """The Method that `text` names, as in `awq+gptq`.

    Raises RecipeError, with all names that there are, for a name that is unknown, twice, or in the wrong place.
    """
    transforms, solvers = plugins.names("algorithms.transforms"), plugins.names("algorithms.solvers")
    *before, last = text.split("+")
    chain, solver = ((*before, last), NEAREST) if last in transforms else (tuple(before), last)
    known = f"transforms are {', '.join(transforms)}; solvers {', '.join(solvers)}"
    for name in chain:
        if name in solvers:
            raise RecipeError(f"method {text!r}: the solver {name} comes last, and only one", known)
        if name not in transforms:
            raise RecipeError(f"unknown method {name!r}", known)
    if solver not in solvers:
        raise RecipeError(f"unknown method {solver!r}", known)
    if late := _rotations(chain[1:]):
        raise RecipeError(f"method {text!r}: {late[0]} rotates the whole model, and comes first", known)
    if len(set(chain)) < len(chain):
        raise RecipeError(f"method {text!r} has a transform twice", known)
    return Method(chain, solver)


def _rotations(names: tuple[str, ...]) -> list[str]:
    """Those of the named transforms that rotate the whole model."""
    from spicerack.algorithms import transform  # here: it loads torch, which `parse` is quicker without

    return [name for name in names if isinstance(transform.get(name), transform.Rotation)] if names else []


Effort = Literal["normal", "high"]
"""What may be spent on codes where no method is named: what `gptq` takes, or what it takes to learn them."""

LEARNING = (10, 16)
"""Times that learning codes takes beside `gptq`, at least and at most, as measured (docs/quantization/quality.md)."""
_MANY = 8
"""Levels' steps from which on GPTQ's codes are as good as those that are learned, in a fifth of the time."""
_GAIN = "ten to sixteen times as long, for .65 to .96 of the KL that gptq leaves on the models measured"
_GAIN_OF_TERNARY = "ten to sixteen times as long, for .4 of the KL that gptq leaves on the model measured"
_TWO_BITS = 3
"""Levels' steps where `blockap` is nearer, unless one scale is the whole tensor's."""


def check_effort(effort: str) -> Effort:
    """`effort`, if it is one. Raises RecipeError."""
    if effort == "normal":
        return "normal"
    if effort == "high":
        return "high"
    raise RecipeError(f"unknown effort {effort!r}", "normal, or high")


def auto(scheme: Scheme, with_text: bool, effort: Effort = "normal") -> Method:
    """The best measured for the scheme with calibration text (docs/quantization/quality.md); without, to nearest.

    effort: "high" learns codes below four bits by each block's output, at ten times the cost of `gptq` or more.
    """
    if not with_text:
        return Method()
    return Method(("smoothquant",) if scheme.activations else (), (effort == "high" and _learner(scheme)) or "gptq")


def gain_of_effort(scheme: Scheme) -> str | None:
    """What `effort="high"` would gain for the scheme and what it would cost, for people who decide; None: nothing."""
    learner = _learner(scheme)
    if learner is None:
        return None
    gain = _GAIN_OF_TERNARY if scheme.is_ternary else _GAIN
    return f"--effort high learns the codes by what blocks give ({learner}): {gain}"


def _learner(scheme: Scheme) -> str | None:
    """The solver that learns codes of so few levels best; None where GPTQ's are as good, or none learns them."""
    integers = scheme.levels.integers
    steps = _MANY if integers is None else integers.hi - integers.lo
    if steps >= _MANY or scheme.scale_obstacle is not None:
        return None
    return "blockap" if steps == _TWO_BITS and scheme.group[0] is not None else "signround"
