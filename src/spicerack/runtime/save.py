"""`spicerack.save`: a quantized module in memory -> a folder, through the same formats and writer as the loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from spicerack._version import __version__
from spicerack.errors import LoadError, OutputError, UsageError
from spicerack.nn.conv import QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.experts import ExpertStack
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.storage import format
from spicerack.storage.durable import json_bytes
from spicerack.storage.files import CONFIG, LEDGER
from spicerack.storage.format import StoredTensor
from spicerack.storage.ledger import Entry, Ledger
from spicerack.storage.writer import Slot, Unit, Writer, plan_shards

_Layer = QLinear | QConv2d | QEmbedding
_Names = dict[str, str]


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
    layers = _quantized_layers(module)
    weights = _owners(module, layers)
    state, checkpoint_name = _state(module, weights)
    plan: dict[str, StoredTensor] = {}
    packed: dict[str, PackedWeight] = {}
    for path, weight in weights.items():
        name = checkpoint_name[_weight_of(path)].removesuffix(".weight")
        users = [layer for layer in layers.values() if layer.packed is weight]
        role, dtype = _strictest({_role(layer) for layer in users}), _source_dtype(path, weight)
        bias = any(not isinstance(layer, QEmbedding) and layer.bias is not None for layer in users)
        plan[name] = StoredTensor(name, weight.scheme, weight.shape, role, dtype, weight.transposed, bias)
        packed[name] = weight
    chosen = format.choose(plan)
    units = [Unit(p.module, tuple(Slot(n, *slot) for n, slot in chosen.layout(p).items())) for p in plan.values()]
    units += [Unit(name, (Slot(name, _dtype(name, t), tuple(t.shape)),)) for name, t in state.items()]
    linears = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]  # a tied head too
    floats = [checkpoint_name.get(_weight_of(path), _weight_of(path)).removesuffix(".weight") for path in linears]
    side = _side_files(module)
    side[CONFIG] = chosen.config(side.pop(CONFIG), plan, floats)
    identity = {
        "source": _fingerprint(packed, state, side),
        "format": chosen.name,
        "versions": {"spicerack": __version__, "torch": torch.__version__},
    }
    writer = Writer(target, plan_shards(units), identity)
    for shard in writer.pending():
        with writer.shard(shard) as out:
            for unit in shard.units:
                planned = plan.get(unit.source)
                if planned is None:
                    tensors = {unit.source: state[unit.source]}
                else:
                    tensors = chosen.encode(planned, packed[unit.source].qtensor())
                for name, tensor in tensors.items():
                    out.write(name, tensor.cpu())
                out.entries.append(_entry(unit, planned))
    if not writer.complete:
        ledger = Ledger(identity, writer.entries()).content()
        writer.finish({LEDGER: ledger, **{name: json_bytes(value) for name, value in side.items()}}, target, [])
    writer.seal()
    return target


# ---- what is in the module -------------------------------------------------------------------------------------------


def _quantized_layers(module: nn.Module) -> dict[str, _Layer]:
    """Path -> layer. Raises UsageError if there are none, or packed weights elsewhere."""
    modules = dict(module.named_modules())
    layers = {path: layer for path, layer in modules.items() if isinstance(layer, _Layer)}
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


def _owners(module: nn.Module, layers: Mapping[str, _Layer]) -> dict[str, PackedWeight]:
    """Path -> packed weight, each once: under the name that transformers would store it under."""
    aliases = _aliases(module)
    owners: dict[int, str] = {}
    for path in sorted(layers, key=lambda path: _weight_of(path) in aliases):
        owners.setdefault(id(layers[path].packed), path)
    return {path: layer.packed for path, layer in layers.items() if owners[id(layer.packed)] == path}


def _state(module: nn.Module, weights: Mapping[str, PackedWeight]) -> tuple[dict[str, torch.Tensor], _Names]:
    """(float tensors by their names in checkpoints, each once; parameter -> name in checkpoints, packed ones too)."""
    inside = tuple(f"{path}." for path, part in module.named_modules(remove_duplicate=False) if _is_packed(part))
    aliases = _aliases(module)
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    values: dict[str, Any] = module.state_dict(keep_vars=True)
    for name, tensor in sorted(values.items(), key=lambda item: item[0] in aliases):
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"{name} is a {type(tensor).__name__}: only tensors are stored", "keep it outside")
        if not name.startswith(inside) and id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    for path, weight in weights.items():
        state[_weight_of(path)] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    renamed = revert_weight_conversion(module, state) if isinstance(module, PreTrainedModel) else state
    names = {id(tensor): name for name, tensor in renamed.items()}
    known = {name: names[id(tensor)] for name, tensor in state.items() if id(tensor) in names}
    for path in weights:
        if _weight_of(path) not in known:
            raise LoadError(f"{path}: its name in checkpoints cannot be told", "quantize the model's folder instead")
    stored = {known[_weight_of(path)] for path in weights}
    return {name: tensor for name, tensor in renamed.items() if name not in stored}, known


def _is_packed(part: nn.Module) -> bool:
    return isinstance(part, PackedWeight)


def _aliases(module: nn.Module) -> set[str]:
    """Tied parameters that transformers does not store: it stores what they are tied to."""
    return set(module.all_tied_weights_keys) if isinstance(module, PreTrainedModel) else set()


def _weight_of(path: str) -> str:
    return f"{path}.weight"


def _role(layer: _Layer) -> str:
    if isinstance(layer, QConv2d):
        return "conv2d"
    if isinstance(layer, QEmbedding):
        return "embedding"
    return "conv1d" if layer.packed.transposed else "linear"


def _strictest(roles: set[str]) -> str:
    """Of a tied weight: a reader that knows no packed embeddings must not take it for a linear layer."""
    return next(role for role in ("embedding", "conv2d", "conv1d", "linear") if role in roles)


def _source_dtype(name: str, weight: PackedWeight) -> torch.dtype:
    """The float type whose scales these are: after a cast on loading it is not the layer's own.

    Raises UsageError if there is none.
    """
    scheme, scale = weight.scheme, weight.qtensor().scale
    while isinstance(scale, QTensor):
        scheme, scale = scale.scheme, scale.scale
    kinds = (weight.dtype, torch.float32, torch.bfloat16)
    found = next((dtype for dtype in kinds if dtype_of(scheme.scale, dtype) == scale.dtype), None)
    if found is None:
        raise UsageError(
            f"{name}: its scales are {scale.dtype}, which {scheme} does not store",
            "copy the folder that it was loaded from",
        )
    return found


# ---- what is written -------------------------------------------------------------------------------------------------


def _dtype(name: str, tensor: torch.Tensor) -> str:
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
