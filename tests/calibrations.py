"""Models to calibrate, text for them, and what the solver was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import torch

from spicerack.quantization.watch import Watch
from spicerack.text.calibration import Calibration


def text(count: int = 12, length: int = 24, padded: bool = False, vocabulary: int = 99) -> Calibration:
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[1:2, 9:] = mask[4:5, 3:] = False
    return made(ids, mask if padded else None)


def saved(family: str, folder: Path) -> Path:
    families.build(family).save_pretrained(folder)
    return folder


def uneven_llama(folder: Path) -> Path:
    """A Llama with a few channels of every norm 40 times as large, and the columns behind them a tenth."""
    model = families.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[[3, 17]] *= 40
                for reader in readers:
                    reader.weight[:, [3, 17]] /= 10
    model.save_pretrained(folder)
    return folder


def made(ids: torch.Tensor, mask: torch.Tensor | None) -> Calibration:
    return Calibration(ids, mask, "of no text", 0.0, "made up")


class Watching(Watch):
    """Calls what it is given, each where it is a Watch's to be called."""

    def __init__(self, *, finished: Any = None, tried: Any = None, stopping: Any = None, progress: Any = None) -> None:
        given = {"finished": finished, "tried": tried, "stopping": stopping, "progress": progress}
        vars(self).update({name: call for name, call in given.items() if call is not None})
