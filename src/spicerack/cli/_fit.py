"""`spicerack quantize --fit DEVICES`: what `plan` recommends there, in place of a scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from spicerack.cli import _output
from spicerack.errors import UsageError

if TYPE_CHECKING:
    from spicerack.quantization.recipe import Rule


class Choices(Protocol):
    """What was typed that chooses schemes, of which one is given: the options of these names."""

    @property
    def scheme(self) -> str | None: ...
    @property
    def recipe_file(self) -> object: ...
    @property
    def fit(self) -> str | None: ...


class Typed(Choices, Protocol):
    """What was typed, as far as --fit goes by it: the options of these names."""

    @property
    def model(self) -> str: ...
    @property
    def context(self) -> int | None: ...
    @property
    def engine(self) -> str | None: ...
    @property
    def for_(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was chosen.

    scheme   of layers
    rules    that give tables and heads theirs, where the engine's files have those in few bits, too
    for_     the engine whose rules hold, None for ours; what was typed, if something was
    because  a sentence that says why
    devices  as they were typed
    nbytes   of weights that were planned with
    spare    bytes that the devices then have left
    """

    scheme: str
    rules: tuple[Rule, ...]
    for_: str | None
    because: str
    devices: str
    nbytes: int
    spare: int

    def check(self, nbytes: int) -> None:
        """Raise UsageError where the weights that will be written are more than the devices have room for.

        nbytes: of all of them. They are more than planned where the engine, or transformers, leaves layers in float.
        """
        more = nbytes - self.nbytes
        if more > self.spare:
            raise UsageError(
                f"layers that must stay in float take {more:,} bytes more than planned, and {self.devices} had "
                f"{self.spare:,} to spare",
                "--dry-run with --scheme and --for shows which these are; a larger device or another engine has room",
            )


def of(typed: Typed) -> Fitted | None:
    """What `plan` recommends for --fit, of what `quantize` writes; None without --fit.

    Raises UsageError for a scheme beside it, for its options without it, and where nothing fits.
    """
    if typed.fit is None:
        for name, value in (("context", typed.context), ("engine", typed.engine)):
            if value is not None:
                raise UsageError(f"--{name} is about --fit, and there is none", "pass --fit DEVICES, or --scheme")
        return None
    if typed.scheme is not None or typed.recipe_file is not None:
        raise UsageError("--fit chooses the scheme, and one is given", "leave out --scheme and --recipe, or --fit")
    from spicerack.machine import catalogue
    from spicerack.planning import engine as engines
    from spicerack.planning.engine import Request
    from spicerack.planning.model import open_model
    from spicerack.planning.plan import Goal, context_of, default_engine, tables_of, to_quantize, written_for
    from spicerack.quantization import recipe

    devices = catalogue.find(typed.fit)
    model = open_model(typed.model)
    engine = engines.get(typed.engine) if typed.engine else default_engine(model, devices, written_for(model))
    request = Request(context_of(model, typed.context))
    row = to_quantize(model, Goal(devices, engine, request))
    scheme, spare = row.precision.scheme, row.placement.spare
    assert scheme is not None, "that quantize makes"
    because = (
        f"{scheme} fits {typed.fit} with {engine.name} at {request.context:,} tokens, "
        f"{_output.size(spare)} to spare: spicerack plan shows the others"
    )
    rules = tuple(recipe.rule(f"{module}={name}") for module, name in tables_of(model, row.precision).items())
    for_ = typed.for_ or (None if engine.name == "spicerack" else engine.name)
    return Fitted(scheme, rules, for_, because, typed.fit, row.weights.total, spare)
