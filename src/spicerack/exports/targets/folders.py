"""Folders of safetensors, in every format that there is one for: GPTQ, AWQ, MLX, bitnet, compressed-tensors and ours.

What a format lays out and says in config.json is the format's; here it is written, a tensor at a time. Readers of other
tools look for what transformers called things before version 5, so that config.json has both names.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spicerack import plugins
from spicerack._version import __version__
from spicerack.errors import OutputError
from spicerack.exports.source import Source
from spicerack.exports.target import Order
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.numerics.qtensor import QTensor
from spicerack.storage import engine as engines
from spicerack.storage import format as formats
from spicerack.storage.durable import NOTHING_LEFT, json_bytes
from spicerack.storage.files import CONFIG, LEDGER
from spicerack.storage.format import Contents, Format, StoredTensor
from spicerack.storage.ledger import Entry, Ledger
from spicerack.storage.reader import Checkpoint
from spicerack.storage.writer import (
    SHARD_BYTES,
    OutputTensor,
    Shard,
    ShardWriter,
    Unit,
    Writer,
    header_bytes,
    index_of,
    shards_of,
)
from spicerack.text.gguf import tokenizer_of_gguf

_OF_OTHERS = ("quantize_config.json", "quant_config.json")
"""What GPTQ's and AWQ's first tools wrote beside config.json: it says how the source was packed, and not what is
written."""
_TOKENS = "tokenizer."
"""How keys of a GGUF file begin that describe its tokenizer."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Every format that is a folder and has no target of its own. Methods: `exports.target.Target`."""

    floats: bool = False

    @property
    def names(self) -> Sequence[str]:
        """Those of the formats, as their projects write them."""
        own = plugins.names("exports.targets")
        return [fmt.name.replace("_", "-") for fmt in formats.ranked() if fmt.name not in own]

    def prepared(self, to: str, contents: Contents) -> Contents:
        """As the format lays them out."""
        return _format(to).prepared(contents)

    def obstacles(self, to: str, contents: Contents) -> list[str]:
        """Those of the format."""
        return _format(to).obstacles(contents)

    def refusals(self, to: str, source: Source) -> list[str]:
        """Families that no engine loads from such a folder: what transformers reads, others read by the same names."""
        family = source.config.get("model_type")
        reasons = [
            dict(way.refused).get(str(family)) for engine in engines.every() for way in engine.reads if way.to == to
        ]
        known = [reason for reason in reasons if reason is not None]
        return known if reasons and len(known) == len(reasons) else []

    def inexact(self, to: str, source: Source) -> list[str]:
        """None: types of scales are in the contents, and looked at there."""
        return []

    def notes(self, to: str, source: Source) -> list[str]:
        """Those of the format."""
        fmt = _format(to)
        return fmt.notes(source.contents, (), source.reading(fmt))

    def nbytes(self, source: Source, order: Order) -> int:
        """Of all files of the folder: headers and texts are made, no tensor is read."""
        out = _Out.of(source, order)
        units = (unit for shard in out.shards for unit in shard.units)
        entries = [entry for unit in units for entry in _told(source, _format(order.to), unit, out.before)]
        texts = [json_bytes(out.config), Ledger(out.identity, tuple(entries)).content()]
        texts += map(json_bytes, _format(order.to).beside(out.config).values())
        if len(out.shards) > 1:
            texts.append(json_bytes(index_of(out.shards)))
        with _beside(source.folder.checkpoint) as (folder, names):
            side = sum((folder / name).stat().st_size for name in names)
        tensors = sum(len(header_bytes(shard)) + sum(unit.nbytes for unit in shard.units) for shard in out.shards)
        return tensors + sum(map(len, texts)) + side

    def write(self, source: Source, order: Order) -> None:
        """Shards, config.json and ledger in `OUT.partial`, which is read back and becomes OUT by one rename."""
        out = _Out.of(source, order)
        with _beside(source.folder.checkpoint) as (folder, names):
            side = sum((folder / name).stat().st_size for name in names)
            writer = Writer(order.output, out.shards, out.identity, side, lasting=False)
            try:
                for shard in writer.pending():
                    with writer.shard(shard) as file:
                        for unit in shard.units:
                            _write(source, _format(order.to), unit, file)
                            file.entries += _told(source, _format(order.to), unit, out.before)
                beside = {name: json_bytes(value) for name, value in _format(order.to).beside(out.config).items()}
                files = {LEDGER: Ledger(out.identity, writer.entries()).content(), **beside}
                files[CONFIG] = json_bytes(out.config)
                writer.finish(files, folder, names)
                order.check(writer.partial)
                writer.seal()
            except BaseException:  # whatever ended it, the next run begins anew: writing is cheap, continuing is not
                writer.discard()
                shutil.rmtree(writer.partial, ignore_errors=True)  # one that an earlier run left, too
                raise


@contextmanager
def _beside(checkpoint: Checkpoint) -> Iterator[tuple[Path, Sequence[str]]]:
    """What lies beside the weights: a folder, and the names of files in it; of a GGUF file its tokenizer, as a folder
    has it.

    Raises CheckpointError for a tokenizer that cannot be had so, OutputError where its files cannot be written.
    """
    if not isinstance(checkpoint, GgufCheckpoint) or not any(key.startswith(_TOKENS) for key in checkpoint.metadata):
        yield checkpoint.folder, [name for name in checkpoint.side_files if name not in _OF_OTHERS]
        return
    tokenizer = tokenizer_of_gguf(checkpoint.metadata)
    with tempfile.TemporaryDirectory() as place:
        try:
            tokenizer.save_pretrained(place, save_jinja_files=False)
        except Exception as error:  # tokenizers has no narrower one for a disk that is full
            raise OutputError(f"the tokenizer's files could not be written: {error}", NOTHING_LEFT) from error
        files = (path for path in Path(place).rglob("*") if path.is_file())
        yield Path(place), sorted(path.relative_to(place).as_posix() for path in files)


@dataclass(frozen=True, slots=True)
class _Out:
    """A folder before it is written: everything but the tensors.

    config    config.json
    identity  of the ledger
    shards    its files
    before    tensor -> what the source's ledger says of it
    """

    config: Mapping[str, Any]
    identity: dict[str, Any]
    shards: tuple[Shard, ...]
    before: Mapping[str, Entry]

    @classmethod
    def of(cls, source: Source, order: Order) -> _Out:
        """Of a source that the format has no obstacles to."""
        fmt = _format(order.to)
        config = fmt.config(source.config, source.contents, source.reading(fmt))
        return cls(
            with_old_names(config) if fmt.read_by_others else config,
            _identity(source, fmt, order),
            shards_of(list(_units(source, fmt)), order.shard_bytes or SHARD_BYTES),
            {entry.tensor: entry for entry in source.ledger.entries} if source.ledger else {},
        )


def _format(to: str) -> Format:
    """The format that `--to` calls so."""
    return formats.get(to.replace("-", "_"))


def _identity(source: Source, fmt: Format, order: Order) -> dict[str, Any]:
    """What the ledger says of the folder's origin: what the source's says, and that it was exported."""
    origin = dict(source.ledger.identity) if source.ledger else {"source": source.folder.checkpoint.fingerprint()}
    return {**origin, "format": fmt.name, "exported": {**order.facts, "spicerack": __version__}}


def _units(source: Source, fmt: Format) -> Iterator[Unit]:
    """What is written at a time, in the order of the disk that it is read from; a stack where its first module lies."""
    stack_of = {module: stack for stack, modules in fmt.stacks(source.contents).items() for module in modules}
    counts = Counter(stack_of.values())
    for tensor in source.order():
        if not isinstance(tensor, StoredTensor):
            yield Unit(tensor.name, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),))
            continue
        layout, stack = fmt.layout(tensor), stack_of.get(tensor.module)
        if stack is None:
            yield Unit(tensor.module, tuple(OutputTensor(name, *header) for name, header in layout.items()))
        elif count := counts.pop(stack, 0):
            renamed = {name.replace(tensor.module, stack): header for name, header in layout.items()}
            yield Unit(stack, tuple(OutputTensor(name, of, (count, *shape)) for name, (of, shape) in renamed.items()))


def _modules(source: Source, fmt: Format, unit: Unit) -> Sequence[str]:
    """The packed modules of a unit; none of a float."""
    if unit.source in source.contents:
        return [unit.source]
    return fmt.stacks(source.contents).get(unit.source, ())


def _write(source: Source, fmt: Format, unit: Unit, out: ShardWriter) -> None:
    """One tensor, packed or float, or a stack."""
    modules = _modules(source, fmt, unit)
    if not modules:
        info = source.floats[unit.source]
        out.write(info.name, source.float(info.name))
        source.release(info)
        return
    encoded = [list(_encoded(source, fmt, source.contents[module]).values()) for module in modules]
    for number, promised in enumerate(unit.tensors):
        parts = [tensors[number] for tensors in encoded]
        # words have a type of which torch stacks nothing
        stacked = torch.stack([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])
        out.write(promised.name, stacked.view(parts[0].dtype).reshape(promised.shape))
    for module in modules:
        source.release(source.contents[module])


def _told(source: Source, fmt: Format, unit: Unit, before: Mapping[str, Entry]) -> list[Entry]:
    """The ledger's lines of what a unit holds. before: what the source's ledger says of its tensors."""
    if modules := _modules(source, fmt, unit):
        nbytes = unit.nbytes // len(modules)
        return [_entry(source, source.contents[m], nbytes, before.get(f"{m}.weight")) for m in modules]
    info = source.floats[unit.source]
    fresh = Entry(info.name, "copy", "as it was in the source", info.name, None, info.dtype, info.shape, info.nbytes,
                  info.nbytes)  # fmt: skip
    return [replace(before.get(info.name, fresh), bytes_after=info.nbytes)]


def _encoded(source: Source, fmt: Format, stored: StoredTensor) -> Mapping[str, torch.Tensor]:
    """The tensors of a packed one, of words as they lie in the source where the format has such."""
    q = source.either(stored.module)
    if isinstance(q, QTensor):
        return fmt.encode(stored, q)
    relaid = fmt.relaid(stored, q) if stored.scheme.plain_obstacle is None else None
    return fmt.encode(stored, q.qtensor()) if relaid is None else relaid


def _entry(source: Source, stored: StoredTensor, nbytes: int, before: Entry | None) -> Entry:
    """The ledger's line of a packed tensor: what was told of it, and what the export made of it."""
    given = source.folder.contents[stored.module]
    events = () if given.scheme == stored.scheme else (f"{given.scheme} in the source, said in {stored.scheme}",)
    if before is not None:
        return replace(before, scheme=stored.scheme.name, bytes_after=nbytes, events=(*before.events, *events))
    info = source.described.tensors[f"{stored.module}.weight"]
    return Entry(info.name, "quantize", "as it was in the source", stored.module, stored.scheme.name, info.dtype,
                 info.shape, info.nbytes, nbytes, events=events)  # fmt: skip


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers 5 calls otherwise under the old names, too; configs in it as well.

    `dtype` is `torch_dtype`; `num_local_experts` are `num_experts`; `rope_parameters` are `rope_theta`,
    `partial_rotary_factor` and, where frequencies are scaled, `rope_scaling`; of families with two kinds of attention,
    the sliding one's base is `rope_local_base_freq`.
    """
    new = {key: with_old_names(value) if key.endswith("_config") and isinstance(value, dict) and key
           != "quantization_config" else value for key, value in config.items()}  # fmt: skip
    old: dict[str, Any] = {}
    if "num_local_experts" in new and "num_experts" not in new:
        old["num_experts"] = new["num_local_experts"]
    if isinstance(new.get("dtype"), str):
        old["torch_dtype"] = new["dtype"]
    rope = new.get("rope_parameters")
    if isinstance(rope, dict):
        full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
        if isinstance(full, dict) and isinstance(sliding, dict):
            old["rope_local_base_freq"] = sliding.get("rope_theta")
            rope = full
        old |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type", "default") != "default":
            old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**{key: value for key, value in old.items() if value is not None}, **new}


TARGET = Folders()
