"""`spicerack.save`: a quantized module in memory -> a folder, by the formats and the writer that folders have.

The module is taken apart first, and all that can be refused is refused there: which layers are packed, by the table of
kinds; which of them own a weight that several share; what else there is in its state; and what each of these is called
in checkpoints, which for a transformers model is not what it is called in memory. Then shards are written one by one.
Packed codes and scales go to the disk as they are: nothing is decoded, and nothing is rounded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from spicerack._version import __version__
from spicerack.errors import LoadError, OutputError, UsageError
from spicerack.nn import kinds
from spicerack.nn.experts import ExpertStack
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.storage import format
from spicerack.storage.durable import json_bytes
from spicerack.storage.files import CONFIG, LEDGER
from spicerack.storage.format import Format, StoredTensor
from spicerack.storage.ledger import Entry, Ledger
from spicerack.storage.writer import Slot, Unit, Writer, plan_shards


@dataclass(frozen=True, slots=True)
class _Contents:
    """What will be in the folder, by the names that checkpoints have.

    packed  module -> its packed weight, as `plan` says that it will lie in `format`
    state   every other tensor
    files   file -> its JSON; config.json is the last
    """

    format: Format
    plan: dict[str, StoredTensor]
    packed: dict[str, PackedWeight]
    state: dict[str, torch.Tensor]
    files: dict[str, Any]

    def units(self) -> list[Unit]:
        """What is written at a time: all tensors of a packed one, or one that is not."""
        packed = [Unit(p.module, tuple(Slot(n, *slot) for n, slot in layout)) for p, layout in self._layouts()]
        return packed + [Unit(n, (Slot(n, _dtype(n, t), tuple(t.shape)),)) for n, t in self.state.items()]

    def _layouts(self) -> list[tuple[StoredTensor, Any]]:
        return [(planned, self.format.layout(planned).items()) for planned in self.plan.values()]

    def tensors(self, unit: Unit) -> dict[str, torch.Tensor]:
        """The tensors of one of `units`."""
        planned = self.plan.get(unit.source)
        if planned is None:
            return {unit.source: self.state[unit.source]}
        return self.format.encode(planned, self.packed[unit.source].qtensor())

    def identity(self) -> dict[str, Any]:
        """What must agree for a save that was killed to be continued."""
        return {
            "source": _fingerprint(self.packed, self.state, self.files),
            "format": self.format.name,
            "versions": {"spicerack": __version__, "torch": torch.__version__},
        }


def save(module: nn.Module, folder: str | Path) -> Path:
    """Write a module with quantized layers; codes and scales are stored as they are, never rounded again -> the folder.

    A transformers model becomes an ordinary model folder (weights, config.json, generation_config.json; a tokenizer is
    saved by its own save_pretrained); `load(folder)` gives it back. Any other module becomes a folder for
    `load(folder, into=module)`. Killed anywhere, it leaves `folder.partial`, which the same call completes and no other
    continues. Raises UsageError (nothing quantized in it, or what no folder can hold), OutputError, LoadError (a layer
    whose name in checkpoints cannot be told).
    """
    target = Path(folder)
    if target.exists():
        raise OutputError(f"{target} exists", "choose another folder, or remove it")
    contents = _contents(module)
    identity = contents.identity()
    writer = Writer(target, plan_shards(contents.units()), identity)
    for shard in writer.pending():
        with writer.shard(shard) as out:
            for unit in shard.units:
                for name, tensor in contents.tensors(unit).items():
                    out.write(name, tensor.cpu())
                out.entries.append(_entry(unit, contents.plan.get(unit.source)))
    if not writer.complete:
        ledger = Ledger(identity, writer.entries()).content()
        files = {name: json_bytes(value) for name, value in contents.files.items()}
        writer.finish({LEDGER: ledger, **files}, target, [])
    writer.seal()
    return target


# ---- what is in the module -------------------------------------------------------------------------------------------


def _contents(module: nn.Module) -> _Contents:
    """Raises UsageError, LoadError."""
    layers = _packed_layers(module)
    weights = _owners(module, layers)
    state, checkpoint_name = _state(module, weights)
    plan: dict[str, StoredTensor] = {}
    packed: dict[str, PackedWeight] = {}
    for path, weight in weights.items():
        name = checkpoint_name[_weight_of(path)].removesuffix(".weight")
        plan[name] = _planned(name, path, weight, [layer for layer in layers.values() if layer.packed is weight])
        packed[name] = weight
    chosen = format.choose(plan)
    # Linear layers that stay in float are named in the config of formats that others read; a tied head is one, too.
    linears = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    floats = [checkpoint_name.get(_weight_of(path), _weight_of(path)).removesuffix(".weight") for path in linears]
    files = _side_files(module)
    files[CONFIG] = chosen.config(files.pop(CONFIG), plan, floats)
    return _Contents(chosen, plan, packed, state, files)


def _planned(name: str, path: str, weight: PackedWeight, users: list[PackedLayer]) -> StoredTensor:
    """How the weight of these layers will lie in the folder. Of several kinds it has the first one's name (`KINDS`)."""
    used = [kinds.of_packed(layer) for layer in users]
    role = next(kind.name for kind in kinds.KINDS if kind in used)
    has_bias = any(layer.bias is not None for layer in users)
    source_dtype = _source_dtype(path, weight)
    return StoredTensor(name, weight.scheme, weight.shape, role, source_dtype, weight.transposed, has_bias)


def _packed_layers(module: nn.Module) -> dict[str, PackedLayer]:
    """Path -> layer. Raises UsageError if there are none, or packed weights elsewhere."""
    modules = dict(module.named_modules())
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


def _owners(module: nn.Module, layers: Mapping[str, PackedLayer]) -> dict[str, PackedWeight]:
    """Path -> packed weight, each once: under the name that transformers would store it under."""
    aliases = _aliases(module)
    owners: dict[int, str] = {}
    for path in sorted(layers, key=lambda path: _weight_of(path) in aliases):
        owners.setdefault(id(layers[path].packed), path)
    return {path: layer.packed for path, layer in layers.items() if owners[id(layer.packed)] == path}


def _state(module: nn.Module, weights: Mapping[str, PackedWeight]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Float tensors by their names in checkpoints, each once; and parameter -> its name there, packed ones too.

    What a packed weight is called can only be told by asking transformers what it would call the float one: tensors
    without values stand for those while names are reverted. Raises UsageError for a state that is no tensor, LoadError
    for a name that is lost on the way.
    """
    state = _floats(module)
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


def _floats(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state that is no part of a packed weight, each tensor once, by its name in the module. Raises UsageError."""
    modules = module.named_modules(remove_duplicate=False)
    inside = tuple(f"{path}." for path, part in modules if isinstance(part, PackedWeight))
    aliases = _aliases(module)
    values: dict[str, Any] = module.state_dict(keep_vars=True)
    floats: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for name, tensor in sorted(values.items(), key=lambda item: item[0] in aliases):
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"{name} is a {type(tensor).__name__}: only tensors are stored", "keep it outside")
        if not name.startswith(inside) and id(tensor) not in stored:
            stored.add(id(tensor))
            floats[name] = tensor.detach()
    return floats


def _aliases(module: nn.Module) -> set[str]:
    """Tied parameters that transformers does not store: it stores what they are tied to."""
    return set(module.all_tied_weights_keys) if isinstance(module, PreTrainedModel) else set()


def _weight_of(path: str) -> str:
    return f"{path}.weight"


def _source_dtype(name: str, weight: PackedWeight) -> torch.dtype:
    """The float type whose scales these are: after a cast on loading it is not the layer's own.

    Raises UsageError if there is none.
    """
    scheme, scale = weight.scheme, weight.qtensor().scale
    while isinstance(scale, QTensor):
        scheme, scale = scale.scheme, scale.scale
    for dtype in (weight.dtype, torch.float32, torch.bfloat16):
        if dtype_of(scheme.scale, dtype) == scale.dtype:
            return dtype
    raise UsageError(
        f"{name}: its scales are {scale.dtype}, which {scheme} does not store",
        "copy the folder that it was loaded from",
    )


# ---- what is written -------------------------------------------------------------------------------------------------


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
    config.pop("quantization_config", None)
    config["architectures"] = [type(module).__name__]
    config["dtype"] = str(module.dtype).removeprefix("torch.")
    if not module.can_generate():
        return {CONFIG: config}
    return {"generation_config.json": json.loads(module.generation_config.to_json_string()), CONFIG: config}


def _entry(unit: Unit, planned: StoredTensor | None) -> Entry:
    """A tensor's line in the ledger; what only quantizing knows, such as the error, is not there."""
    slot = unit.slots[0]
    if planned is None:
        shape, dtype, before = slot.shape, slot.dtype, unit.nbytes
    else:
        shape = planned.shape[::-1] if planned.transposed else planned.shape
        dtype = safetensors_dtype(planned.source_dtype)
        before = Slot(unit.source, dtype, shape).nbytes
    return Entry(
        tensor=unit.source if planned is None else _weight_of(unit.source),
        action="copy" if planned is None else "quantize",
        why="as it was in the module",
        layer_type=unit.source,
        scheme=None if planned is None else planned.scheme.name,
        dtype=dtype,
        shape=shape,
        bytes_before=before,
        bytes_after=unit.nbytes,
    )


def _fingerprint(
    packed: Mapping[str, PackedWeight], state: Mapping[str, torch.Tensor], files: Mapping[str, Any]
) -> str:
    """sha256 of everything that will be stored: a half-written folder is continued only for the very same contents."""
    digest = hashlib.sha256(json_bytes(files))
    parts = {f"{name}.{key}": t for name, weight in packed.items() for key, t in weight.tensors.items()}
    for name, tensor in {**parts, **state}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
