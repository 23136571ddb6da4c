"""`Parts`: a quantized module taken apart, into what a folder will hold.

All that can be refused is refused here, before a byte is written: which layers are packed is told by their base class,
what each is called in a folder by the table of kinds; which of several layers owns the weight that they share, and what
anything is called in checkpoints, is told by transformers where the module is its own. Such a module was perhaps edited
since it was built: it is compared with its class, as its config describes it and as `load` will build it. Nothing is
decoded or copied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from spicerack.errors import LoadError, UsageError, listed
from spicerack.models.architecture import host_of, on_meta
from spicerack.models.fit import fit
from spicerack.nn import kinds
from spicerack.nn.experts import ExpertStack
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme
from spicerack.storage import format
from spicerack.storage.durable import json_bytes
from spicerack.storage.files import CONFIG
from spicerack.storage.format import Format, StoredTensor
from spicerack.storage.writer import OutputTensor, Unit


@dataclass(frozen=True, slots=True)
class Parts:
    """What will be in the folder, by the names that checkpoints have.

    format  of packed tensors, chosen for all of them
    contents  module -> what is packed there
    packed  module -> its packed weight
    state   every other tensor
    files   file -> its JSON; config.json is the last
    """

    format: Format
    contents: dict[str, StoredTensor]
    packed: dict[str, PackedWeight]
    state: dict[str, torch.Tensor]
    files: dict[str, Any]

    def units(self) -> list[Unit]:
        """What is written at a time: all tensors of a packed weight together, or one float tensor; in the order of
        writing."""
        packed = [
            Unit(stored.module, tuple(OutputTensor(n, *header) for n, header in layout))
            for stored, layout in self._layouts()
        ]
        return packed + [Unit(n, (OutputTensor(n, _dtype(n, t), tuple(t.shape)),)) for n, t in self.state.items()]

    def _layouts(self) -> list[tuple[StoredTensor, Any]]:
        """What is packed, and (name, (type, shape)) of the tensors that it will be."""
        return [(stored, self.format.layout(stored).items()) for stored in self.contents.values()]

    def tensors(self, unit: Unit) -> dict[str, torch.Tensor]:
        """The tensors of one of `units`, by name, in the order of writing; a packed weight is unpacked here."""
        stored = self.contents.get(unit.source)
        if stored is None:
            return {unit.source: self.state[unit.source]}
        return self.format.encode(stored, self.packed[unit.source].qtensor())

    def fingerprint(self) -> str:
        """sha256 of everything that will be stored: a half-written folder is continued for these very contents only."""
        digest = hashlib.sha256(json_bytes(self.files))
        parts = {f"{name}.{key}": t for name, weight in self.packed.items() for key, t in weight.tensors.items()}
        for name, tensor in {**parts, **self.state}.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.cpu().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def parts_of(module: nn.Module) -> Parts:
    """All that will be in the folder of `module`, decided; the tensors are the module's own.

    Raises UsageError (nothing quantized in it, or what no folder can hold), LoadError (a layer whose name in
    checkpoints cannot be told).
    """
    layers = _packed_layers(module)
    files = _side_files(module)
    built = on_meta(files[CONFIG]) if isinstance(module, PreTrainedModel) else None
    ties = None if built is None else _ties(built)
    weights = _owners(module, layers, ties)
    state, checkpoint_name = _state(module, weights, ties)
    contents: dict[str, StoredTensor] = {}
    packed: dict[str, PackedWeight] = {}
    for path, weight in weights.items():
        name = checkpoint_name[_weight_of(path)].removesuffix(".weight")
        contents[name] = _stored(name, path, weight, [layer for layer in layers.values() if layer.packed is weight])
        packed[name] = weight
    chosen = format.choose(contents)
    # Linear layers that stay in float are named in the config of formats that others read; a tied head is one, too.
    linears = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear) and path not in layers]
    floats = [checkpoint_name.get(_weight_of(path), _weight_of(path)).removesuffix(".weight") for path in linears]
    if built is not None:
        _check_fit(built, state, contents)
    config = files.pop(CONFIG)
    headers = {name: (_dtype(name, tensor), tuple(tensor.shape)) for name, tensor in state.items()}
    headers |= {f"{p.module}.weight": (safetensors_dtype(p.source_dtype), p.shape) for p in contents.values()}
    reading = chosen.reading(config, contents, host_of(config, headers, contents, floats))
    files[CONFIG] = chosen.config(config, contents, reading)
    return Parts(chosen, contents, packed, state, files)


def _stored(name: str, path: str, weight: PackedWeight, users: list[PackedLayer]) -> StoredTensor:
    """How a weight will lie in the folder.

    name   its module's, in checkpoints
    path   of the layer that owns it, for errors
    users  all layers that hold it: of several kinds it gets the name of the first in `KINDS`
    """
    used = [kinds.of_packed(layer) for layer in users]
    role = next(kind.name for kind in kinds.KINDS if kind in used)
    has_bias = any(layer.bias is not None for layer in users)
    source_dtype = _source_dtype(path, weight)
    return StoredTensor(name, weight.scheme, weight.shape, role, source_dtype, weight.transposed, has_bias)


def _packed_layers(module: nn.Module) -> dict[str, PackedLayer]:
    """Path -> layer with packed weights.

    Raises UsageError if there are none, and for what no folder holds so far: a layer that is all there is, which has no
    name, and stacks of experts.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    layers = {path: layer for path, layer in modules.items() if isinstance(layer, PackedLayer)}
    if "" in layers:
        raise UsageError("a layer on its own has no name to be stored under", "save nn.Sequential(layer)")
    for path, part in modules.items():
        if isinstance(part, ExpertStack):
            raise UsageError(f"{path}: packed experts are not saved yet", "copy the folder that they were loaded from")
    if not layers:
        raise UsageError(
            f"{type(module).__name__} has no quantized layers",
            "use spicerack.quantize(module, scheme) first, or freeze what was trained",
        )
    return layers


def _ties(built: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the one under whose name transformers stores it, for those that the class ties."""
    ties: dict[str, str] = built.all_tied_weights_keys
    return dict(ties)


def _check_fit(built: PreTrainedModel, state: Mapping[str, torch.Tensor], contents: Mapping[str, StoredTensor]) -> None:
    """Raise UsageError unless what will be written fills the class, as its config describes it, and nothing is left.

    built: the class on the meta device. state, contents: the float tensors, and what is packed.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, stored in contents.items():
        shapes[_weight_of(name)] = stored.float_shape
    fitting, cls = fit(built, shapes), type(built).__name__
    hint = (
        "let its config say what the model has, or save it within a module of your own, for load(folder, into=module)"
    )
    for names, problem in (
        (fitting.unplaced, f"has no place in {cls} as its config describes it: it would be left out on loading"),
        (fitting.missing, f"of {cls}, as its config describes it, is not in the model"),
        (tuple(fitting.mismatched), f"has another shape in {cls} as its config describes it"),
    ):
        if names:
            raise UsageError(f"{listed(names, 3, 'tensors')} {problem}", hint)


def _owners(
    module: nn.Module, layers: Mapping[str, PackedLayer], ties: Mapping[str, str] | None
) -> dict[str, PackedWeight]:
    """Path -> packed weight, each once: under the name that transformers would store it under, where several layers
    hold it.

    ties: of the class; layers that share a weight which it does not tie are stored each. None: all that share one are.
    """
    aliases = _aliases(module)
    owners: dict[tuple[int, str], str] = {}
    keys = {path: (id(layer.packed), _group(_weight_of(path), ties)) for path, layer in layers.items()}
    for path in sorted(layers, key=lambda path: _weight_of(path) in aliases):
        owners.setdefault(keys[path], path)
    return {path: layer.packed for path, layer in layers.items() if owners[keys[path]] == path}


def _group(name: str, ties: Mapping[str, str] | None) -> str:
    """What all parameters have in common that a class ties to each other; "" for all where its ties are not known."""
    return "" if ties is None else ties.get(name, name)


def _state(
    module: nn.Module, weights: Mapping[str, PackedWeight], ties: Mapping[str, str] | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Float tensors by their names in checkpoints, each once; and parameter -> its name there, packed ones too.

    What a packed weight is called can only be told by asking transformers what it would call the float one: tensors
    without values stand for those while names are reverted. Raises UsageError for a state that is no tensor, LoadError
    for a name that is lost on the way.
    """
    state = _floats(module, ties)
    for path, weight in weights.items():
        state[_weight_of(path)] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    renamed = revert_weight_conversion(module, state) if isinstance(module, PreTrainedModel) else state
    names = {id(tensor): name for name, tensor in renamed.items()}
    known = {name: names[id(tensor)] for name, tensor in state.items() if id(tensor) in names}
    for path in weights:
        if _weight_of(path) not in known:
            raise LoadError(f"{path}: its name in checkpoints cannot be told", "quantize the model's folder instead")
    packed = {known[_weight_of(path)] for path in weights}
    return {name: tensor for name, tensor in renamed.items() if name not in packed}, known


def _floats(module: nn.Module, ties: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
    """The state that is no part of a packed weight, each tensor once, by its name in the module; ties as in `_owners`.

    Raises UsageError.
    """
    modules = module.named_modules(remove_duplicate=False)
    inside = tuple(f"{path}." for path, part in modules if isinstance(part, PackedWeight))
    aliases = _aliases(module)
    values: dict[str, Any] = module.state_dict(keep_vars=True)
    floats: dict[str, torch.Tensor] = {}
    ids: set[tuple[int, str]] = set()
    for name, tensor in sorted(values.items(), key=lambda item: item[0] in aliases):
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"{name} is a {type(tensor).__name__}: only tensors are stored", "keep it outside")
        key = id(tensor), _group(name, ties)
        if not name.startswith(inside) and key not in ids:
            ids.add(key)
            floats[name] = tensor.detach()  # a tensor of its own: names are told apart by it
    return floats


def _aliases(module: nn.Module) -> set[str]:
    """Tied parameters that transformers does not store: it stores what they are tied to."""
    return set(module.all_tied_weights_keys) if isinstance(module, PreTrainedModel) else set()


def _weight_of(path: str) -> str:
    """What the weight of the layer at `path` is called in the module, or would be if it were a parameter."""
    return f"{path}.weight"


def _source_dtype(name: str, weight: PackedWeight) -> torch.dtype:
    """The float type that a packed weight was quantized from, told by the type of its scales.

    After a cast on loading that is not the layer's own. name: of the layer, for errors. Raises UsageError if there is
    none.
    """
    scheme, scale = weight.scheme, weight.qtensor().scale
    while isinstance(scale, QTensor):
        assert isinstance(scheme.scale, Scheme)
        scheme, scale = scheme.scale, scale.scale
    assert isinstance(scheme.scale, str)
    kind = scheme.scale
    for dtype in (weight.dtype, torch.float32, torch.bfloat16):
        if dtype_of(kind, dtype) == scale.dtype:
            return dtype
    raise UsageError(
        f"{name}: its scales are {scale.dtype}, which {scheme} does not store",
        "copy the folder that it was loaded from",
    )


def _dtype(name: str, tensor: torch.Tensor) -> str:
    """safetensors' name for the tensor's type. Raises UsageError if it has none."""
    try:
        return safetensors_dtype(tensor.dtype)
    except KeyError:
        raise UsageError(f"{name} is {tensor.dtype}, which safetensors does not hold", "cast it") from None


def _side_files(module: nn.Module) -> dict[str, Any]:
    """File -> its JSON: config.json, last and of the float model; empty for a module that is not transformers'."""
    if not isinstance(module, PreTrainedModel):
        return {CONFIG: {}}
    config = json.loads(module.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path"):  # what it was, and where it lay on somebody's disk
        config.pop(key, None)
    config["architectures"] = [type(module).__name__]
    config["dtype"] = str(module.dtype).removeprefix("torch.")
    if not module.can_generate():
        return {CONFIG: config}
    return {"generation_config.json": json.loads(module.generation_config.to_json_string()), CONFIG: config}
