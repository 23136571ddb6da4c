"""The folder that comes out of a run: written, read back, measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.nn.weight import PackedWeight
from spicerack.runtime import hf
from spicerack.runtime.load import load
from spicerack.runtime.save import save
from spicerack.training.text import Rows


def ship(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write a frozen model, or a float one, and its tokenizer -> what can be read there."""
    shutil.rmtree(folder, ignore_errors=True)
    assert isinstance(model, PreTrainedModel)
    if any(isinstance(part, PackedWeight) for part in model.modules()):
        save(model, folder)
    else:
        with hf.quiet():
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(folder)


@torch.no_grad()
def loss_of(model: PreTrainedModel, held: tuple[Rows, torch.Tensor], batch: int, device: torch.device) -> float:
    """Cross-entropy of the held-out rows, nats a token, in the model's own type."""
    rows, numbers = held
    nn.Module.to(model, device)
    total = 0.0
    for some in numbers.split(batch):
        ids = rows.ids(some.tolist()).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += len(some) * float(F.cross_entropy(logits.float(), ids[:, 1:].flatten()))
    return total / len(numbers)
