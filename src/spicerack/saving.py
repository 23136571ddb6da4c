"""`spicerack.save`: a quantized module in memory -> a folder, through the same formats and the same writer as the loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from spicerack import __version__, format
from spicerack.checkpoint.writer import CONFIG, LEDGER, Slot, Unit, Writer, plan_shards, safetensors_dtype
from spicerack.errors import LoadError, OutputError, UsageError
from spicerack.format import Planned
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.linear import QLinear
from spicerack.nn.packed import PackedWeight


def save(module: nn.Module, folder: str | Path) -> Path:
    """Write a module with quantized layers; codes and scales are stored as they are, never rounded again -> the folder.

    A transformers model becomes an ordinary model folder (weights, config.json, generation_config.json; the tokenizer is
    saved by its own save_pretrained); `load(folder)` gives it back. Any other module becomes a folder for
    `load(folder, into=module)`. Raises UsageError (nothing quantized in it), OutputError, LoadError (a layer whose name
    in checkpoints cannot be told).
    """
    packed = {name: layer.packed for name, layer in module.named_modules() if isinstance(layer, (QLinear, QEmbedding))}
    if not packed:
        raise UsageError(f"{type(module).__name__} has no quantized layers", "use spicerack.quantize(module, scheme) first")
    names, floats = _checkpoint_names(module, packed)
    plan = {p.module: p for p in (_planned(names[name], module.get_submodule(name), packed[name]) for name in names)}
    config = json.loads(module.config.to_json_string(use_diff=False)) if isinstance(module, PreTrainedModel) else {}
    config.pop("quantization_config", None)
    chosen = format.choose(plan)
    unquantized = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]  # a tied head too
    layouts = {p.module: chosen.layout(p) for p in plan.values()}
    units = [Unit(m, tuple(Slot(n, dtype, shape) for n, (dtype, shape) in layout.items())) for m, layout in layouts.items()]
    units += [Unit(n, (Slot(n, safetensors_dtype(t.dtype), tuple(t.shape)),)) for n, t in floats.items()]
    identity = {"source": _fingerprint(packed, floats), "format": chosen.name, "versions": {"spicerack": __version__}}
    target = Path(folder)
    if target.exists():
        raise OutputError(f"{target} exists", "choose another folder")
    writer = Writer(target, plan_shards(units), identity)
    module_of = {names[name]: name for name in names}
    for shard in writer.pending():
        with writer.shard(shard) as out:
            for unit in shard.units:
                if unit.source in plan:
                    q = packed[module_of[unit.source]].qtensor()
                    for name, tensor in chosen.encode(plan[unit.source], q).items():
                        out.write(name, tensor.cpu())
                    out.entries.append({"tensor": unit.source, "action": "quantize", "scheme": q.scheme.name})
                else:
                    out.write(unit.source, floats[unit.source].cpu())
                    out.entries.append({"tensor": unit.source, "action": "copy", "scheme": None})
    files = {LEDGER: {"identity": identity, "tensors": writer.entries()}}
    if isinstance(module, PreTrainedModel) and module.can_generate():
        files["generation_config.json"] = json.loads(module.generation_config.to_json_string())
    files[CONFIG] = chosen.config(config, plan, unquantized)
    if not writer.complete:
        writer.finish({name: (json.dumps(value, indent=2) + "\n").encode() for name, value in files.items()}, target, [])
    writer.seal()
    return target


def _planned(name: str, layer: nn.Module, packed: PackedWeight) -> Planned:
    role = "embedding" if isinstance(layer, QEmbedding) else "conv1d" if packed.transposed else "linear"
    return Planned(name, packed.scheme, packed.shape, role, packed.dtype, packed.transposed)


def _checkpoint_names(
    module: nn.Module, packed: Mapping[str, PackedWeight]
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(module path -> name in checkpoints, for each quantized weight once; name in checkpoints -> float tensor, once)."""
    inside = tuple(f"{name}.packed." for name in packed)
    state: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if name.startswith(inside) or (tensor.numel() and key in seen):
            continue
        seen.add(key)
        state[name] = tensor
    stands_in = {}
    for name, weight in _once(packed):
        stands_in[name] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        state[f"{name}.weight"] = stands_in[name]
    if isinstance(module, PreTrainedModel):
        state = revert_weight_conversion(module, state)
    found = {id(tensor): name for name, tensor in state.items()}
    lost = [name for name, tensor in stands_in.items() if id(tensor) not in found]
    if lost:
        raise LoadError(f"{lost[0]}: its name in checkpoints cannot be told", "quantize the model's folder instead")
    names = {name: found[id(tensor)].removesuffix(".weight") for name, tensor in stands_in.items()}
    quantized = {f"{name}.weight" for name in names.values()}
    return names, {name: tensor for name, tensor in state.items() if name not in quantized}


def _once(packed: Mapping[str, PackedWeight]) -> Iterator[tuple[str, PackedWeight]]:
    seen: set[int] = set()
    for name, weight in packed.items():
        if id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight


def _fingerprint(packed: Mapping[str, PackedWeight], floats: Mapping[str, torch.Tensor]) -> str:
    """sha256 of everything that will be stored: a half-written folder is continued only for the very same weights."""
    digest = hashlib.sha256()
    parts: dict[str, Any] = {f"{n}.{key}": t for n, weight in packed.items() for key, t in weight.tensors.items()}
    for name, tensor in {**parts, **floats}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
