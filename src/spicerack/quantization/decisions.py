"""Which scheme each tensor of a folder gets: what the recipe says, unless the tensor or the architecture forbids it.

What a tensor is was told twice, by its name (census) and by the class of the module that transformers would put there
(architecture). Only where both agree is it quantized; for all others there is a reason, which the ledger keeps.

What is given up: a layer that only one of the two calls linear stays in float, and is larger than it would have to be.
Quantizing a tensor that something else reads would be wrong, and nobody might notice. How much that is, is told
(`staying.py`), and a rule that asks for nothing but such tensors is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from spicerack.errors import RecipeError, SchemeError, UsageError, counted, listed
from spicerack.models import census
from spicerack.models.architecture import classes_of, destinations, on_meta, transposed_stacks
from spicerack.models.blocks.find import repeated
from spicerack.models.census import BY_DEFAULT, ON_REQUEST, Census, Entry
from spicerack.models.towers import language_model_of
from spicerack.nn import kinds
from spicerack.numerics.dtypes import SOURCE_BY_NAME
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import recipe, staying
from spicerack.quantization.recipe import Decision, Recipe
from spicerack.quantization.staying import Staying
from spicerack.storage.format import StoredTensor
from spicerack.storage.reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTSIDE = "an expert, or outside of the blocks that are calibrated: a scale per token, none that is static"
"""Why a layer has no static scale: nothing is observed there."""
_TOWER = "no text reaches it: it stays in float unless a rule names it"
"""Why a layer of a vision or audio tower is not quantized where the calibration text is all that is known of inputs."""
_LISTED = 4
"""Reasons that a message gives before it counts the rest."""
_CLASSES: dict[str, frozenset[str]] = {
    role: frozenset(
        name for kind in kinds.KINDS if kind.role == role and not kind.plain_only
        for name in (kind.float_class.__name__, *kind.subclasses)
    )
    for role in ("linear", "conv1d", "embedding")
}  # fmt: skip
_CLASSES |= {"head": _CLASSES["linear"], "router": _CLASSES["linear"], "experts": frozenset({"experts"})}
"""Role of a tensor -> classes of the module that must read it, as `architecture.modules_of` tells them."""
_EXPECTED = {
    "linear": "Linear", "head": "Linear", "router": "Linear", "conv1d": "Conv1D", "embedding": "Embedding",
    "experts": "experts",
}  # fmt: skip
"""Role of a tensor -> the module that is usual there, for people."""


@dataclass(frozen=True, slots=True)
class Source:
    """A float folder and all that is known of it from its headers.

    checkpoint   the folder, open
    census       what each tensor is, by its name
    model        as transformers would build it, on the meta device; None where it does not know the architecture
    modules      checkpoint name without `.weight` -> kind of module in `model`; None without one, so that names are all
                 there is to go by
    """

    checkpoint: Checkpoint
    census: Census
    model: PreTrainedModel | None
    modules: Mapping[str, str] | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        """What is known of a folder that is open."""
        model = on_meta(checkpoint.config)
        modules = None if model is None else classes_of(model, checkpoint.tensors)
        transposed = transposed_stacks(checkpoint.config, checkpoint.tensors)
        return cls(checkpoint, census.take(checkpoint, transposed), model, modules)

    @property
    def tied(self) -> dict[str, str]:
        """alias -> owner, as modules."""
        return {module_of(alias): module_of(owner) for alias, owner in self.census.tied.items()}

    def linears(self) -> list[str]:
        """Modules that are nn.Linear, tied heads that are not in the files among them."""
        if self.modules is None:
            entries = self.census.entries.values()
            named = [e.module for e in entries if "Linear" in _CLASSES.get(e.role, ())]
        else:
            named = [module for module, kind in self.modules.items() if kind == "Linear"]
        return named + [alias for alias in self.tied if alias not in named]

    def stored(self, name: str, scheme: Scheme) -> StoredTensor:
        """What the tensor `name` would be stored as in this scheme: module, shape with output rows first, source type,
        bias."""
        entry = self.census.entries[name]
        dtype, bias = SOURCE_BY_NAME[entry.info.dtype], f"{entry.module}.bias" in self.checkpoint.tensors
        return StoredTensor(entry.module, scheme, entry.matrix_shape, entry.role, dtype, entry.transposed, bias)

    def runs_packed(self, entry: Entry) -> bool:
        """Whether a tensor of all experts is multiplied by one expert at a time."""
        by_expert = self.modules is not None and self.modules.get(entry.module) == "experts"
        return by_expert and len(entry.info.shape) == 3


def decide(source: Source, asked: Recipe, *, with_text: bool = False) -> dict[str, Decision]:
    """Tensor -> its scheme, None for what stays as it is, and why.

    with_text: codes are chosen by what text makes flow through the model, and what it does not reach stays in float.

    Raises RecipeError (a rule that matches nothing, or only what cannot be quantized; a recipe that quantizes nothing),
    SchemeError (an embedding with int8 activations) and UsageError (static activations in a model without blocks to
    calibrate).
    """
    entries = source.census.entries
    decisions = recipe.resolve(asked, {entry.module: entry.role for entry in entries.values()}, source.tied)
    calibrated = _calibrated(source) if asked.is_static else frozenset()
    towers = _towers(source) if with_text else {}
    final: dict[str, Decision] = {}
    for name, entry in entries.items():
        decision = decisions[entry.module]
        if name in towers and decision.scheme is not None and not _is_named(decision, towers[name]):
            decision = decision.kept(_TOWER)
        final[name] = _dynamic(_permitted(source, entry, decision), name in calibrated)
    check(source, asked, final)
    return final


def check(source: Source, asked: Recipe, decisions: Mapping[str, Decision]) -> None:
    """Raise RecipeError for a rule that asks for what no tensor can have, and where nothing would be quantized."""
    recipe.refuse_vain(asked, _owned(source, decisions))
    if all(decision.scheme is None for decision in decisions.values()):
        raise _nothing(source, decisions)


def _owned(source: Source, decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Module -> what becomes of it, of tensors that are no other's alias."""
    entries, tied = source.census.entries, source.census.tied
    return {entries[name].module: decision for name, decision in decisions.items() if name not in tied}


def notes(source: Source, decisions: Mapping[str, Decision], asked: Recipe) -> Iterator[tuple[str, list[str]]]:
    """What a person should know of these before work starts: what it is, and which modules it is about, if any."""
    outside = [module_of(name) for name, decision in decisions.items() if decision.why.endswith(OUTSIDE)]
    if outside:
        yield OUTSIDE, outside
    yield from ((note, []) for note in recipe.partly_vain(asked, _owned(source, decisions)))
    if source.modules is None:
        yield "transformers does not know this architecture: what each tensor is was told from names alone", []
    if beside := _beside_blocks(source, decisions, asked):
        yield "outside of the blocks that text is run through: rounded to nearest", beside
    if towers := _untouched_towers(decisions):
        roots = sorted({root for name, root in _towers(source).items() if name in towers})
        paste = " ".join(f"--set '{root}.**=SCHEME'" for root in roots)
        layers = (
            f"{', '.join(roots)} ({counted(len(towers), 'layer')}) {'stays' if len(roots) == 1 else 'stay'} in float"
        )
        yield f"{layers}: no text reaches what is for pictures or sound; {paste} rounds it to nearest", []
    if (told := staying.told(*_staying(source, decisions))) is not None:
        yield told, []


def kept(source: Source) -> frozenset[str]:
    """Tensors that stay in float whatever is asked for, although by their names they would be quantized."""
    entries = source.census.entries.values()
    return frozenset(e.name for e in entries if e.role in BY_DEFAULT and _obstacle(source, e) is not None)


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
    if 0 in entry.info.shape:  # whatever a rule asks for, it has it
        return Decision(None, "it has no numbers: copied as it is", decision.rule)
    if (reason := _obstacle(source, entry)) is not None:
        return decision.kept(reason)
    if decision.scheme.activations is not None and entry.role == "embedding":
        raise SchemeError(f"{entry.module}: an embedding has no activations to quantize", "use the scheme without a8")
    return decision


def _obstacle(source: Source, entry: Entry) -> str | None:
    """Why a tensor stays in float whatever is asked for; None if nothing is in the way."""
    if entry.info.dtype not in SOURCE_BY_NAME:
        return f"{entry.info.dtype} weights are not quantized, only {', '.join(SOURCE_BY_NAME)}"
    if 0 in entry.info.shape:
        return "it has no numbers"
    kind = None if source.modules is None else source.modules.get(entry.module)
    if kind is not None and " via " in kind:
        return f"transformers changes it while loading, by {kind.partition(' via ')[2]}"
    if entry.role == "experts" and not source.runs_packed(entry):
        return "the architecture's code needs its experts whole"
    if source.modules is None or kind == "experts" or kind in _CLASSES[entry.role]:
        return None
    return f"the architecture has {kind or 'no module'} there, not {_EXPECTED[entry.role]}"


def _dynamic(decision: Decision, calibrated: bool) -> Decision:
    """The decision with a scale per token in place of a static one, where calibration sees nothing."""
    if decision.scheme is None or decision.scheme.activations != "static" or calibrated:
        return decision
    return Decision(decision.scheme.dynamic, f"{decision.why}; {OUTSIDE}", decision.rule)


def _calibrated(source: Source) -> frozenset[str]:
    """The tensors of linear layers that lie in the model's blocks, as they are: what calibration sees the inputs of."""
    if source.model is None:
        return frozenset()
    path, stack = repeated(source.model)
    inside = {f"{path}.{i}.{layer}.weight" for i, block in enumerate(stack) for layer in kinds.linear_layers(block)}
    places = destinations(source.model, source.checkpoint.tensors).items()
    return frozenset(name for name, place in places if place.parameter in inside and not place.operations)


def _beside_blocks(source: Source, decisions: Mapping[str, Decision], asked: Recipe) -> list[str]:
    """Modules that are quantized and lie in no block, where the method chooses codes by what flows through blocks."""
    if source.model is None or asked.method is None or not asked.method.needs_text:
        return []
    try:
        path, _ = repeated(source.model)
    except UsageError:  # which is refused where the text is known
        return []
    places = destinations(source.model, source.checkpoint.tensors)
    return [
        module_of(name)
        for name, decision in decisions.items()
        if decision.scheme is not None and name in places and not places[name].parameter.startswith(f"{path}.")
    ]


# ---- towers: what is for pictures and sound in a model that is calibrated with text ---------------------------------


def _towers(source: Source) -> dict[str, str]:
    """Tensor of a layer that no text reaches -> the module that it and all of its kind are in: `model.visual`."""
    if source.model is None:
        return {}
    text = language_model_of(source.model)
    if text is None:
        return {}
    entries = source.census.entries
    return {
        name: _root(entries[name].module, place.parameter, text)
        for name, place in destinations(source.model, source.checkpoint.tensors).items()
        if entries[name].role in BY_DEFAULT and not place.parameter.startswith(f"{text}.")
    }


def _root(module: str, parameter: str, text: str) -> str:
    """What a tower is called in checkpoints: the beginning of a module's name, up to where its parameter in the model
    parts from the path of the language model."""
    parts = parameter.split(".")
    common = next(i for i, (a, b) in enumerate(zip_longest(parts, text.split("."))) if a != b)
    names = module.split(".")
    return ".".join(names[: names.index(parts[common]) + 1]) if parts[common] in names else names[0]


def _is_named(decision: Decision, root: str) -> bool:
    """Whether a rule decided that means this tower: it has the tower's name in its pattern."""
    return decision.rule is not None and root.rsplit(".", 1)[-1] in decision.rule.pattern.split(".")


def _untouched_towers(decisions: Mapping[str, Decision]) -> list[str]:
    """Tensors that stay in float because no text reaches them."""
    return [name for name, decision in decisions.items() if decision.why == _TOWER]


# ---- what stays in float --------------------------------------------------------------------------------------------


def _staying(source: Source, decisions: Mapping[str, Decision]) -> tuple[list[Staying], int]:
    """Matrices that stay in float although nobody asked for it, each with the reason; and the numbers in all matrices.

    Embeddings, heads and routers are none of them: that they stay is documented, and asked for by a rule otherwise.
    """
    left: list[Staying] = []
    total = 0
    for name, entry in source.census.entries.items():
        decision = decisions[name]
        if name in source.census.tied or not _counts(source, entry):
            continue
        total += entry.info.numel
        asked = decision.rule is not None and decision.rule.scheme is None
        if decision.scheme is None and not asked and decision.why != _TOWER:
            left.append(Staying(entry.module, entry.info.numel, _reason(source, entry, decision)))
    return left, total


def _counts(source: Source, entry: Entry) -> bool:
    """Whether a tensor is a matrix of the sort that this is about: multiplied with, not looked up in, read at all."""
    if len(entry.info.shape) < 2 or entry.role in (*ON_REQUEST, "norm", "bias"):
        return False
    if source.modules is None:
        return entry.role in BY_DEFAULT
    kind = source.modules.get(entry.module)  # None: nobody reads it, which is told elsewhere
    return (
        kind is not None
        and "Embedding" not in kind
        and (entry.role in BY_DEFAULT or not staying.is_table(entry.module))
    )


def _reason(source: Source, entry: Entry, decision: Decision) -> str:
    """Why a matrix stays in float: what was decided, or for what no scheme applies to, what it is."""
    if entry.role in BY_DEFAULT:
        return decision.why
    kind = "" if source.modules is None else source.modules.get(entry.module, "")
    if entry.role == "conv":
        return "convolutions of transformers models stay in float"
    if "." in kind:
        return f"a parameter of {kind.partition('.')[0]}, which is no layer that can be packed"
    return f"by its name and shape it may be no linear layer (the architecture has {kind} there)"


def _nothing(source: Source, decisions: Mapping[str, Decision]) -> RecipeError:
    """What is raised where a recipe quantizes nothing: what there is, and why it stays."""
    left, total = _staying(source, decisions)
    if not left and total:
        return RecipeError(
            f"nothing in {source.checkpoint.folder} would be quantized: the rules leave every layer in float",
            "leave out a --skip, or copy the folder",
        )
    reasons = listed(staying.reasons(left), _LISTED, between="\n  ") or "it has no linear layers"
    hint = "embeddings and heads must be named by a rule, such as --set '**.embed_tokens=w8'"
    if any(matrix.why.startswith("F64") for matrix in left):
        hint = "convert the model first: model.float().save_pretrained(...)"
    return RecipeError(f"nothing in {source.checkpoint.folder} would be quantized:\n  {reasons}", hint)
