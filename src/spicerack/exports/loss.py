"""What rounding again cost, in nats: the exported model against the folder that it was made from, on a text."""

from __future__ import annotations

from pathlib import Path

import torch

from spicerack.errors import TextError, UsageError
from spicerack.evaluation.evaluate import HELDOUT
from spicerack.evaluation.folder import window_of
from spicerack.evaluation.language import compare
from spicerack.models.inputs import limits
from spicerack.models.kind import kind_of
from spicerack.runtime.folder import Folder
from spicerack.runtime.load import load
from spicerack.text.tokenizer import read_tokenizer
from spicerack.text.windows import windows

_TOKENS = 16_384
"""Tokens that are read at most: the mean of as many is within a few per cent of that of more, and takes seconds for a
small model."""


def text_of(folder: Folder, text: str | Path | None) -> str | Path | None:
    """The text to measure on: the one that was given, or `heldout.txt` in the folder; None where there is none.

    Encoders have none: they are compared by embeddings, which `spicerack eval` does.
    """
    beside = folder.checkpoint.folder / HELDOUT
    chosen = text if text is not None else (beside if beside.is_file() else None)
    if chosen is None or not folder.config:
        return None
    return chosen if kind_of(dict(folder.config), folder.checkpoint.folder) == "decoder" else None


@torch.no_grad()
def added_kl(before: Path, after: Path, text: str | Path) -> float:
    """Mean KL of the predictions of the model at `after` from those of the one at `before`, in nats per token.

    Both are in memory. Raises TextError, LoadError, CheckpointError and UsageError.
    """
    reference, other = load(before), load(after)
    tokenizer = read_tokenizer(before, reference.config)
    window = window_of(None, limits(reference, reference.config), before)
    read = windows(text, tokenizer, window, _TOKENS)
    return float(compare(reference, other, read).kl_tokens.double().mean())


def measured(folder: Folder, after: Path, text: str | Path | None) -> float | None:
    """`added_kl` where there is a text; None where there is none, or where the engine's file is not loaded here.

    A text that was given and is of no use raises TextError; one that merely lies there does not.
    """
    chosen = text_of(folder, text)
    if chosen is None:
        return None
    try:
        return added_kl(folder.checkpoint.folder, after, chosen)
    except (TextError, UsageError):
        if text is not None:
            raise
        return None
