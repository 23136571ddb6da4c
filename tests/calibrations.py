"""Models to calibrate, text for them, and what the solver was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solvers import gptq
from spicerack.text.calibration import Calibration


def text(count: int = 12, length: int = 24, padded: bool = False, vocabulary: int = 99) -> Calibration:
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[1:2, 9:] = mask[4:5, 3:] = False
    return made(ids, mask if padded else None)


def saved(family: str, folder: Path) -> Path:
    families.build(family).save_pretrained(folder)
    return folder


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Gram, pull and weight that GPTQ was given, in order; it changes nothing: all layers are rounded to nearest."""
    seen: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []

    def keep(w: torch.Tensor, start: Any, gram: torch.Tensor, pull: torch.Tensor | None = None) -> Any:
        seen.append((gram.double(), None if pull is None else pull.double(), w.double()))
        return Solved(start)

    monkeypatch.setattr(gptq, "solve", keep)
    return seen


def made(ids: torch.Tensor, mask: torch.Tensor | None) -> Calibration:
    return Calibration(ids, mask, "of no text", 0.0, "made up")
