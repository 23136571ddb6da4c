"""Calibration text that the model writes itself, for when there is no other.

Tokens are sampled from the model's own distribution (temperature 1), the first few of a sequence more evenly, so that
sequences begin differently. After Liu et al., "LLM-QAT: Data-Free Quantization Aware Training" (2023).

What is given up. The text is what the model is sure of: statistics on it miss what only strange inputs stir, so that a
text from where the model will be used is better, however short. Writing takes a forward pass for each token.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.errors import ActivationError, UsageError
from spicerack.machine.memory import steady
from spicerack.models.families.names import STATES
from spicerack.models.inputs import limits
from spicerack.text.calibration import Calibration, checked
from spicerack.text.pieces import start_token

EVEN_TOKENS = 4
"""Tokens behind the first one of a sequence that are sampled more evenly: what comes later follows from them."""
EVEN_TEMPERATURE = 2.0
"""What their logits are divided by, above 1: likely tokens lose, unlikely ones gain."""
BATCH = 16
"""Sequences that are written together. Each draws its own random numbers, whatever it is written with."""
REMEDY = "give a calibration text"
"""Of every model that cannot write: its hint in all errors here."""


def from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> Calibration:
    """`samples` sequences of `length` tokens, written by a decoder, each from the start token on.

    model: in evaluation mode; it computes on its own device. tokenizer: the model's. A text that ends is followed by
    another, as `calibration.read` joins documents. Sequence i depends on the seed and on i only, up to the rounding of
    a batch's logits.

    Raises UsageError for a model that writes no text, has no start token or too few positions, ActivationError for
    logits that are not finite, and TextError if hardly any different tokens are written.
    """
    name = next((name for name in STATES if name in inspect.signature(model.forward).parameters), None)
    if name is None or not model.can_generate() or model.config.is_encoder_decoder:
        raise UsageError(f"{type(model).__name__} does not write text token by token", REMEDY)
    limit = limits(model, model.config).positions
    if samples < 1 or length < 2 or (limit is not None and length > limit):
        raise UsageError(f"{samples} sequences of {length} tokens: the model has {limit} positions", REMEDY)
    start, ends = start_token(tokenizer), _ends(model, tokenizer)
    first = next((t for t in (start, tokenizer.bos_token_id, *sorted(ends)) if t is not None), None)
    if first is None:
        raise UsageError("the tokenizer has no token to start a text with", REMEDY)
    chance = torch.rand(
        samples, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    banned = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64, device="cpu")
    restart = None if start is None or start in ends else start
    rules = _Rules(first, ends, restart, banned, len(tokenizer))
    ids = torch.cat([_write(model, name, part, rules) for part in chance.split(BATCH)])
    text = "\0".join(tokenizer.batch_decode(ids))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return checked(Calibration(ids, None, digest, 0.0, f"text that the model wrote, seed {seed}"), tokenizer)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: those that the model's own generation stops at, else the tokenizer's; maybe none."""
    config = model.generation_config
    declared = None if config is None else config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared, tokenizer.eos_token_id]
    return {token for token in listed if token is not None}


@dataclass(frozen=True, slots=True)
class _Rules:
    """What may be written.

    first       the token that a sequence begins with
    ends        tokens that end a text;  restart: the token that follows one; None: whatever the model says
    banned      int64: no text begins with these, the tokenizer's special tokens
    vocabulary  tokens that the tokenizer knows: the model may have logits for more, to fill its matrix
    """

    first: int
    ends: set[int]
    restart: int | None
    banned: torch.Tensor
    vocabulary: int


@torch.no_grad()
def _write(model: PreTrainedModel, cache_name: str, chance: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """ids int64 [B, L]; chance float64 [B, L] in [0, 1) decides on each token, in float64 on the CPU.

    cache_name: what the model calls its memory of the tokens before.
    """
    ids = torch.full_like(chance, rules.first, dtype=torch.int64)
    ending = torch.tensor(sorted(rules.ends), dtype=torch.int64, device="cpu")
    cache: dict[str, Any] = {}
    for position in steady(range(1, chance.shape[1])):
        newest = ids[:, position - 1 : position]
        output = model(input_ids=newest.to(model.device), use_cache=True, **cache)
        cache = {cache_name: output[cache_name]}
        logits = output["logits"][:, -1, : rules.vocabulary].cpu().double()
        if not bool(logits.isfinite().all()):
            raise ActivationError("the model's logits are not finite", "load it in float32 or bfloat16")
        if position <= EVEN_TOKENS:
            logits = (logits / EVEN_TEMPERATURE).index_fill(1, rules.banned, -torch.inf)
        chosen = pick(logits, chance[:, position])
        if rules.restart is not None:
            chosen = chosen.where(~torch.isin(newest[:, 0], ending), rules.restart)
        ids[:, position] = chosen
    return ids


def pick(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """A token [B] from softmax(logits [B, V]): the first whose cumulative probability is above chance [B] in [0, 1)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # times the last sum, which is 1 but for its rounding: else a chance near 1 could be above all of them
    tokens = torch.searchsorted(cumulative, chance[:, None] * cumulative[:, -1:], right=True)
    return tokens[:, 0].clamp(max=logits.shape[1] - 1)
