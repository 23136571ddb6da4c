"""A GGUF file as one of llama.cpp's mixtures would be, without its weights: all that an engine's own count looks at.

The header is whole, but for the vocabulary, of which it has the size; behind it is a hole that takes no room on the
disk. Names and keys are those that `export` writes, types those that `plan` counts with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spicerack.errors import CheckpointError
from spicerack.models.gguf import config as configs
from spicerack.models.gguf import rope
from spicerack.models.gguf.family import Family, of_type
from spicerack.models.gguf.names import Names
from spicerack.planning import gguf
from spicerack.planning.gguf import Mixture
from spicerack.planning.model import Model
from spicerack.storage.gguf.ggml import TYPES, TensorSpec
from spicerack.storage.gguf.metadata import Entry, Value
from spicerack.storage.gguf.writer import write_hollow

_REMEDY = "leave --exact out, or export the model and plan the file"


def write(model: Model, mixture: str, path: Path) -> None:
    """The file of a float model in a mixture of llama.cpp.

    Raises CheckpointError for what is none (`gguf.MIXTURES`), for a family or a tensor that has no name in GGUF, and
    for what llama.cpp computes otherwise.
    """
    if (recipe := gguf.MIXTURES.get(mixture)) is None:
        raise CheckpointError(f"{mixture} is no mixture that a file is made of for a count", _REMEDY)
    family = of_type(model.family)
    config = configs.whole(model.text)
    if reasons := configs.obstacles(family, config):
        raise CheckpointError(f"{model.name}: {reasons[0]}", _REMEDY)
    metadata: dict[str, Entry] = {
        "general.architecture": Value("string", family.architecture),
        "general.type": Value("string", "model"),
        "general.quantization_version": Value("u32", 2),
        # llama.cpp makes as many unnamed tokens as the sizes say
        "tokenizer.ggml.model": Value("string", "none"),
        **configs.to_metadata(family, config),
    }
    numbers = rope.to_metadata(family, config).tensors
    specs = [TensorSpec(name, TYPES["F32"], values.shape) for name, values in numbers.items()]
    specs += _tensors(model, family, recipe)
    write_hollow(path, metadata, specs)


def _tensors(model: Model, family: Family, recipe: Mixture) -> Iterator[TensorSpec]:
    """The model's tensors under the names of the file, experts of a layer in one."""
    names = Names(family)
    table: TensorSpec | None = None
    head = False
    for weight in model.weights:
        info = weight.entry.info
        # a language model among towers, whose file has no place for those
        name = info.name.replace("language_model.", "", 1)
        if weight.place == "tower" or names.left_out(name):
            continue
        places = names.places(name)
        if not places:
            raise CheckpointError(f"{name}: llama.cpp has no such tensor in {family.architecture}", _REMEDY)
        type_ = TYPES[gguf.type_of(model, weight, recipe)]
        for place in places:
            shape = place.shape(info.shape)
            if place.module == "ffn_gate_inp_shexp":
                shape = shape[-1:]
            if place.member is not None:
                shape = (weight.count, *shape)
            spec = TensorSpec(place.tensor, type_, shape)
            head = head or place.tensor == "output.weight"
            table = spec if place.tensor == "token_embd.weight" else table
            yield spec
    if family.own_head and not head and table is not None:
        yield TensorSpec("output.weight", table.type, table.shape)
