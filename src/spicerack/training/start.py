"""What a run starts from: a model folder, or a config.json and random weights; as it is, or as its BitNet twin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import (
    BitNetForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spicerack.errors import UsageError
from spicerack.models.kind import kind_of, positions
from spicerack.runtime import hf
from spicerack.runtime.load import load
from spicerack.storage import format
from spicerack.storage.files import MAX_CONFIG_BYTES, read_json
from spicerack.storage.reader import Checkpoint
from spicerack.text import tokenizer as tokenizing
from spicerack.training.qat import bitnet
from spicerack.training.qat.start import Stored

Twin = Literal["bitnet", "subln"]
"""bitnet: SubLN and squared ReLU, as BitNet b1.58 2B4T; subln: SubLN alone, nearer to the Llama that it comes from."""


@dataclass(frozen=True, slots=True)
class Start:
    """identity: what a resumed run must agree in. dtype: that the model is stored in. packed: whether it is quantized.
    longest: positions that it has, None if without limit. model: makes it, its floats in float32, in eval mode."""

    identity: str
    dtype: Stored
    packed: bool
    longest: int | None
    tokenizer: PreTrainedTokenizerBase
    model: Callable[[], PreTrainedModel]


def find(model: str | Path, *, tokenizer: str | Path | None, twin: Twin | None) -> Start:
    """model: a folder or hub id, or a config.json. tokenizer: a folder; None: the model's own.

    Raises UsageError (an encoder, a tokenizer that does not fit, no twin), CheckpointError.
    """
    if twin not in (None, *get_args(Twin)):
        raise UsageError(f"there is no twin {twin!r}", f"one of {', '.join(get_args(Twin))}")
    path = Path(model)
    if path.suffix == ".json":
        config, folder, form = read_json(path, MAX_CONFIG_BYTES), path.parent, None
        built, model_class = _classes(config, folder, twin)
        digest = hashlib.sha256(json.dumps([config, twin], sort_keys=True).encode()).hexdigest()

        def make() -> PreTrainedModel:
            made: PreTrainedModel = model_class(built).float().eval()
            return made

    else:
        if tokenizer is not None:
            raise UsageError("a model folder has its own tokenizer", "leave --tokenizer out")
        checkpoint = Checkpoint.open(model)
        form, folder = format.of_folder(checkpoint), checkpoint.folder
        config = checkpoint.config if form is None else form.float_config(checkpoint.config)
        if form is not None and twin is not None:
            raise UsageError(f"{folder} is quantized, and a twin is made of floats", "start from the float model")
        built, model_class = _classes(config, folder, twin)
        digest = checkpoint.fingerprint() + (f" as {twin}" if twin else "")

        def make() -> PreTrainedModel:
            source = load(folder, dtype=torch.float32)
            return source if twin is None else _warm(model_class(built).eval(), source)

    if kind_of(config, folder) != "decoder":
        raise UsageError(f"{path} is no model that predicts tokens", "train it in a loop of your own, with prepare_qat")
    words = tokenizing.read(Path(tokenizer) if tokenizer is not None else folder, built)
    size = built.get_text_config().vocab_size
    if len(words) > size:
        raise UsageError(f"the tokenizer has {len(words)} tokens, the model {size}", "use the model's own tokenizer")
    declared = str(built.dtype).removeprefix("torch.")
    stored: Stored = next((dtype for dtype in get_args(Stored) if dtype == declared), "bfloat16")
    return Start(digest, stored, form is not None, positions(built), words, make)


def _classes(
    config: dict[str, object], folder: Path, twin: Twin | None
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    built, model_class = hf.config_and_class(config, folder)
    if twin is None:
        return built, model_class
    if not isinstance(built, LlamaConfig):
        raise UsageError(f"{folder}: a {built.model_type} has no BitNet twin", "start from a Llama")
    return bitnet.twin_config(built, squared_relu=twin == "bitnet"), BitNetForCausalLM


def _warm(twin: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """`twin` with the weights of the Llama; its own norms stay at 1."""
    missing, unexpected = twin.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("sub_norm.weight") for name in missing), (missing, unexpected)
    return twin
