"""What a loss looks like: passages of the text with the choices of both models, the worst and a typical one.

A passage is 24 tokens of one window. The worst has the largest mean KL of all, the typical one the median. Of each are
kept its tokens with their KL and both first choices, the five likeliest tokens of both models where its KL is largest,
and how both models go on behind it.

What is given up. Both models read the passage once more, with what stands before it in its window, and write a few
tokens, without a cache: some 3,000 tokens more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.evaluation.language import Comparison
from spicerack.machine.memory import settle

PASSAGE = 24
"""Tokens of a passage: a sentence of 18 English words."""
CONTEXT = 48
"""Tokens that are shown before it, and that both models go on from."""
CHOICES = 5
WRITTEN = 12
"""Tokens that both models write behind it."""
_DIGITS = 6


@torch.no_grad()
def of_language(
    reference: PreTrainedModel, other: PreTrainedModel, figures: Comparison, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The worst and a typical passage, as JSON has them.

    reference, other   the models that were compared, on whatever devices
    figures            of their comparison
    tokenizer          of both
    """
    length = figures.window - 1
    span = min(PASSAGE, length)
    kl = figures.kl_tokens.view(-1, length)
    means = kl[:, : length // span * span].reshape(-1, span).mean(dim=1)  # whole passages, of all windows
    ranked = means.argsort()
    chosen = {"worst": int(ranked[-1]), "typical": int(ranked[len(ranked) // 2])}
    each = length // span
    return [
        {"which": which, **_passage(reference, other, figures, tokenizer, number // each, number % each * span, span)}
        for which, number in chosen.items()
    ]


def _passage(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    figures: Comparison,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    begin: int,
    span: int,
) -> dict[str, Any]:
    """The predicted tokens begin .. begin + span of a window, counted from its second token."""
    ids = figures.ids[window].long()
    kl = figures.kl_tokens.view(-1, figures.window - 1)[window, begin : begin + span]
    before, tokens = ids[: begin + 1], ids[begin + 1 : begin + 1 + span]
    ours, theirs = (_probabilities(model, ids[: begin + 1 + span], span) for model in (reference, other))
    settle()

    def text(token: int) -> str:
        return str(tokenizer.decode([token]))

    worst = int(kl.argmax())
    rows = [
        {"text": text(int(t)), "kl": _short(float(k)), "original": text(int(a)), "small": text(int(b))}
        for t, k, a, b in zip(tokens, kl, ours.argmax(-1), theirs.argmax(-1), strict=True)
    ]
    shown = ids[: begin + 1 + span][-CONTEXT:]
    return {
        "kl": _short(float(kl.mean())),
        "before": str(tokenizer.decode(before[-CONTEXT:].tolist())),
        "tokens": rows,
        "at": worst,
        "original": _likeliest(ours[worst], text),
        "small": _likeliest(theirs[worst], text),
        "original_writes": str(tokenizer.decode(_written(reference, shown))),
        "small_writes": str(tokenizer.decode(_written(other, shown))),
    }


def _probabilities(model: PreTrainedModel, ids: torch.Tensor, span: int) -> torch.Tensor:
    """Of the last `span` tokens of ids [L], each given what stands before it: float64 [span, V]."""
    logits: torch.Tensor = model(input_ids=ids[None, :-1].to(model.device), use_cache=False).logits[0, -span:]
    return logits.cpu().double().softmax(-1)


def _likeliest(probabilities: torch.Tensor, text: Callable[[int], str]) -> list[dict[str, Any]]:
    """The tokens that a model finds likeliest, of probabilities [V]."""
    top = probabilities.topk(min(CHOICES, len(probabilities)))
    return [
        {"text": text(int(token)), "share": _short(float(p))}
        for p, token in zip(top.values, top.indices, strict=True)
    ]  # fmt: skip


def _written(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    """What a model writes behind ids [L], the likeliest token each time."""
    written: list[int] = []
    for _ in range(WRITTEN):
        given = torch.cat((ids, torch.tensor(written, dtype=ids.dtype, device="cpu")))
        written.append(int(model(input_ids=given[None].to(model.device), use_cache=False).logits[0, -1].argmax()))
    return written


def _short(value: float) -> float:
    """As many digits as are kept of a number that is only shown."""
    return float(f"{value:.{_DIGITS}g}")
