"""How far a language model's predictions moved: two models over the same windows of text.

With p the reference's and q the other's distribution of the next token, at every position of every window:

    KL          sum_v p(v) (log p(v) - log q(v))          nats per token
    perplexity  exp(mean of -log p(next token))
    agreement   share of positions where both have the same most likely token

Tokens of one window depend on each other, so intervals are taken over the means of windows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from spicerack.errors import SpicerackError, TextError, UsageError
from spicerack.evaluation.intervals import Interval, mean_interval
from spicerack.evaluation.logits import chunk_positions, logits, logits_through_cache
from spicerack.text.pieces import Window

Progress = Callable[[float], None]
_NO_FLOAT64 = ("mps",)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured, window by window. A window of L tokens predicts L - 1.

    kl, nll, nll_reference float64 [windows]: means over the window's tokens; agreed int64 [windows]: tokens;
    kl_tokens float32 [tokens]; text: hash of the token ids.
    """

    window: int
    kl: torch.Tensor
    nll: torch.Tensor
    nll_reference: torch.Tensor
    agreed: torch.Tensor
    kl_tokens: torch.Tensor = field(repr=False)
    unknown: int
    text: str

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return len(self.kl_tokens)

    @property
    def mean(self) -> float:
        """Mean KL in nats per token."""
        return float(self.kl.mean())

    @property
    def unknown_share(self) -> float:
        """Share of the text's tokens that the tokenizer does not know."""
        return self.unknown / (len(self.kl) * self.window)

    def as_dict(self) -> dict[str, Any]:
        """The figures under the names of the command line's contract."""
        kl = mean_interval(self.kl)
        return {
            "tokens": self.tokens,
            "windows": len(self.kl),
            "window": self.window,
            "perplexity": math.exp(float(self.nll.mean())),
            "perplexity_reference": math.exp(float(self.nll_reference.mean())),
            "kl_mean": kl.mean,
            "kl_mean_ci95": None if kl.lo is None else [kl.lo, kl.hi],
            "kl_p999": float(np.quantile(self.kl_tokens.numpy(), 0.999)),
            "top1_agreement": int(self.agreed.sum()) / self.tokens,
            "unknown_tokens": self.unknown_share,
        }


def compare(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    windows: Iterable[Window],
    *,
    progress: Progress | None = None,
    positions: int | None = None,
    step: int | None = None,
) -> Comparison:
    """Run both models over `windows`, all of the same length.

    positions: how many positions' logits are held at once; None: what the vocabulary allows. step: `other` reads so
    many tokens at a time, through its cache; None: a window at once, without. Raises TextError without a window,
    UsageError if a vocabulary does not fit the text or the other model's, SpicerackError if a model's logits are not
    finite.
    """
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    digest = hashlib.sha256()
    unknown = length = 0
    for number, window in enumerate(windows):
        ids = window.ids[None]
        length = ids.shape[1]
        _check_ids(reference, window.ids)
        digest.update(window.ids.numpy().tobytes())
        unknown += window.unknown
        row = _window(reference, other, ids, positions or _positions(reference), step)
        for name, nll in (("reference", row[2]), ("quantized", row[1]), ("quantized", row[0])):
            if not bool(nll.isfinite().all()):
                raise SpicerackError(
                    f"window {number}: the {name} model's logits are not finite",
                    "it overflows in its own type: quantize from another float type, or skip the layers with outliers",
                )
        rows.append(row)
        if progress is not None:
            progress(window.fraction)
    if not rows:
        raise TextError("there is no window to evaluate", "give a longer text")
    kl, nll, nll_reference, agreed = (torch.stack(column) for column in zip(*rows, strict=True))
    return Comparison(
        window=length,
        kl=kl.mean(dim=1),
        nll=nll.mean(dim=1),
        nll_reference=nll_reference.mean(dim=1),
        agreed=agreed.sum(dim=1),
        kl_tokens=kl.float().flatten(),
        unknown=unknown,
        text=digest.hexdigest(),
    )


def paired_difference(a: Comparison, b: Comparison) -> Interval:
    """Mean KL of `a` minus that of `b`, in nats per token, with the 95 % interval over windows, paired.

    Pairing takes the text's own variation out: both were measured on the same windows against the same reference.
    Raises UsageError if they were not.
    """
    if (a.text, a.window) != (b.text, b.window) or not torch.equal(a.nll_reference, b.nll_reference):
        raise UsageError("the evaluations are of different text or references", "use the same text, window and model")
    return mean_interval(a.kl - b.kl)


def _positions(model: PreTrainedModel) -> int:
    return chunk_positions(int(model.config.get_text_config().vocab_size))


def _check_ids(model: PreTrainedModel, ids: torch.Tensor) -> None:
    vocabulary, highest = int(model.config.get_text_config().vocab_size), int(ids.max())
    if highest >= vocabulary:
        raise UsageError(
            f"the tokenizer makes token {highest}, but the model's vocabulary has {vocabulary} entries",
            "is it the model's own tokenizer?",
        )


@torch.no_grad()
def _window(
    reference: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor, positions: int, step: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """kl, nll, nll_reference (float64 [L - 1]) and agreement (bool [L - 1]) of one window `ids` [1, L]."""
    following = ids[0, 1:]
    parts = []
    begin = 0
    theirs_ids = ids.to(other.device)
    pairs = zip(
        logits(reference, ids.to(reference.device), positions),
        logits_through_cache(other, theirs_ids, positions, step) if step else logits(other, theirs_ids, positions),
        strict=True,
    )
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise UsageError(
                f"the models' vocabularies differ: {ours.shape[-1]} and {theirs.shape[-1]} entries",
                "compare a model with its own quantized copy",
            )
        target = following[begin : begin + ours.shape[1]]
        begin += ours.shape[1]
        if len(target):  # the last position predicts a token that is not there
            parts.append(_chunk(ours[0, : len(target)], theirs[0, : len(target)], target))
    kl, nll, nll_reference, agreed = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return kl, nll, nll_reference, agreed


def _chunk(
    ours: torch.Tensor, theirs: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for logits [n, V] that predict `target` [n], in float64: a KL of 1e-9 is still exact."""
    device = torch.device("cpu") if ours.device.type in _NO_FLOAT64 else ours.device
    target = target.to(device)
    agreed = ours.argmax(-1).to(device) == theirs.argmax(-1).to(device)
    log_p = ours.to(device, torch.float64).log_softmax(-1)
    log_q = theirs.to(device, torch.float64).log_softmax(-1)
    nll_reference, nll = (-log.gather(-1, target[:, None])[:, 0] for log in (log_p, log_q))
    p = log_p.exp()
    log_p.sub_(log_q).mul_(p)
    kl = torch.where(p > 0, log_p, 0.0).sum(-1).clamp_min(0.0)  # 0 (log 0 - log q) is 0
    return kl, nll, nll_reference, agreed
