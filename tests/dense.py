"""The oracle of loading: the same quantized folder as a float model, its weights decoded by the specification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from spicerack.nn import attention
from spicerack.numerics import codec
from spicerack.storage import format
from spicerack.storage.reader import Checkpoint
from spicerack.storage.writer import LEDGER


def decoded_folder(quantized: Path, destination: Path) -> Path:
    """A float folder with what `quantized` stands for, written without the code under test."""
    checkpoint = Checkpoint.open(quantized)
    fmt = format.of_folder(checkpoint)
    assert fmt is not None
    ledger = json.loads((quantized / LEDGER).read_text())["tensors"]
    names = {entry["tensor"].removesuffix(".weight"): entry["tensor"] for entry in ledger}
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    for stored in fmt.contents(checkpoint).values():
        parts = {name: tensors.pop(name) for name in fmt.layout(stored)}
        tensors[names[stored.module]] = codec.decode(fmt.decode(stored, parts), stored.source_dtype).contiguous()
    shutil.copytree(quantized, destination, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    (destination / "config.json").write_text(json.dumps(fmt.float_config(checkpoint.config)))
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def decoded_model(model_class: type[PreTrainedModel], quantized: Path, destination: Path) -> PreTrainedModel:
    """transformers' own model with the decoded weights."""
    model: PreTrainedModel = model_class.from_pretrained(decoded_folder(quantized, destination))
    return model


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The model's first output, with torch's attention, whose sums come in the order of a float model's."""
    if model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation("sdpa")
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=ids)[0]
    return output
