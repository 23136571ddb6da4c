"""How far an encoder's sentence embeddings moved: two models over the same sentences.

    cosine      between the two models' embeddings of one sentence: 1 if it did not turn
    Spearman    do all pairs of sentences rank alike in similarity, as the two models see them?

The second is what a search uses: a rotation of all embeddings at once changes every cosine of the first kind, and none
of the similarities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.errors import SpicerackError, TextError, UsageError
from spicerack.evaluation.intervals import Interval, mean_interval, spearman
from spicerack.machine.memory import steady
from spicerack.models.inputs import limits

Progress = Callable[[float], None]
Pooling = Literal["mean", "cls", "max", "lasttoken"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "max", "lasttoken")
"""How one vector of a sentence can be made of its tokens' hidden states: see `pool`."""
BATCH = 32
"""Sentences that are embedded at once."""
PAIRED_SENTENCES = 2000
"""Spearman's correlation is taken over the pairs of the first 2,000 sentences: two million of them."""
_MOVED = 3
"""Pairs that moved most which are kept."""
FEWEST = 3
"""Sentences: two have one pair, which cannot be ranked."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sentences, and how similar they are to the reference and to the other model.

    typical: whether it is the pair in the middle, and not one that moved most
    """

    a: str
    b: str
    before: float
    after: float
    typical: bool = False


@dataclass(frozen=True, slots=True)
class EncoderComparison:
    """What was measured, sentence by sentence.

    cosine     float64 [sentences]: between the two models' embeddings of one sentence
    spearman   rank correlation of the similarities of all pairs of sentences, as the two models see them; None if one
               model finds all pairs equally similar
    tokens     that were read, padding left out
    unknown    how many of them the tokenizer does not know
    moved      pairs of sentences whose similarity moved most, and one whose similarity moved as the median pair's did
    """

    cosine: torch.Tensor = field(repr=False)
    spearman: float | None
    tokens: int
    unknown: int
    moved: tuple[Pair, ...] = field(default=(), repr=False)

    @property
    def mean(self) -> float:
        """Mean cosine between the two models' embeddings of a sentence."""
        return float(self.cosine.mean())

    @property
    def cosine_interval(self) -> Interval:
        """The mean cosine with its 95 % interval over sentences, cut at 1."""
        return mean_interval(self.cosine).within(-1.0, 1.0)

    @property
    def least(self) -> float:
        """The cosine of the sentence that turned most."""
        return float(self.cosine.min())

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
            "cosine_mean_ci95": self.cosine_interval.ends,
            "cosine_min": self.least,
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
    """Embed sentences with both models, and compare the embeddings.

    reference, other   each on its own device, in its own float type
    tokenizer   of both
    sentences   each with the share of the text, 0 to 1, that has been read behind it
    pooling     how a sentence's vector is made of its tokens'
    length      tokens at which sentences are cut
    max_tokens  stop after the batch that reaches so many; None: read all
    progress    called behind each batch with the share that has been read

    Raises TextError for fewer than three sentences, UsageError for a token that `reference` has not, SpicerackError for
    embeddings that are not finite.
    """
    cosines, kept = list[torch.Tensor](), (list[torch.Tensor](), list[torch.Tensor]())
    texts: list[str] = []
    count = tokens = unknown = 0
    report = progress or (lambda _share: None)
    given = limits(reference, reference.config)
    for batch, fraction in steady(_batches(sentences)):
        ids, mask = tokens_of(tokenizer, batch, length)
        given.check_ids(ids)
        ours, theirs = (embed(model, ids, mask, pooling) for model in (reference, other))
        read = ids[mask.bool()]
        _check_finite(ours, theirs, count)
        cosines.append(F.cosine_similarity(ours, theirs))
        for vectors, some in zip(kept, (ours, theirs), strict=True):  # of those beyond, only the cosine is kept
            vectors.append(some[: max(PAIRED_SENTENCES - count, 0)])
        texts += batch[: max(PAIRED_SENTENCES - count, 0)]
        count, tokens, unknown = count + len(batch), tokens + len(read), unknown + _unknown(read, tokenizer)
        report(fraction)
        if max_tokens is not None and tokens >= max_tokens:
            break
    if count < FEWEST:
        raise TextError(f"{count} sentences are too few to compare their pairs", f"give at least {FEWEST}, one a line")
    ours, theirs = (_pair_similarities(torch.cat(vectors)) for vectors in kept)
    moved = _moved(texts, ours, theirs)
    return EncoderComparison(torch.cat(cosines), spearman(ours, theirs), tokens, unknown, moved)


def _moved(texts: Sequence[str], before: torch.Tensor, after: torch.Tensor) -> tuple[Pair, ...]:
    """The pairs that moved most, and the one in the middle. before, after: similarities of all pairs i < j."""
    i, j = torch.triu_indices(len(texts), len(texts), offset=1, device="cpu")
    ranked = (after - before).abs().argsort(descending=True)
    most = ranked[:_MOVED].tolist()
    middle = int(ranked[len(ranked) // 2])
    return tuple(
        Pair(texts[int(i[n])], texts[int(j[n])], float(before[n]), float(after[n]), typical)
        for n, typical in (*((n, False) for n in most), (middle, True))
    )


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, L] of some sentences, cut at `length` tokens, padded on the tokenizer's side.

    A tokenizer without a token to pad with pads with the first: what is masked is not looked at.
    """
    rows = tokenizer(list(batch), truncation=True, max_length=length, verbose=False).input_ids
    longest, left = max(map(len, rows)), tokenizer.padding_side == "left"
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id or 0, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64, device="cpu"), 1
    return ids, mask


def _unknown(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the tokens `ids` [n] stand for what the tokenizer does not know; 0 where it has no such token."""
    return 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())


def _check_finite(ours: torch.Tensor, theirs: torch.Tensor, before: int) -> None:
    """Raises SpicerackError for embeddings [B, H] that are NaN or infinite. before: sentences in front of them."""
    if not bool(theirs.isfinite().all() and ours.isfinite().all()):
        raise SpicerackError(
            f"an embedding among sentences {before} to {before + len(ours) - 1} is not finite",
            "the model overflows in its own type: quantize from another float type",
        )


def embed(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pooled hidden states [B, H] (float64, on the CPU) of `ids` [B, L], where `mask` [B, L] marks the real tokens."""
    body = model.base_model
    hidden = body(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
    return pool(hidden.cpu().double(), mask, pooling)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector a sentence [B, H] from `hidden` [B, L, H]; padding, where `mask` [B, L] is 0, does not count.

    mean and max are over the real tokens, cls is the first of them and lasttoken the last, whichever side is padded.
    """
    real = mask.bool()
    first = real.int().argmax(dim=1)
    last = real.shape[1] - 1 - real.flip(1).int().argmax(dim=1)
    rows = torch.arange(len(hidden), device="cpu")
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
    """The pooling called `name`. Raises UsageError for one that is not computed here."""
    for known in POOLINGS:
        if name == known:
            return known
    raise UsageError(f"pooling {name!r} is not one of {', '.join(POOLINGS)}", "compare the folders in their framework")


def _pair_similarities(vectors: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every pair i < j of `vectors` [n, H] -> [n (n - 1) / 2]."""
    unit = F.normalize(vectors, dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), offset=1, device="cpu")
    return (unit @ unit.T)[i, j]


def _batches(sentences: Iterable[tuple[str, float]]) -> Iterator[tuple[list[str], float]]:
    """Sentences in batches, each with the share of the text that has been read at its end."""
    source = iter(sentences)
    while batch := list(islice(source, BATCH)):
        yield [text for text, _ in batch], batch[-1][1]
