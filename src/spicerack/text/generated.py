"""Calibration text that the model writes itself, for when there is no other.

Tokens are sampled from the model's own distribution (temperature 1), the first few of a sequence more evenly, so that
sequences begin differently. After Liu et al., "LLM-QAT: Data-Free Quantization Aware Training" (2023).
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.errors import ActivationError, UsageError
from spicerack.models.families.names import STATES
from spicerack.models.kind import positions
from spicerack.text.calibration import Calibration, checked
from spicerack.text.pieces import start_token

EVEN_TOKENS = 4
EVEN_TEMPERATURE = 2.0
BATCH = 16
"""Sequences that are written together. Each draws its own random numbers, whatever it is written with."""
REMEDY = "give a calibration text"


def from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> Calibration:
    """`samples` sequences of `length` tokens, written by a decoder, each from the start token on.

    A text that ends is followed by another, as `calibration.read` joins documents. Sequence i depends on the seed and
    on i only, up to the rounding of a batch's logits.

    Raises UsageError for a model that writes no text, has no start token or too few positions, ActivationError for
    logits that are not finite, and TextError if hardly any different tokens are written.
    """
    name = next((name for name in STATES if name in inspect.signature(model.forward).parameters), None)
    if name is None or not model.can_generate() or model.config.is_encoder_decoder:
        raise UsageError(f"{type(model).__name__} does not write text token by token", REMEDY)
    limit = positions(model.config)
    if samples < 1 or length < 2 or (limit is not None and length > limit):
        raise UsageError(f"{samples} sequences of {length} tokens: the model has {limit} positions", REMEDY)
    start, ends = start_token(tokenizer), _ends(model, tokenizer)
    first = next((t for t in (start, tokenizer.bos_token_id, *sorted(ends)) if t is not None), None)
    if first is None:
        raise UsageError("the tokenizer has no token to start a text with", REMEDY)
    chance = torch.rand(samples, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    banned = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    restart = None if start is None or start in ends else start
    written = [_write(model, name, part, first, ends, restart, banned, len(tokenizer)) for part in chance.split(BATCH)]
    ids = torch.cat(written)
    text = "\0".join(tokenizer.batch_decode(ids))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return checked(Calibration(ids, None, digest, 0.0, f"text that the model wrote, seed {seed}"), tokenizer)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text."""
    config = model.generation_config
    declared = None if config is None else config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared, tokenizer.eos_token_id]
    return {token for token in listed if token is not None}


@torch.no_grad()
def _write(
    model: PreTrainedModel,
    cache_name: str,
    chance: torch.Tensor,
    first: int,
    ends: set[int],
    restart: int | None,
    banned: torch.Tensor,
    vocabulary: int,
) -> torch.Tensor:
    """ids int64 [B, L]; chance float64 [B, L] in [0, 1) decides on each token.

    banned: no text begins with these. restart: follows an end. vocabulary: the model may have logits for more.
    """
    ids = torch.full_like(chance, first, dtype=torch.int64)
    ending = torch.tensor(sorted(ends), dtype=torch.int64)
    cache: dict[str, Any] = {}
    for position in range(1, chance.shape[1]):
        newest = ids[:, position - 1 : position]
        output = model(input_ids=newest.to(model.device), use_cache=True, **cache)
        cache = {cache_name: output[cache_name]}
        logits = output["logits"][:, -1, :vocabulary].cpu().double()
        if not bool(logits.isfinite().all()):
            raise ActivationError("the model's logits are not finite", "load it in float32 or bfloat16")
        if position <= EVEN_TOKENS:
            logits = (logits / EVEN_TEMPERATURE).index_fill(1, banned, -torch.inf)
        chosen = pick(logits, chance[:, position])
        if restart is not None:
            chosen = chosen.where(~torch.isin(newest[:, 0], ending), restart)
        ids[:, position] = chosen
    return ids


def pick(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """A token [B] from softmax(logits [B, V]): the first whose cumulative probability is above chance [B] in [0, 1)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    found = torch.searchsorted(cumulative, chance[:, None] * cumulative[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[1] - 1)
