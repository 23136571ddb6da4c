"""GGUF: one file (or several, where asked) for llama.cpp, Ollama and LM Studio, with tokenizer and ledger inside.

Every packed tensor goes into the smallest of ggml's types that holds its numbers exactly; floats stay what they are,
but for those that llama.cpp reads in F32 alone, which loses nothing. Rows of llama's queries and keys get llama.cpp's
order, after quantization: bytes are moved and not made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spicerack.errors import CheckpointError
from spicerack.evaluation.folder import pooling_of
from spicerack.exports.source import Source
from spicerack.exports.target import Order
from spicerack.exports.targets import _gguf_plan as plans
from spicerack.exports.targets._gguf_plan import Facts, Model
from spicerack.models.gguf import config as configs
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.storage.format import Contents
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES, TensorSpec
from spicerack.storage.gguf.metadata import Entry
from spicerack.storage.gguf.writer import GgufWriter
from spicerack.text.gguf import gguf_of_tokenizer
from spicerack.text.tokenizer import read_tokenizer

_WORDS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
"""Files of a tokenizer, one of which a folder has that has a tokenizer."""


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
        return [
            f"{module}: {plans.nearest(stored)}" for module, stored in contents.items() if not plans.types_of(stored)
        ]

    def refusals(self, _to: str, source: Source, /) -> list[str]:
        """Families, configs, layers and tokenizers that llama.cpp has not; scales that float16 does not hold, for which
        they are read."""
        try:
            model = Model.of(source.config)
            reasons = configs.obstacles(model.family, model.config) + plans.packed_obstacles(
                model.names, source.contents
            )
            if not reasons:
                plans.plan(model, source)
                _tokens(source, model)
        except CheckpointError as error:
            return [error.message]
        return reasons or _inexact(source)

    def notes(self, _to: str, source: Source, /) -> list[str]:
        """What llama.cpp computes otherwise, and what of the model is left out."""
        model = Model.of(source.config)
        left_out = [name for name in source.folder.checkpoint.tensors if model.names.left_out(name)]
        notes = configs.notes(model.family, model.config)
        if left_out:
            notes.append(f"{left_out[0]} and {len(left_out) - 1} more are left out: llama.cpp has no use for them")
        return notes

    def write(self, source: Source, order: Order, /) -> None:
        """As `GgufWriter` does: what is read back has its name only then."""
        model = Model.of(source.config)
        planned, numbers = plans.plan(model, source), plans.numbers(model)
        facts = Facts(order.output.stem, _pooling(source, model), source.ledger, order.facts)
        metadata = plans.metadata(model, planned, _tokens(source, model, facts.name), facts)
        specs = [TensorSpec(name, TYPES["F32"], values.shape) for name, values in numbers.items()]
        specs += [spec for one in planned for spec in one.specs]
        with GgufWriter(order.output, metadata, specs, split_bytes=order.shard_bytes, check=order.check) as writer:
            for name, factors in numbers.items():
                writer.write(name, torch.from_numpy(factors.astype(np.float32)).view(torch.uint8))
            for one in planned:
                for spec, values in plans.raw(model, source, one):
                    writer.write(spec.name, values)


def _inexact(source: Source) -> list[str]:
    """Tensors whose scales a type does not hold although it holds their scheme: they are read, one at a time.

    Scales in float16 fit without a look.
    """
    reasons = []
    for module, stored in source.contents.items():
        if stored.source_dtype is torch.bfloat16 or stored.scheme.scale == "float32":
            inner, _ = blocks.without_tensor_scale(source.packed(module))
            reason = blocks.obstacle(plans.types_of(stored)[0], inner)
            if reason is not None:
                reasons.append(f"{module}: {reason}")
            source.release(stored)
    return reasons


def _has_words(source: Source) -> bool:
    """Whether the folder has a tokenizer, or the GGUF file."""
    checkpoint = source.folder.checkpoint
    return isinstance(checkpoint, GgufCheckpoint) or any(name in checkpoint.side_files for name in _WORDS)


def _tokens(source: Source, model: Model, name: str = "") -> dict[str, Entry]:
    """Keys of the tokenizer: a file's own as they are. Raises CheckpointError for one that llama.cpp has not.

    name: of the model, by which llama.cpp knows the white space of some.
    """
    checkpoint = source.folder.checkpoint
    if isinstance(checkpoint, GgufCheckpoint):
        return {key: value for key, value in checkpoint.metadata.items() if key.startswith("tokenizer.")}
    if not _has_words(source):
        raise CheckpointError("the folder has no tokenizer, without which llama.cpp runs no model", "add its files")
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model.family.model_type].from_dict(dict(model.config))
    words, rows = read_tokenizer(checkpoint.folder, config), int(model.config["vocab_size"])
    return gguf_of_tokenizer(words, rows, architecture=model.family.architecture, name=name)


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
