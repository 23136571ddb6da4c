"""How far a language model's predictions moved: two models over the same windows of text.

With p the reference's and q the other's distribution of the next token, at every position of every window:

    KL          sum_v p(v) (log p(v) - log q(v))          nats per token
    perplexity  exp(mean of -log p(next token))
    agreement   share of positions where both have the same most likely token

How it works. A window of tokens is read by both models at once, a few positions' logits at a time (`logits.py`), and
reduced to four numbers a position; logits are compared in float64, where a KL of 1e-9 is still exact, and are gone
before the next come. Tokens of one window depend on each other, so intervals are taken over the means of windows:
windows are nearly independent, tokens are not.

What is given up. The first tokens of a window are predicted from little context, as they would not be in a long text;
that is the same for both models. The KL of every token is kept, four bytes each, for an exact quantile, and the
token, four more, for examples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from spicerack.arguments import checked
from spicerack.errors import SpicerackError, TextError, UsageError
from spicerack.evaluation.intervals import Interval, mean_interval
from spicerack.evaluation.logits import chunk_positions, logits, logits_through_cache
from spicerack.machine.memory import steady
from spicerack.models.inputs import limits
from spicerack.text.windows import Window

Progress = Callable[[float], None]
_NO_FLOAT64 = ("mps",)
"""Devices that cannot compute in it: there logits come to the CPU."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured, window by window. A window of L tokens predicts L - 1.

    window      L
    kl          float64 [windows]: mean KL over the window's tokens, nats
    nll, nll_reference   float64 [windows]: mean -log of the probability given to the token that came, nats
    agreed      int64 [windows]: tokens on which both models' first choice is the same
    kl_tokens   float32 [tokens]: each token's KL
    ids         int32 [windows, L]: what was read
    unknown     how many of the text's tokens the tokenizer does not know
    text        hash of the token ids
    """

    window: int
    kl: torch.Tensor
    nll: torch.Tensor
    nll_reference: torch.Tensor
    agreed: torch.Tensor
    kl_tokens: torch.Tensor = field(repr=False)
    ids: torch.Tensor = field(repr=False)
    unknown: int
    text: str

    @property
    def tokens(self) -> int:
        """How many tokens were predicted: windows x (window - 1)."""
        return len(self.kl_tokens)

    @property
    def mean(self) -> float:
        """Mean KL of the quantized model's predictions from the reference's, in nats per token."""
        return float(self.kl.mean())

    @property
    def kl_interval(self) -> Interval:
        """The mean KL with its 95 % interval over windows; one window alone has none."""
        return mean_interval(self.kl)

    @property
    def top1_interval(self) -> Interval:
        """The share of tokens with the same first choice, with its 95 % interval over windows, cut at 0 and 1."""
        return mean_interval(self.agreed.to(torch.float64) / (self.window - 1)).within(0.0, 1.0)

    @property
    def kl_p999(self) -> float:
        """The KL that one token in a thousand exceeds, in nats."""
        return float(np.quantile(self.kl_tokens.numpy(), 0.999))

    @property
    def perplexity(self) -> float:
        """Perplexity of the quantized model: exp of its mean nll."""
        return math.exp(float(self.nll.mean()))

    @property
    def perplexity_reference(self) -> float:
        """Perplexity of the reference, on the same tokens."""
        return math.exp(float(self.nll_reference.mean()))

    @property
    def top1_agreement(self) -> float:
        """Share of tokens on which both models' first choice is the same."""
        return int(self.agreed.sum()) / self.tokens

    @property
    def unknown_share(self) -> float:
        """Share of the text's tokens that the tokenizer does not know."""
        return self.unknown / (len(self.kl) * self.window)

    def as_dict(self) -> dict[str, Any]:
        """The figures under the names of the command line's contract."""
        kl, top1 = self.kl_interval, self.top1_interval
        perplexities = (mean_interval(nll).map(math.exp) for nll in (self.nll, self.nll_reference))
        return {
            "tokens": self.tokens,
            "windows": len(self.kl),
            "window": self.window,
            "perplexity": self.perplexity,
            "perplexity_ci95": next(perplexities).ends,
            "perplexity_reference": self.perplexity_reference,
            "perplexity_reference_ci95": next(perplexities).ends,
            "kl_mean": kl.mean,
            "kl_mean_ci95": kl.ends,
            "kl_p999": self.kl_p999,
            "top1_agreement": self.top1_agreement,
            "top1_agreement_ci95": top1.ends,
            "unknown_tokens": self.unknown_share,
        }


class _Positions(NamedTuple):
    """What is kept of n predicted positions: kl, nll, nll_reference float64 [n], agreed bool [n]."""

    kl: torch.Tensor
    nll: torch.Tensor
    nll_reference: torch.Tensor
    agreed: torch.Tensor


def compare(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    windows: Iterable[Window],
    *,
    progress: Progress | None = None,
    positions: int | None = None,
    step: int | None = None,
) -> Comparison:
    """Run both models over the same text, and compare their predictions.

    reference, other   each on its own device, in its own float type
    windows     of the text, all of the same length
    progress    called behind each window with the share of the text, 0 to 1, that has been read
    positions   how many positions' logits are held at once; None: what the vocabulary allows
    step        `other` reads so many tokens at a time, through its cache; None: a window at once, without

    Raises TextError without a window, UsageError if a vocabulary does not fit the text or the other model's,
    SpicerackError if a model's logits are not finite.
    """
    rows: list[_Positions] = []
    ids: list[torch.Tensor] = []
    digest = hashlib.sha256()
    unknown = 0
    given = limits(reference, reference.config)
    for number, window in enumerate(steady(windows)):
        given.check_ids(window.ids)
        digest.update(window.ids.numpy().tobytes())
        unknown += window.unknown
        row = _window(reference, other, window.ids[None], positions or _positions(reference), step)
        _check_finite(row, number)
        rows.append(row)
        ids.append(window.ids.int())
        if progress is not None:
            progress(window.fraction)
    if not rows:
        raise TextError("there is no window to evaluate", "give a longer text")
    return _summed(rows, torch.stack(ids), unknown, digest.hexdigest())


def _summed(rows: list[_Positions], ids: torch.Tensor, unknown: int, text: str) -> Comparison:
    """The figures of all windows, each row one of them, put together; the rest is as `Comparison` has it."""
    kl, nll, nll_reference, agreed = (torch.stack(column) for column in zip(*rows, strict=True))
    return Comparison(
        window=ids.shape[1],
        kl=kl.mean(dim=1),
        nll=nll.mean(dim=1),
        nll_reference=nll_reference.mean(dim=1),
        agreed=agreed.sum(dim=1),
        kl_tokens=kl.float().flatten(),
        ids=ids,
        unknown=unknown,
        text=text,
    )


@checked
def paired_difference(a: Comparison, b: Comparison) -> Interval:
    """Mean KL of `a` minus that of `b`, in nats per token, with the 95 % interval over windows, paired.

    An interval below 0 says that `a` is nearer to the reference. Pairing takes the text's own variation out: both were
    measured on the same windows against the same reference. Raises UsageError if they were not.
    """
    # the reference's losses, equal bit for bit, tell that it was the same model, in the same type on the same machine
    if (a.text, a.window) != (b.text, b.window) or not torch.equal(a.nll_reference, b.nll_reference):
        raise UsageError("the evaluations are of different text or references", "use the same text, window and model")
    return mean_interval(a.kl - b.kl)


def _positions(model: PreTrainedModel) -> int:
    """How many positions' logits are held at once."""
    return chunk_positions(int(model.config.get_text_config().vocab_size))


def _check_finite(row: _Positions, number: int) -> None:
    """Raises SpicerackError where window `number` has a logit that is NaN, or infinite where it counts."""
    for name, values in (("reference", row.nll_reference), ("quantized", row.nll), ("quantized", row.kl)):
        if not bool(values.isfinite().all()):
            raise SpicerackError(
                f"window {number}: the {name} model's logits are not finite",
                "it overflows in its own type: quantize from another float type, or skip the layers with outliers",
            )


@torch.no_grad()
def _window(
    reference: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor, positions: int, step: int | None
) -> _Positions:
    """The L - 1 positions of one window `ids` [1, L] that predict a token, on the CPU. Raises UsageError."""
    following = ids[0, 1:]
    parts: list[_Positions] = []
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
    return _Positions(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _chunk(ours: torch.Tensor, theirs: torch.Tensor, target: torch.Tensor) -> _Positions:
    """The same for logits [n, V] of the reference and of the other that predict `target` [n], in float64."""
    device = torch.device("cpu") if ours.device.type in _NO_FLOAT64 else ours.device
    target = target.to(device)
    agreed = ours.argmax(-1).to(device) == theirs.argmax(-1).to(device)
    log_p = ours.to(device, torch.float64).log_softmax(-1)
    log_q = theirs.to(device, torch.float64).log_softmax(-1)
    nll_reference, nll = (-log.gather(-1, target[:, None])[:, 0] for log in (log_p, log_q))
    p = log_p.exp()
    log_p.sub_(log_q).mul_(p)  # in place: with large vocabularies these are the largest tensors there are
    kl = torch.where(p > 0, log_p, 0.0).sum(-1).clamp_min(0.0)  # 0 (log 0 - log q) is 0; rounding may go below 0
    return _Positions(kl, nll, nll_reference, agreed)
