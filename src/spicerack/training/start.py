"""What a run starts from: a model folder, or a config.json and random weights; as it is, or as its BitNet twin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    BitNetForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spicerack.errors import CheckpointError, UsageError
from spicerack.models.inputs import limits_of
from spicerack.models.kind import kind_of
from spicerack.models.opening import open_stored
from spicerack.runtime import hf
from spicerack.runtime.load import load
from spicerack.storage import format
from spicerack.storage.files import MAX_CONFIG_BYTES, local, read_json
from spicerack.storage.reader import Checkpoint
from spicerack.text.tokenizer import read_tokenizer
from spicerack.training.qat import bitnet
from spicerack.training.qat.start import Stored

Twin = Literal["bitnet", "subln"]
"""bitnet: SubLN and squared ReLU, as BitNet b1.58 2B4T; subln: SubLN alone, nearer to the Llama that it comes from."""


@dataclass(frozen=True, slots=True)
class Start:
    """What is known of a model that is to be trained, before its weights are read.

    name        what it was called by whoever named it
    identity    what a resumed run must agree in: a hash of config and weights, or of the config alone
    dtype       float type that the model is stored in, bfloat16 where it is none of those that can be stored
    packed      whether it is quantized
    longest     positions that it has, None if without limit
    tokenizer   its own, or the one that was named for a config.json
    model       makes it, its floats in float32, in eval mode; random weights depend on torch's seed
    """

    name: str
    identity: str
    dtype: Stored
    packed: bool
    longest: int | None
    tokenizer: PreTrainedTokenizerBase
    model: Callable[[], PreTrainedModel]


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a model comes from.

    config     of the float model, as JSON
    built      the same as transformers' object, or that of the twin
    folder     of its tokenizer
    identity   what a resumed run must agree in
    packed     whether it is quantized
    model      makes it, as `Start.model`
    """

    config: Mapping[str, Any]
    built: PreTrainedConfig
    folder: Path
    identity: str
    packed: bool
    model: Callable[[], PreTrainedModel]


def find_start(model: str | Path, *, tokenizer: str | Path | None, twin: Twin | None) -> Start:
    """What training `model` would start from.

    model: a folder or hub id, or a config.json. tokenizer: a folder, for a config.json only; None: beside it. twin:
    which classes of BitNet take a Llama's place; None: none. Raises UsageError (an encoder, a tokenizer that does not
    fit, no twin), CheckpointError.
    """
    if twin not in (None, *get_args(Twin)):
        raise UsageError(f"there is no twin {twin!r}", f"one of {', '.join(get_args(Twin))}")
    path = local(model)
    if path.suffix == ".json":
        source = _from_config(path, twin)
    elif tokenizer is not None:
        raise UsageError("a model folder has its own tokenizer", "leave the tokenizer out")
    else:
        source = _from_folder(model, twin)
    if kind_of(source.config, source.folder) != "decoder":
        raise UsageError(f"{path} is no model that predicts tokens", "train it in a loop of your own, with prepare_qat")
    words = read_tokenizer(local(tokenizer) if tokenizer is not None else source.folder, source.built)
    size = source.built.get_text_config().vocab_size
    if len(words) > size:
        raise UsageError(f"the tokenizer has {len(words)} tokens, the model {size}", "use the model's own tokenizer")
    declared = str(source.built.dtype).removeprefix("torch.")
    return Start(
        name=str(model),
        identity=source.identity,
        dtype=next((dtype for dtype in get_args(Stored) if dtype == declared), "bfloat16"),
        packed=source.packed,
        longest=limits_of(source.config, source.built).positions,
        tokenizer=words,
        model=source.model,
    )


def find_teacher(model: str | Path, start: Start) -> Checkpoint:
    """The checkpoint of whoever predicts for the model that starts. Raises UsageError for one that is no model of the
    next token, or whose tokens have other numbers, and CheckpointError.

    A tokenizer may have tokens that the other has not. One without a tokenizer is taken at its word.
    """
    checkpoint = open_stored(model)
    fmt, folder = format.of_folder(checkpoint), checkpoint.folder
    config = checkpoint.config if fmt is None else fmt.float_config(checkpoint.config)
    if kind_of(config, folder) != "decoder":
        raise UsageError(f"the teacher {folder} is no model that predicts tokens", "name a language model")
    try:
        theirs = read_tokenizer(folder, hf.config_and_class(config, folder)[0]).get_vocab()
    except CheckpointError:
        return checkpoint
    ours = start.tokenizer.get_vocab()
    other = next((token for token, number in theirs.items() if ours.get(token, number) != number), None)
    if other is not None:
        raise UsageError(
            f"the teacher {folder} has another tokenizer: {other!r} is {theirs[other]} there, and {ours[other]} in "
            f"{start.name}",
            "a teacher must have the model's tokenizer and vocabulary",
        )
    return checkpoint


def _from_config(path: Path, twin: Twin | None) -> _Source:
    """The source of a config.json: random weights, made anew by each call of `model`, by torch's own seed.

    path: of the file; its tokenizer lies beside it, unless another is named. Raises CheckpointError for a file that is
    no config of a model that transformers knows.
    """
    config = read_json(path, MAX_CONFIG_BYTES)
    built, model_class = _classes(config, path.parent, twin)
    identity = hashlib.sha256(json.dumps([config, twin], sort_keys=True).encode()).hexdigest()

    def make() -> PreTrainedModel:
        # float(): a config may name bfloat16, in which small steps vanish
        model: PreTrainedModel = model_class(built).float().eval()
        return model

    return _Source(config, built, path.parent, identity, False, make)


def _from_folder(model: str | Path, twin: Twin | None) -> _Source:
    """The source of a folder or hub id, quantized or not; a twin keeps its weights, too, as far as it has a place for
    them.

    Raises UsageError for a twin of a quantized model, CheckpointError for a folder that is not read.
    """
    checkpoint = open_stored(model)
    fmt, folder = format.of_folder(checkpoint), checkpoint.folder
    config = checkpoint.config if fmt is None else fmt.float_config(checkpoint.config)
    if fmt is not None and twin is not None:
        raise UsageError(f"{folder} is quantized, and a twin is made of floats", "start from the float model")
    built, model_class = _classes(config, folder, twin)

    def make() -> PreTrainedModel:
        source = load(folder, dtype=torch.float32)
        return source if twin is None else _warm(model_class(built).eval(), source)

    identity = checkpoint.fingerprint() + (f" as {twin}" if twin else "")
    return _Source(config, built, folder, identity, fmt is not None, make)


def _classes(
    config: Mapping[str, Any], folder: Path, twin: Twin | None
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """transformers' config object and class for a config.json, or those of its twin."""
    built, model_class = hf.config_and_class(config, folder)
    if twin is None:
        return built, model_class
    if not isinstance(built, LlamaConfig):
        raise UsageError(f"{folder}: a {built.model_type} has no BitNet twin", "start from a Llama")
    return bitnet.twin_config(built, squared_relu=twin == "bitnet"), BitNetForCausalLM


def _warm(twin: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """`twin`, changed in place: with the weights of the Llama; its own norms stay at 1."""
    missing, unexpected = twin.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("sub_norm.weight") for name in missing), (missing, unexpected)
    return twin
