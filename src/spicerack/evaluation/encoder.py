"""How far an encoder's sentence embeddings moved: two models over the same sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.errors import SpicerackError, TextError, UsageError
from spicerack.evaluation.intervals import spearman

Progress = Callable[[float], None]
Pooling = Literal["mean", "cls", "max", "lasttoken"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "max", "lasttoken")
BATCH = 32
PAIRED_SENTENCES = 2000
"""Spearman's correlation is taken over the pairs of the first 2,000 sentences: two million of them."""
FEWEST = 3


@dataclass(frozen=True, slots=True)
class EncoderComparison:
    """What was measured. cosine float64 [sentences]: between the two models' embeddings of one sentence.

    spearman: rank correlation of the similarities of all pairs of sentences, as the two models see them; None if one
    model finds all pairs equally similar.
    """

    cosine: torch.Tensor = field(repr=False)
    spearman: float | None
    tokens: int
    unknown: int

    @property
    def mean(self) -> float:
        """Mean cosine."""
        return float(self.cosine.mean())

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that the tokenizer does not know."""
        return self.unknown / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """The figures under the names of the command line's contract."""
        return {
            "tokens": self.tokens,
            "sentences": len(self.cosine),
            "cosine_mean": self.mean,
            "cosine_min": float(self.cosine.min()),
            "spearman": self.spearman,
            "unknown_tokens": self.unknown_share,
        }


@torch.no_grad()
def compare(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Iterable[tuple[str, float]],
    *,
    pooling: Pooling = "mean",
    length: int = 512,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> EncoderComparison:
    """Embed (sentence, share of the text read so far) with both models; sentences are cut at `length` tokens.

    Stops after the batch that reaches `max_tokens`. Raises TextError for fewer than three sentences.
    """
    cosines: list[torch.Tensor] = []
    kept: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    count = tokens = unknown = 0
    for batch, fraction in _batches(sentences):
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ours, theirs = (embed(model, ids, mask, pooling) for model in (reference, other))
        if not bool(theirs.isfinite().all() and ours.isfinite().all()):
            raise SpicerackError(
                f"an embedding among sentences {count} to {count + len(batch) - 1} is not finite",
                "the model overflows in its own type: quantize from another float type",
            )
        cosines.append(F.cosine_similarity(ours, theirs))
        room = max(PAIRED_SENTENCES - count, 0)
        kept[0].append(ours[:room])
        kept[1].append(theirs[:room])
        count += len(batch)
        real = mask.bool()
        tokens += int(real.sum())
        if tokenizer.unk_token_id is not None:
            unknown += int((ids[real] == tokenizer.unk_token_id).sum())
        if progress is not None:
            progress(fraction)
        if max_tokens is not None and tokens >= max_tokens:
            break
    if count < FEWEST:
        raise TextError(f"{count} sentences are too few to compare their pairs", f"give at least {FEWEST}, one a line")
    similarities = [_pair_similarities(torch.cat(vectors)) for vectors in kept]
    return EncoderComparison(torch.cat(cosines), spearman(*similarities), tokens, unknown)


def embed(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pooled hidden states [B, H] (float64, on the CPU) of `ids` [B, L], where `mask` [B, L] marks the real tokens."""
    body = model.base_model
    hidden = body(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
    return pool(hidden.cpu().double(), mask, pooling)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector a sentence [B, H] from `hidden` [B, L, H]; padding, wherever it stands, does not count."""
    real = mask.bool()
    first = real.int().argmax(dim=1)
    last = real.shape[1] - 1 - real.flip(1).int().argmax(dim=1)
    rows = torch.arange(len(hidden))
    match pooling:
        case "mean":
            return hidden.where(real[..., None], 0.0).sum(dim=1) / real.sum(dim=1, keepdim=True)
        case "max":
            return hidden.where(real[..., None], -torch.inf).amax(dim=1)
        case "cls":
            return hidden[rows, first]
        case "lasttoken":
            return hidden[rows, last]


def check_pooling(name: str) -> Pooling:
    """The pooling called `name`. Raises UsageError."""
    for known in POOLINGS:
        if name == known:
            return known
    raise UsageError(f"pooling {name!r} is not one of {', '.join(POOLINGS)}", "compare the folders in their framework")


def _pair_similarities(vectors: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every pair i < j of `vectors` [n, H] -> [n (n - 1) / 2]."""
    unit = F.normalize(vectors, dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[i, j]


def _batches(sentences: Iterable[tuple[str, float]]) -> Iterator[tuple[list[str], float]]:
    source = iter(sentences)
    while batch := list(islice(source, BATCH)):
        yield [text for text, _ in batch], batch[-1][1]
