"""The folder that comes out of a run: written, read back, measured.

What is reported is measured on the bytes that were shipped, with the kernels that will run them: a simulation of them
would agree with itself.
"""

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
from spicerack.training.text import Subset


def ship(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write a frozen model, or a float one, and its tokenizer to `folder` -> what can be read there.

    model: a transformers model, packed where it is quantized. folder: what a run that was killed left in it is removed
    first. What comes back is loaded as any user would, so that what is measured on it is what was shipped.
    """
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
def loss_of(model: PreTrainedModel, held_out: Subset, batch: int, device: torch.device) -> float:
    """Cross-entropy of the held-out rows in nats a token, `batch` of them at once, in the model's own float type.

    The model is moved to the device, and stays there. Rows are of one length, so that the mean over rows is the mean
    over tokens.
    """
    nn.Module.to(model, device)
    total = 0.0
    for some in held_out.numbers.split(batch):
        ids = held_out.rows.ids(some.tolist()).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += len(some) * float(F.cross_entropy(logits.float(), ids[:, 1:].flatten()))
    return total / len(held_out)
