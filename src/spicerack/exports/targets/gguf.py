"""GGUF: one file (or several, where asked) for llama.cpp, Ollama and LM Studio, with tokenizer and ledger inside.

Every packed tensor goes into the smallest of ggml's types that holds its numbers exactly; floats stay what they are,
but for those that llama.cpp reads in F32 alone, which loses nothing. Rows of llama's queries and keys get llama.cpp's
order, after quantization: bytes are moved and not made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spicerack.errors import CheckpointError, listed
from spicerack.evaluation.folder import pooling_of
from spicerack.exports.source import Source
from spicerack.exports.target import Order
from spicerack.exports.targets import _gguf_plan as plans
from spicerack.exports.targets._gguf_plan import Facts, Model
from spicerack.models.gguf import config as configs
from spicerack.models.gguf import layers
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.storage.format import Contents
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES, TensorSpec
from spicerack.storage.gguf.metadata import Entry
from spicerack.storage.gguf.writer import GgufWriter, written_bytes
from spicerack.text.gguf.folder import Words, words_of


@dataclass(frozen=True, slots=True)
class Gguf:
    """See the module. Methods: `exports.target.Target`."""

    names: Sequence[str] = ("gguf",)
    floats: bool = True

    def prepared(self, _to: str, contents: Contents, /) -> Contents:
        """As they are: tensors are looked at one by one."""
        return contents

    def obstacles(self, _to: str, contents: Contents, /) -> list[str]:
        """Schemes and shapes that no type of ggml holds."""
        reasons = ((module, blocks.no_type(stored.scheme, stored.shape)) for module, stored in contents.items())
        return [f"{module}: {reason}" for module, reason in reasons if reason is not None]

    def refusals(self, _to: str, source: Source, /) -> list[str]:
        """Families, configs, layers and tokenizers that llama.cpp has not."""
        try:
            model = Model.of(source.config)
            reasons = configs.obstacles(model.family, model.config) + plans.packed_obstacles(
                model.names, source.contents
            )
            if not reasons:
                plans.plan(model, source)
                _words(source, model)
        except CheckpointError as error:
            return [error.message]
        return reasons

    def inexact(self, _to: str, source: Source, /) -> list[str]:
        """Scales that float16 does not hold."""
        return _inexact(source)

    def notes(self, _to: str, source: Source, /) -> list[str]:
        """What llama.cpp computes otherwise, and what of the model is left out."""
        model = Model.of(source.config)
        left_out = [name for name in source.folder.checkpoint.tensors if model.names.left_out(name)]
        notes = configs.notes(model.family, model.config)
        if left_out:
            notes.append(f"left out, because llama.cpp has no use for it: {listed(left_out, 1, 'tensors')}")
        return notes + [f"tokenizer: {line}" for line in _words(source, model).differences]

    def nbytes(self, source: Source, order: Order, /) -> int:
        """Of the file, or of all of them where it is split: headers are made, no tensor is read."""
        file = _File.of(source, order)
        return written_bytes(order.output, file.metadata, file.specs, order.shard_bytes)

    def write(self, source: Source, order: Order, /) -> None:
        """As `GgufWriter` does: what is read back has its name only then."""
        file, model = _File.of(source, order), Model.of(source.config)
        with GgufWriter(
            order.output, file.metadata, file.specs, split_bytes=order.shard_bytes, check=order.check
        ) as writer:
            for name, factors in file.numbers.items():
                writer.write(name, torch.from_numpy(factors.astype(np.float32)).view(torch.uint8))
            shared = plans.Shared()
            for one in file.planned:
                for spec, values in plans.raw(model, source, one, shared):
                    writer.write(spec.name, values)


@dataclass(frozen=True, slots=True)
class _File:
    """What a file will hold: its keys, its table, and what the tensors are made of."""

    metadata: Mapping[str, Entry]
    specs: Sequence[TensorSpec]
    numbers: Mapping[str, np.ndarray[Any, Any]]
    planned: Sequence[plans.Planned]

    @classmethod
    def of(cls, source: Source, order: Order) -> _File:
        """Of a source without `refusals`."""
        model = Model.of(source.config)
        planned, numbers = plans.plan(model, source), plans.numbers(model)
        facts = Facts(order.output.stem, _pooling(source, model), source.ledger, order.facts)
        metadata = plans.metadata(model, planned, _words(source, model, facts.name).entries, facts)
        specs = [TensorSpec(name, TYPES["F32"], values.shape) for name, values in numbers.items()]
        return cls(metadata, [*specs, *(spec for one in planned for spec in one.specs)], numbers, planned)


def _inexact(source: Source) -> list[str]:
    """Tensors whose scales a type does not hold although it holds their scheme: they are read, one at a time.

    Scales in float16 fit without a look.
    """
    reasons = []
    for module, stored in source.contents.items():
        if stored.scheme.scale == "float8_e8m0fnu":  # powers of two are bytes there, too
            continue
        if stored.source_dtype is torch.bfloat16 or stored.scheme.scale == "float32":
            matrices = source.matrices(module) if len(stored.shape) > 2 else iter((source.either(module),))
            inner = (blocks.without_tensor_scale(q)[0] for q in matrices)
            obstacles = (blocks.obstacle(layers.types_of(stored)[0], q) for q in inner)
            if (reason := next(filter(None, obstacles), None)) is not None:
                reasons.append(f"{module}: {reason}")
            source.release(stored)
    return reasons


def _words(source: Source, model: Model, name: str = "") -> Words:
    """The tokenizer. Raises CheckpointError for one that llama.cpp has not. name: of the model in the file."""
    return words_of(source.folder.checkpoint, model.family, model.config, name)


def _pooling(source: Source, model: Model) -> str | None:
    """How an encoder's tokens become one vector, where files say it and llama.cpp has it."""
    checkpoint = source.folder.checkpoint
    if not model.family.encoder:
        return None
    if isinstance(checkpoint, GgufCheckpoint):
        return configs.pooling(checkpoint.metadata, checkpoint.family)
    pooling = pooling_of(checkpoint.folder)
    return pooling if pooling in configs.POOLINGS else None


TARGET = Gguf()
