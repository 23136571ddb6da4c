"""How codes are chosen: a chain of transforms of the float model, then one solver. `awq+gptq`, `smoothquant`, `rtn`.

Transforms leave what the model computes as it is and make it easier to round; a chain without a solver ends in rtn.
"""

from __future__ import annotations

from dataclasses import dataclass

from spicerack.errors import RecipeError
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

TRANSFORMS = ("hadamard", "smoothquant", "awq")
SOLVERS = ("rtn", "hqq", "gptq", "signround", "blockap")
_DATA_FREE = ("hadamard", "rtn", "hqq")


@dataclass(frozen=True, slots=True)
class Method:
    """transforms: in the order in which they are applied."""

    transforms: tuple[str, ...] = ()
    solver: str = "rtn"

    @property
    def needs_text(self) -> bool:
        """Whether it looks at what flows through the model."""
        return not {*self.transforms, self.solver} <= set(_DATA_FREE)

    @property
    def rotates(self) -> bool:
        """Whether the residual stream is rotated, before all else."""
        return "hadamard" in self.transforms

    def __str__(self) -> str:
        return "+".join((*self.transforms, self.solver))


def parse(text: str) -> Method:
    """`awq+gptq` -> Method. Raises RecipeError."""
    *before, last = text.split("+")
    transforms, solver = ((*before, last), "rtn") if last in TRANSFORMS else (tuple(before), last)
    known = f"transforms are {', '.join(TRANSFORMS)}; solvers {', '.join(SOLVERS)}"
    for name in transforms:
        if name in SOLVERS:
            raise RecipeError(f"method {text!r}: the solver {name} comes last, and only one", known)
        if name not in TRANSFORMS:
            raise RecipeError(f"unknown method {name!r}", known)
    if solver not in SOLVERS:
        raise RecipeError(f"unknown method {solver!r}", known)
    if "hadamard" in transforms[1:]:
        raise RecipeError(f"method {text!r}: hadamard rotates the whole model, and comes first", known)
    if len(set(transforms)) < len(transforms):
        raise RecipeError(f"method {text!r} has a transform twice", known)
    return Method(transforms, solver)


_MANY = 8
"""Levels' steps from which on GPTQ's codes are as good as those that are learned, in a fifth of the time."""
_TWO_BITS = 3
"""Levels' steps where `blockap` is nearer, unless one scale is the whole tensor's."""


def auto(scheme: Scheme, with_text: bool) -> Method:
    """The best measured for the scheme (docs/quality.md); without text, round to nearest."""
    if not with_text:
        return Method()
    steps = scheme.levels.hi - scheme.levels.lo if isinstance(scheme.levels, IntLevels) else _MANY
    learned = "blockap" if steps == _TWO_BITS and scheme.block[0] is not None else "signround"
    return Method(("smoothquant",) if scheme.activations else (), learned if steps < _MANY else "gptq")
