"""Which layers a block has to quantize, told from the job and the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from spicerack.models import blocks
from spicerack.models.architecture import destinations
from spicerack.models.blocks import Stack
from spicerack.quantization.calibration.states import solution_name
from spicerack.quantization.job import Action, Job
from spicerack.runtime.slots import Expert
from spicerack.storage.format import StoredTensor


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized layer of a block: its path in there, and the source tensor's name and the matrix's plan.

    stack: path of the stack that it is in, if it is an expert's. number: in a tensor of all experts.
    """

    path: str
    tensor: str
    planned: StoredTensor
    stack: str = ""
    number: int | None = None

    @property
    def key(self) -> str:
        """What it is called among solutions."""
        return solution_name(self.tensor, self.number)

    @property
    def expert(self) -> str:
        """Its number in the stack."""
        return self.path.removeprefix(self.stack).split(".")[1]


@dataclass(frozen=True, slots=True)
class Inside:
    """What a block has of the model's tensors: layers to quantize, and by path the names of the other parameters."""

    layers: tuple[Layer, ...]
    others: Mapping[str, str]


def inside(stack: Stack, experts: Mapping[str, Expert], job: Job) -> list[Inside]:
    """For each block what is in it. Tensors that transformers changes on loading, beyond renaming, are left out.

    experts: of `load_apart`.
    """
    actions: dict[str, Action] = {a.info.name: a for a in job.actions}
    names = {
        place.parameter: tensor
        for tensor, place in destinations(stack.model, actions).items()
        if not place.operations
    }  # fmt: skip
    found = []
    for i, block in enumerate(stack.blocks):
        layers, others = [], {}
        linear = {f"{path}.weight": path for path in blocks.layers(block)}
        for path in linear.values():
            expert = experts.get(f"{stack.name(i)}.{path}")
            if expert is not None and isinstance(expert.source, str):
                planned = actions[expert.source].planned
                of = path.rsplit(".", 2)[0]
                if planned is not None and expert.number is not None:
                    planned = dataclasses.replace(planned, shape=planned.shape[1:], transposed=False)
                if planned is not None:
                    layers.append(Layer(path, expert.source, planned, of, expert.number))
        for path, _ in block.named_parameters():
            tensor = names.get(f"{stack.name(i)}.{path}")
            planned = None if tensor is None else actions[tensor].planned
            if tensor is not None and planned is None:
                others[path] = tensor
            elif tensor is not None and planned is not None and path in linear:
                layers.append(Layer(linear[path], tensor, planned))
        found.append(Inside(tuple(layers), others))
    return found
