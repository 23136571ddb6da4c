"""Which scheme each tensor of a folder gets: what the recipe says, unless the tensor or the architecture forbids it.

What a tensor is was told twice, by its name (census) and by the class of the module that transformers would put there
(architecture). Only where both agree is it quantized; for all others there is a reason, which the ledger keeps.

What is given up: a layer that only one of the two calls linear stays in float, and is larger than it would have to be.
Quantizing a tensor that something else reads would be wrong, and nobody might notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spicerack.errors import SchemeError
from spicerack.models import blocks, census
from spicerack.models.architecture import destinations, modules_of, on_meta, transposed_stacks
from spicerack.models.census import Census, Entry
from spicerack.nn import kinds
from spicerack.numerics.dtypes import SOURCE_BY_NAME
from spicerack.quantization import recipe
from spicerack.quantization.recipe import Decision, Recipe
from spicerack.storage.reader import Checkpoint

OUTSIDE = "an expert, or outside of the blocks that are calibrated: a scale per token, none that is static"
"""Why a layer has no static scale: nothing is observed there."""
_CLASSES = {kind.name: kind.float_class.__name__ for kind in kinds.KINDS} | {
    "head": "Linear", "router": "Linear", "experts": "experts",
}  # fmt: skip
"""Role of a tensor -> the class of the module that must read it, as `architecture.modules_of` tells it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A float folder and all that is known of it from its headers.

    checkpoint   the folder, open
    census       what each tensor is, by its name
    modules      checkpoint name without `.weight` -> kind of module, as transformers would build it; None where it does
                 not know the architecture, so that names are all there is to go by
    """

    checkpoint: Checkpoint
    census: Census
    modules: Mapping[str, str] | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        """What is known of a folder that is open."""
        transposed = transposed_stacks(checkpoint.config, checkpoint.tensors)
        taken = census.take(checkpoint, transposed)
        return cls(checkpoint, taken, modules_of(checkpoint.config, checkpoint.tensors))

    @property
    def tied(self) -> dict[str, str]:
        """alias -> owner, as modules."""
        return {module_of(alias): module_of(owner) for alias, owner in self.census.tied.items()}

    def linears(self) -> list[str]:
        """Modules that are nn.Linear, tied heads that are not in the files among them."""
        if self.modules is None:
            named = [entry.module for entry in self.census.entries.values() if _CLASSES.get(entry.role) == "Linear"]
        else:
            named = [module for module, kind in self.modules.items() if kind == "Linear"]
        return named + [alias for alias in self.tied if alias not in named]

    def runs_packed(self, entry: Entry) -> bool:
        """Whether a tensor of all experts is multiplied by one expert at a time."""
        by_expert = self.modules is not None and self.modules.get(entry.module) == "experts"
        return by_expert and len(entry.info.shape) == 3


def decide(source: Source, asked: Recipe) -> dict[str, Decision]:
    """Tensor -> its scheme, None for what stays as it is, and why.

    Raises RecipeError (a rule that matches nothing), SchemeError (an embedding with int8 activations) and UsageError
    (static activations in a model without blocks to calibrate).
    """
    entries = source.census.entries
    decisions = recipe.resolve(asked, {entry.module: entry.role for entry in entries.values()}, source.tied)
    calibrated = _calibrated(source.checkpoint) if asked.is_static else frozenset()
    return {
        name: _dynamic(_permitted(source, entry, decisions[entry.module]), name in calibrated)
        for name, entry in entries.items()
    }


def notes(source: Source, decisions: Mapping[str, Decision]) -> Iterator[tuple[str, list[str]]]:
    """What a person should know of these before work starts: what it is, and which modules it is about, if any."""
    outside = [module_of(name) for name, decision in decisions.items() if decision.why.endswith(OUTSIDE)]
    if outside:
        yield OUTSIDE, outside
    if source.modules is None:
        yield "transformers does not know this architecture: what each tensor is was told from names alone", []
    entries = source.census.entries.values()
    whole = [entry for entry in entries if entry.role == "experts" and not source.runs_packed(entry)]
    if whole:
        share = sum(entry.info.nbytes for entry in whole) / source.census.nbytes
        stay = (
            f"{len(whole)} fused expert tensors ({share:.0%} of the model) stay in float: their code needs them whole"
        )
        yield stay, []


def module_of(tensor: str) -> str:
    """The name of the module whose weight a tensor is."""
    return tensor.removesuffix(".weight")


def _permitted(source: Source, entry: Entry, decision: Decision) -> Decision:
    """The recipe's decision, unless the tensor is of a type or in a module that cannot be quantized: then float, and
    why.

    Raises SchemeError for an embedding with int8 activations, which it has none of.
    """
    if entry.name in source.census.tied:
        return Decision(None, "tied")
    if decision.scheme is None:
        return decision
    if entry.info.dtype not in SOURCE_BY_NAME:
        return Decision(None, f"{entry.info.dtype} tensors are copied as they are")
    if entry.role == "experts" and not source.runs_packed(entry):
        return Decision(None, "the architecture's code needs its experts whole")
    wanted = _CLASSES[entry.role]
    kind = wanted if source.modules is None else source.modules.get(entry.module)
    if kind not in (wanted, "experts"):
        return Decision(None, f"the architecture has {kind or 'no module'} there, not {wanted}")
    if decision.scheme.activations is not None and entry.role == "embedding":
        raise SchemeError(f"{entry.module}: an embedding has no activations to quantize", "use the scheme without a8")
    return decision


def _dynamic(decision: Decision, calibrated: bool) -> Decision:
    """The decision with a scale per token in place of a static one, where calibration sees nothing."""
    if decision.scheme is None or decision.scheme.activations != "static" or calibrated:
        return decision
    return Decision(decision.scheme.dynamic, f"{decision.why}; {OUTSIDE}")


def _calibrated(source: Checkpoint) -> frozenset[str]:
    """The tensors of linear layers that lie in the model's blocks, as they are: what calibration sees the inputs of."""
    model = on_meta(source.config)
    if model is None:
        return frozenset()
    path, stack = blocks.repeated(model)
    inside = {f"{path}.{i}.{layer}.weight" for i, block in enumerate(stack) for layer in kinds.linear_layers(block)}
    places = destinations(model, source.tensors).items()
    return frozenset(name for name, place in places if place.parameter in inside and not place.operations)
