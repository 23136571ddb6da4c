"""Which slots a transformers model gets: where each tensor of a folder goes by transformers' own conversion mapping.

Names in a folder are not the model's. transformers renames tensors when it loads them, and merges some: the matrices of
a mixture's experts, which most folders have one by one, become one parameter of all. `architecture.destinations`
follows each name through that mapping; here is decided what its end means for a packed tensor:

    a layer's weight, renamed or not         the layer gets a slot, and so do those that are tied to it
    a parameter of experts, one tensor       a stack's slot, in which the experts are the matrices of that tensor
    a parameter of experts, many tensors     a stack's slot, if any of them is packed; the others go into it as floats
    changed in any other way, or nowhere     refused, by name

What goes into slots is no tensor that transformers loads: the floats among it are withheld.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from spicerack.errors import LoadError
from spicerack.models.architecture import Destination, destinations, is_stack
from spicerack.runtime.slots import Expert, make_slot, make_stack_slot
from spicerack.storage.format import StoredTensor

Source = StoredTensor | str
"""A packed tensor, or the name of a float one."""


@dataclass(slots=True)
class _Places:
    """The parameters of a model that get slots, and what goes there.

    layers  weight of a layer -> its packed tensor
    whole   3-D parameter of experts -> the one tensor of all of them
    stacks  3-D parameter of experts -> the names of their tensors, and where in it each goes
    """

    layers: dict[str, StoredTensor] = field(default_factory=dict)
    whole: dict[str, Source] = field(default_factory=dict)
    stacks: dict[str, list[tuple[str, Destination]]] = field(default_factory=dict)


def make_slots(
    model: PreTrainedModel, contents: Mapping[str, StoredTensor], floats: Mapping[str, bool], *, apart: bool = False
) -> list[str]:
    """Make slots in `model`, on the meta device, for a whole folder -> the float tensors that go into slots as well.

    Those are experts in one stack with packed ones.

    contents  module in the checkpoint's names -> what is packed there
    floats    float tensor of the checkpoint -> whether it is stored [..., K, N]
    apart     stacks get slots whether any expert is packed or not

    Raises LoadError for a packed tensor that the model has no use
    for or that transformers changes on loading, and for a layer that it does not fit.
    """
    sources: dict[str, Source] = {name: name for name in floats}
    sources |= {f"{stored.module}.weight": stored for stored in contents.values()}
    # A tensor of all experts is a parameter, whose name may or may not end in `.weight`.
    sources |= {stored.module: stored for stored in contents.values() if stored.role == "experts"}
    destination = destinations(model, sources)
    places = _sorted(model, sources, destination, apart)
    _tie(model, places.layers, {destination[name].parameter for name in floats if name in destination})
    for parameter, stored in places.layers.items():
        make_slot(model, parameter.removesuffix(".weight"), stored)
    without = {p.module: p for p in contents.values() if p.role == "experts" and p not in places.whole.values()}
    if without:
        _parameter_of(without[min(without)], None, model)
    return [*_whole_stacks(model, places.whole, floats), *_stacks_of_many(model, places.stacks, sources, apart)]


def _sorted(
    model: PreTrainedModel, sources: Mapping[str, Source], destination: Mapping[str, Destination], apart: bool
) -> _Places:
    """The places of all that may be in a slot. Raises LoadError for a packed tensor that has none."""
    places = _Places()
    for name, source in sources.items():
        place = destination.get(name)
        if place is not None and place.stacked:
            places.stacks.setdefault(place.parameter, []).append((name, place))
        elif isinstance(source, StoredTensor) and source.role == "experts":
            if place is not None:
                places.whole[_parameter_of(source, place, model)] = source
        elif isinstance(source, StoredTensor):
            places.layers[_parameter_of(source, place, model)] = source
        elif apart and place is not None and is_stack(model, place):
            places.whole[place.parameter] = source
    return places


def _whole_stacks(model: PreTrainedModel, whole: Mapping[str, Source], floats: Mapping[str, bool]) -> list[str]:
    """Slots for experts that are one tensor -> those that are float."""
    for parameter, source in whole.items():
        if isinstance(source, StoredTensor):
            transposed = source.transposed
        else:
            owner = model.get_submodule(parameter.rpartition(".")[0])
            transposed = vars(owner).get("is_transposed", floats[source])
        matrices = [[Expert(source, number)] for number in range(model.get_parameter(parameter).shape[0])]
        make_stack_slot(model, parameter, matrices, transposed=transposed)
    return [source for source in whole.values() if isinstance(source, str)]


def _stacks_of_many(
    model: PreTrainedModel,
    stacks: Mapping[str, list[tuple[str, Destination]]],
    sources: Mapping[str, Source],
    apart: bool,
) -> list[str]:
    """Slots for experts that are tensors of their own, in stacks of which one is packed -> those that are float.

    stacks    parameter of experts -> the names of their tensors, and where each goes
    sources   name -> packed tensor, or the name itself
    apart     stacks get slots whether any expert is packed or not
    """
    withheld: list[str] = []
    for parameter, members in stacks.items():
        if apart or any(isinstance(sources[name], StoredTensor) for name, _ in members):
            make_stack_slot(model, parameter, _by_expert(members, sources), transposed=False)
            withheld += [name for name, _ in members if isinstance(sources[name], str)]
    return withheld


def _by_expert(members: Iterable[tuple[str, Destination]], sources: Mapping[str, Source]) -> list[list[Expert]]:
    """[expert][part], from tensors that are named by the expert's number."""
    experts: dict[int, dict[int, Expert]] = {}
    for name, place in members:
        experts.setdefault(place.expert, {})[place.part] = Expert(sources[name])
    return [[parts[part] for part in sorted(parts)] for _, parts in sorted(experts.items())]


def _parameter_of(stored: StoredTensor, place: Destination | None, model: PreTrainedModel) -> str:
    """The parameter that a packed tensor takes the place of.

    place: where transformers would put it; None: nowhere. Raises LoadError where that is nowhere, or the tensor would
    be changed on the way.
    """
    if place is None:
        raise LoadError(f"{stored.module}: {type(model).__name__} has no use for it", "is config.json the model's own?")
    if place.operations:
        raise LoadError(f"{stored.module}: transformers changes it by {', '.join(place.operations)}", "skip it")
    return place.parameter


def _tie(model: PreTrainedModel, layers: dict[str, StoredTensor], floats: set[str]) -> None:
    """Give the packed weight of a layer to those tied to it, unless the folder has weights of their own for them.

    `layers` and the model's ties are changed: transformers must not tie them, for there is no parameter any more.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    groups: dict[str, list[str]] = {}
    for alias, owner in ties.items():
        groups.setdefault(owner, [owner]).append(alias)
    for group in groups.values():
        packed = [name for name in group if name in layers]
        if packed:
            layers |= {name: layers[packed[0]] for name in group if name not in layers and name not in floats}
            for name in group:
                ties.pop(name, None)
