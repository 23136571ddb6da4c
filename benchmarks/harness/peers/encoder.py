"""all-MiniLM-L6-v2 as every peer runs it: token numbers and mask in, hidden states out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig

import spicerack
from benchmarks.harness.peers.layer import Prepared, timed
from spicerack.evaluation.encoder import pool
from spicerack.evaluation.sentences import SENTENCES
from spicerack.text.tokenizer import read_tokenizer

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], torch.Tensor]
"""ids, mask [B, L] -> hidden states [B, L, H]."""
BATCHES = ((1, 16), (1, 128), (32, 128))
"""Sentences x tokens, without padding."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """folder: the float model. scratch: for what is made from it. engine: of spicerack, as in load."""

    folder: Path
    scratch: Path
    threads: int
    engine: str | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        return tuple(f"{batch}x{length}" for batch, length in BATCHES)

    def sentences(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """ids and mask of the built-in sentences, in padded batches of 16."""
        tokenizer = read_tokenizer(self.folder, AutoConfig.from_pretrained(self.folder))
        for i in range(0, len(SENTENCES), 16):
            inputs = tokenizer(list(SENTENCES[i : i + 16]), padding=True, truncation=True, max_length=128)
            yield np.array(inputs["input_ids"], np.int64), np.array(inputs["attention_mask"], np.int64)

    def prepared(self, run: Run) -> Prepared:
        """A turn: seconds a batch, for each of BATCHES. embeddings: float64 [sentences, H], of the built-in ones."""
        parts = [pool(run(ids, mask).double(), torch.from_numpy(mask), "mean") for ids, mask in self.sentences()]
        random = np.random.default_rng(0)
        batches = [random.integers(1000, 30000, size) for size in BATCHES]

        def turn() -> dict[str, float]:
            taken = [timed(lambda ids=ids: run(ids, np.ones_like(ids))) for ids in batches]  # type: ignore[misc]
            return dict(zip(self.figures, taken, strict=True))

        turn()
        return Prepared(turn, {"embeddings": torch.cat(parts).numpy()})


class Hidden(nn.Module):
    """The float32 model with the two inputs and the one output that exporters shall see."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = spicerack.load(folder, dtype=torch.float32)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs to trace with: a padded batch of two."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 12:] = 0
    return torch.full((2, 24), 2000), mask


def in_torch(model: Any) -> Run:
    """Run a transformers model."""

    @torch.no_grad()
    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> torch.Tensor:
        hidden: torch.Tensor = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).last_hidden_state
        return hidden

    return run


def export(folder: Path, path: Path) -> None:
    """Write the float32 model to `path` as ONNX, any batch and length."""
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Hidden(folder).eval(), example(), str(path), dynamo=True, input_names=["ids", "mask"],
            output_names=["hidden"], dynamic_shapes=(axes, axes), external_data=False, verbose=False,
        )  # fmt: skip
