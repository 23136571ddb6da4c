"""Which tensors a GGUF file will have, of which type, and from which tensors of a folder: known from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spicerack.errors import CheckpointError, listed
from spicerack.exports.restoring import SCHEMES
from spicerack.exports.source import Source
from spicerack.models.gguf import config as configs
from spicerack.models.gguf import layers, rope
from spicerack.models.gguf.checkpoint import adds_one
from spicerack.models.gguf.family import Family, of_type
from spicerack.models.gguf.headers import row_order
from spicerack.models.gguf.layers import IN_F32, types_of
from spicerack.models.gguf.names import Names, Place
from spicerack.storage.format import Contents, StoredTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES, GgmlType, TensorSpec
from spicerack.storage.gguf.metadata import Entry, Value
from spicerack.storage.ledger import Ledger
from spicerack.storage.reader import TensorInfo

_LISTED = 3
"""Layers that a refusal names before it counts the rest."""
_FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K": 12,
    "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40,
    "Q2_0": 41,
}  # fmt: skip
"""general.file_type of a file that is mostly of a type (llama.h, LLAMA_FTYPE_MOSTLY_*); llama.cpp only prints it."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the file.

    spec    its name, type and shape
    parts   what it is made of, in order: one tensor of the folder, or those that are stacked in it
    """

    spec: TensorSpec
    parts: tuple[tuple[StoredTensor | TensorInfo, Place], ...]

    @property
    def specs(self) -> list[TensorSpec]:
        """The same, and of NVFP4 the tensor of its scales, one for each part, that lies beside it."""
        if self.spec.type.name != "NVFP4":
            return [self.spec]
        name = self.spec.name.removesuffix(".weight") + ".scale"
        return [self.spec, TensorSpec(name, TYPES["F32"], self.spec.shape[:-2] or (1,))]


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of a model before its tensors are asked for: its family, its whole config, and names."""

    family: Family
    config: Mapping[str, Any]
    names: Names

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """Of a float model's config.json. Raises CheckpointError for a family that has no names in GGUF."""
        family = of_type(config.get("model_type"))
        return cls(family, configs.whole(config), Names(family))


def packed_obstacles(names: Names, contents: Contents) -> list[str]:
    """Why packed tensors cannot go into a file as they are, a sentence for each rule, beginning with its modules."""
    rules: dict[str, list[str]] = {}
    for module, stored in contents.items():
        if (rule := layers.obstacle(names, stored)) is not None:
            rules.setdefault(rule, []).append(module)
    return [f"{listed(modules, _LISTED, 'layers')}: {rule}" for rule, modules in rules.items()]


def plan(model: Model, source: Source) -> list[Planned]:
    """The tensors of the file, in the order of the folder. Raises CheckpointError for those that have no place."""
    groups: dict[str, list[tuple[StoredTensor | TensorInfo, Place]]] = {}
    for tensor in source.order():
        name = f"{tensor.module}.weight" if isinstance(tensor, StoredTensor) else tensor.name
        if model.names.left_out(name):
            continue
        places = model.names.places(name)
        if not places:
            raise CheckpointError(
                f"{name}: llama.cpp has no such tensor in {model.family.architecture}", "leave it out"
            )
        for place in places:
            groups.setdefault(place.tensor, []).append((tensor, place))
    planned = [_planned(name, group) for name, group in groups.items()]
    return planned + _second_head(model.family, planned)


def _second_head(family: Family, planned: Iterable[Planned]) -> list[Planned]:
    """The embedding once more, as a head, where llama.cpp wants one of its own."""
    by_name = {one.spec.name: one for one in planned}
    if not family.own_head or "output.weight" in by_name:
        return []
    table = by_name["token_embd.weight"]
    return [Planned(TensorSpec("output.weight", table.spec.type, table.spec.shape), table.parts)]


def _planned(name: str, group: list[tuple[StoredTensor | TensorInfo, Place]]) -> Planned:
    """One tensor of the file. Raises CheckpointError for parts that do not make one."""
    parts = tuple(sorted(group, key=lambda part: part[1].member or 0))
    members = [place.member for _, place in parts]
    if members != ([None] if len(parts) == 1 and members[0] is None else list(range(len(parts)))):
        raise CheckpointError(f"{name}: made of {_label(parts[0][0])} and {len(parts) - 1} more, which are not all", "")
    shapes = {place.shape(tensor.shape, packed=isinstance(tensor, StoredTensor)) for tensor, place in parts}
    if len(shapes) > 1:
        raise CheckpointError(f"{name}: experts of different shapes, {sorted(shapes)}", "llama.cpp wants them alike")
    shape = shapes.pop()
    if parts[0][1].module == "ffn_gate_inp_shexp":
        shape = shape[-1:]
    elif members[0] is not None:
        shape = (len(parts), *shape)
    return Planned(TensorSpec(name, _type(name, parts, len(shape)), shape), parts)


def _type(name: str, parts: tuple[tuple[StoredTensor | TensorInfo, Place], ...], axes: int) -> GgmlType:
    """The type of a tensor: what holds all its parts as they are. Raises CheckpointError where none does."""
    packed = [tensor for tensor, _ in parts if isinstance(tensor, StoredTensor)]
    if len(packed) == len(parts):
        common = [type_ for type_ in types_of(packed[0]) if all(type_ in types_of(other) for other in packed[1:])]
        if common:
            return common[0]
    elif not packed:
        place, types = parts[0][1], {tensor.dtype for tensor, _ in parts if isinstance(tensor, TensorInfo)}
        if axes < 2 or place.module.endswith("norm") or place.module in IN_F32 or not name.endswith(".weight"):
            return TYPES["F32"]
        if len(types) == 1 and (only := types.pop()) in ("F32", "F16", "BF16"):
            return TYPES[only]
    kinds = sorted({str(t.scheme) if isinstance(t, StoredTensor) else t.dtype for t, _ in parts})
    raise CheckpointError(
        f"{_label(parts[0][0])}: {name} would have parts in {', '.join(kinds)}, and a tensor of GGUF has one type",
        "give all of them one scheme",
    )


def _label(tensor: StoredTensor | TensorInfo) -> str:
    return tensor.module if isinstance(tensor, StoredTensor) else tensor.name


def raw(model: Model, source: Source, planned: Planned, shared: Shared) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """One tensor, and its scales where there are any: specs, and bytes, uint8 of their `raw_shape`.

    shared: what is left of the tensor before. Raises WeightError and SchemeError for numbers that the type does not
    hold.
    """
    parts = [_raw_part(model, source, planned.spec.type, part, shared) for part in planned.parts]
    for number, spec in enumerate(planned.specs):
        # one that is not stacked may lie in the folder as it is written: it is not copied
        values = parts[0][number] if len(parts) == 1 else torch.cat([part[number].reshape(-1) for part in parts])
        yield spec, values.reshape(spec.raw_shape)
    for tensor, place in planned.parts:
        if place.share is None or place.share.number == place.share.count - 1:
            source.release(tensor)


class Shared:
    """The bytes of the last tensor of a folder whose rows go to several tensors of the file: they follow each other,
    and it is encoded once."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._values: tuple[torch.Tensor, torch.Tensor] | None = None

    def encoded(
        self, key: tuple[str, str], encode: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encode` gives for a tensor and a type; the same again for the same."""
        if self._values is None or key != self._key:
            self._key, self._values = key, None  # what is not needed any more goes before the next is there
            self._values = encode()
        return self._values


def _raw_part(
    model: Model, source: Source, type_: GgmlType, part: tuple[StoredTensor | TensorInfo, Place], shared: Shared
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of one tensor of the folder, rows in the file's order; and its scale's, which only NVFP4 has."""
    tensor, place = part
    if place.share is None:
        values, scale = _encoded(model, source, type_, tensor, place)
    else:
        key = _label(tensor), type_.name
        values, scale = shared.encoded(key, lambda: _encoded(model, source, type_, tensor, place))
        values = values[..., place.share.of(values.shape[-2]), :]
    if place.rows is not None:
        values = values.index_select(0, row_order(place, len(values), model.config))
    return values, scale.view(torch.uint8)


def _encoded(
    model: Model, source: Source, type_: GgmlType, tensor: StoredTensor | TensorInfo, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of all of a tensor, [.., rows, bytes of one], in its own order; and its scale."""
    if isinstance(tensor, StoredTensor):
        if len(tensor.shape) > 2:
            return _stack(source, type_, tensor)
        q, own = blocks.without_tensor_scale(source.either(tensor.module))
        ones = torch.ones(1, dtype=torch.float32, device="cpu")
        return blocks.encode(type_, q, tensor.module), ones if own is None else own
    values = source.float(tensor.name)
    if place.turned:
        values = values.transpose(-1, -2)
    if adds_one(model.family, place):
        values = values.float() + 1
    # of a bias an element is a row
    matrices = values if place.axis == -2 and values.ndim > 1 else values[..., None]
    none = torch.ones(1, dtype=torch.float32, device="cpu")
    return blocks.encode_floats(type_, matrices, tensor.name), none


def _stack(source: Source, type_: GgmlType, tensor: StoredTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of experts in one tensor, one at a time: their codes, taken apart, are several times as large.

    None has a scale beside it (`layers.scale_obstacle`).
    """
    experts, rows, columns = tensor.shape
    raw = torch.empty((experts, rows, type_.row_bytes(columns)), dtype=torch.uint8, device="cpu")
    for number, matrix in enumerate(source.matrices(tensor.module)):
        raw[number] = blocks.encode(type_, matrix, tensor.module)
    return raw, torch.ones(experts, dtype=torch.float32, device="cpu")


def metadata(model: Model, planned: list[Planned], tokens: Mapping[str, Entry], facts: Facts) -> dict[str, Entry]:
    """All keys of the file, those of its tokenizer among them."""
    sizes: dict[str, int] = {}
    for one in planned:
        sizes[one.spec.type.name] = sizes.get(one.spec.type.name, 0) + one.spec.nbytes
    keys: dict[str, Entry] = {
        "general.architecture": Value("string", model.family.architecture),
        "general.type": Value("string", "model"),
        "general.name": Value("string", facts.name),
        "general.file_type": Value("u32", _FILE_TYPES[max(sizes, key=lambda name: sizes[name])]),
        "general.quantization_version": Value("u32", 2),
    }
    keys |= configs.to_metadata(model.family, model.config, facts.pooling) | dict(tokens) | facts.keys()
    if schemes := _schemes(planned):
        keys[SCHEMES] = Value("string", json.dumps(schemes))
    return keys


def _schemes(planned: list[Planned]) -> dict[str, str]:
    """Tensor -> the scheme that it had, where all parts had one, and it is not its type's own."""
    schemes = {}
    for one in planned:
        names = {str(part.scheme) if isinstance(part, StoredTensor) else None for part, _ in one.parts}
        if len(names) == 1 and (name := names.pop()) not in (None, one.spec.type.scheme):
            schemes[one.spec.name] = str(name)
    return schemes


@dataclass(frozen=True, slots=True)
class Facts:
    """What travels with the file beside the model.

    name     of the model, for people
    pooling  of a sentence encoder
    ledger   of the folder; None without one
    order    what the caller wants to be known, of JSON's values
    """

    name: str
    pooling: str | None
    ledger: Ledger | None
    order: Mapping[str, Any]

    def keys(self) -> dict[str, Entry]:
        """Under keys that begin with `spicerack.`: text as it is, what is not text as JSON."""
        told: dict[str, Any] = dict(self.order)
        if self.ledger is not None:
            told |= {"recipe": self.ledger.recipe, "ledger": dict(self.ledger.identity)}
            told |= {"calibration": self.ledger.calibration_text}
        return {
            f"spicerack.{key}": Value("string", value if isinstance(value, str) else json.dumps(value, sort_keys=True))
            for key, value in told.items()
            if value is not None
        }


def numbers(model: Model) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors that are no weights: what rotary embeddings are scaled by."""
    return dict(rope.to_metadata(model.family, model.config).tensors)
