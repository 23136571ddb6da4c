"""`spicerack.save`: a quantized module in memory -> a folder, by the formats and the writer that folders have.

`parts_of` takes the module apart; here shards are written one by one. Packed codes and scales go to the disk as they
are: nothing is decoded, and nothing is rounded again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from spicerack._version import __version__
from spicerack.arguments import checked
from spicerack.errors import OutputError
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.runtime.parts import parts_of
from spicerack.storage.durable import json_bytes
from spicerack.storage.files import LEDGER, local
from spicerack.storage.format import StoredTensor
from spicerack.storage.ledger import Entry, Ledger
from spicerack.storage.writer import OutputTensor, Unit, Writer, refuse_place, shards_of


@checked
def save(module: nn.Module, folder: str | Path) -> Path:
    """Write a module with quantized layers; codes and scales are stored as they are, never rounded again -> the folder.

    A transformers model becomes an ordinary model folder (weights, config.json, generation_config.json; a tokenizer is
    saved by its own save_pretrained); `load(folder)` gives it back. Any other module becomes a folder for
    `load(folder, into=module)`. Killed anywhere, it leaves `folder.partial`, which the same call completes and no other
    continues. Raises UsageError (nothing quantized in it, or what no folder can hold), OutputError, LoadError (a layer
    whose name in checkpoints cannot be told).
    """
    target = local(folder)
    refuse_place(target)
    if target.exists():
        raise OutputError(f"{target} exists", "choose another folder, or remove it")
    parts = parts_of(module)
    identity = {  # what must agree for a save that was killed to be continued
        "source": parts.fingerprint(),
        "format": parts.format.name,
        "versions": {"spicerack": __version__, "torch": torch.__version__},
    }
    writer = Writer(target, shards_of(parts.units()), identity)
    for shard in writer.pending():
        with writer.shard(shard) as out:
            for unit in shard.units:
                for name, tensor in parts.tensors(unit).items():
                    out.write(name, tensor.cpu())
                out.entries.append(_entry(unit, parts.contents.get(unit.source)))
    if not writer.complete:
        ledger = Ledger(identity, writer.entries()).content()
        files = {name: json_bytes(value) for name, value in parts.files.items()}
        writer.finish({LEDGER: ledger, **files}, target, [])
    writer.seal()
    return target


def _entry(unit: Unit, stored: StoredTensor | None) -> Entry:
    """A tensor's line in the ledger; what only quantizing knows, such as the error, is not there.

    unit: what is written of it. stored: how it is packed; None for a float tensor.
    """
    first = unit.tensors[0]
    if stored is None:
        shape, dtype, before = first.shape, first.dtype, unit.nbytes
    else:
        shape = stored.float_shape
        dtype = safetensors_dtype(stored.source_dtype)
        before = OutputTensor(unit.source, dtype, shape).nbytes
    return Entry(
        tensor=unit.source if stored is None else f"{unit.source}.weight",
        action="copy" if stored is None else "quantize",
        why="as it was in the module",
        layer_type=unit.source,
        scheme=None if stored is None else stored.scheme.name,
        dtype=dtype,
        shape=shape,
        bytes_before=before,
        bytes_after=unit.nbytes,
    )
