"""Whether the tensors of a folder fill the model class that its config.json names, told from headers.

What transformers only warns of when it loads a model, random numbers in place of what is missing, is asked here before
any work, through its own conversion mapping. `quantize` asks about the folder that it is given, and `save` about the
one that it is about to write.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spicerack.models.architecture import Destination, destinations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor of a checkpoint -> its stored shape."""
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model.model": "PEFT",
}
"""Components that tools put into the names of what they wrap -> which tool does."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How the tensors of a folder fill a model.

    missing     parameters and buffers that no tensor reaches, nor one that they are tied to
    unplaced    tensors that reach none, without those that the class says to ignore
    mismatched  tensor -> (its shape, that of the parameter), where they differ
    """

    missing: tuple[str, ...]
    unplaced: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def fit(model: PreTrainedModel, shapes: Shapes) -> Fit:
    """How these tensors fill `model`, which is on the meta device; ties and exceptions are the class's own."""
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = destinations(model, shapes)
    reached = {name for place in places.values() for name in (place.parameter, *place.others)}
    reached -= _partly(places, state)
    reached |= _tied_to(reached, model.all_tied_weights_keys)
    ignored = _any_of(model._keys_to_ignore_on_load_missing)
    unwanted = _any_of(model._keys_to_ignore_on_load_unexpected)
    mismatched = {
        name: (shapes[name], state[place.parameter])
        for name, place in places.items()
        if not place.operations and shapes[name] != state[place.parameter]
    }
    return Fit(
        tuple(name for name in state if name not in reached and not ignored.search(name)),
        tuple(name for name in shapes if name not in places and not unwanted.search(name)),
        mismatched,
    )


def relying_on_ties(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Parameters of `model` that no tensor of a folder reaches, and that have a value by being tied to one."""
    reached = {name for place in destinations(model, names).values() for name in (place.parameter, *place.others)}
    return sorted(_tied_to(reached, model.all_tied_weights_keys) - reached)


def renamed(model: PreTrainedModel, shapes: Shapes) -> tuple[str, str] | None:
    """What to take out of the names of all tensors so that they fill `model`, and who puts such there; None if nothing
    helps.

    Wrappers are taken out wherever they stand, and any other beginning that all names share as a prefix, whose origin
    is not known ("").
    """
    common = _common_prefix(list(shapes))
    candidates = [(f"{wrapper}.", tool) for wrapper, tool in _WRAPPERS.items()]
    candidates += [(".".join(common[:length]) + ".", "") for length in range(1, len(common) + 1)]
    for part, tool in candidates:
        names = {_without(name, part): shape for name, shape in shapes.items()}
        if names.keys() != shapes.keys() and len(names) == len(shapes):
            changed = fit(model, names)
            if not changed.missing and not changed.mismatched:
                return part, tool
    return None


def _without(name: str, part: str) -> str:
    """The name without a run of components, wherever it stands; `part` ends in a dot."""
    return re.sub(rf"(^|(?<=\.)){re.escape(part)}", "", name)


def _common_prefix(names: list[str]) -> list[str]:
    """Components that all names begin with."""
    common: list[str] = []
    for column in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return common


def _partly(places: Mapping[str, Destination], state: Shapes) -> set[str]:
    """Parameters of experts that some experts, or parts of experts, have no tensor for."""
    experts: dict[str, Counter[int]] = {}
    for place in places.values():
        if place.stacked:
            experts.setdefault(place.parameter, Counter())[place.expert] += 1
    return {
        parameter
        for parameter, parts in experts.items()
        if len(parts) != state[parameter][0] or len(set(parts.values())) > 1
    }


def _tied_to(reached: set[str], ties: Mapping[str, str]) -> set[str]:
    """Parameters that get a value because one that they are tied to has one."""
    owners = {ties.get(name, name) for name in reached}
    return owners | {alias for alias, owner in ties.items() if owner in owners}


def _any_of(patterns: Iterable[str] | None) -> re.Pattern[str]:
    """A regular expression that finds any of transformers' own patterns; without any, nothing."""
    return re.compile("|".join(f"({pattern})" for pattern in patterns or ()) or r"(?!)")
