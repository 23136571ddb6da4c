"""What a model does in one turn of a benchmark, and taking turns.

A decoder's turn is a prompt and then new tokens one by one: the first is bound by multiplications, the second by
reading the weights. An encoder's is one batch of full-length sequences. Inputs are random tokens, the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spicerack.errors import UsageError
from spicerack.evaluation.logits import computes_some
from spicerack.models.families.names import STATES
from spicerack.nn.cache import nbytes

S = TypeVar("S")
_SEED = 0
"""Of the random tokens."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of one model: figure -> items per second, and the bytes of its cache at the end, None of an encoder."""

    speeds: Mapping[str, float]
    cache_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderTurn:
    """A decoder's turn: a prompt of `prefill` tokens at once, then `decode` new ones, one by one."""

    prefill: int
    decode: int

    @torch.no_grad()
    def run(self, model: PreTrainedModel) -> Sample:
        """Greedy generation from random tokens, through the model's cache -> tokens a second of prompt and of new ones.

        The end token does not end it: every model makes as many. The prompt's logits are asked for at its last position
        only, where the model can do that, as `generate` does. Raises UsageError for a model without any memory of the
        tokens before.
        """
        ids = _tokens(model, 1, self.prefill)
        last = {"logits_to_keep": 1} if computes_some(model) else {}  # as generate() does: the others are not needed
        begin = _now(model)
        output = model(input_ids=ids, use_cache=True, **last)
        token, name = output.logits[:, -1:].argmax(-1), next((name for name in STATES if name in output), None)
        if name is None:
            raise UsageError(f"{type(model).__name__} keeps nothing between tokens", "its speed is not measured here")
        cache = {name: output[name]}
        middle = _now(model)
        for _ in range(self.decode):
            token = model(input_ids=token, use_cache=True, **cache).logits[:, -1:].argmax(-1)
        end = _now(model)
        speeds = {
            "prefill_tokens_per_s": self.prefill / (middle - begin),
            "decode_tokens_per_s": self.decode / (end - middle),
        }
        return Sample(speeds, nbytes(cache[name]) if isinstance(cache[name], Cache) else None)


@dataclass(frozen=True, slots=True)
class EncoderTurn:
    """An encoder's turn: `batch` sequences of `length` tokens at once."""

    batch: int
    length: int

    @torch.no_grad()
    def run(self, model: PreTrainedModel) -> Sample:
        """One batch of full-length sequences: no padding, so that every model does all the work."""
        ids = _tokens(model, self.batch, self.length)
        mask = torch.ones_like(ids)
        begin = _now(model)
        model.base_model(input_ids=ids, attention_mask=mask)
        return Sample({"items_per_s": self.batch / (_now(model) - begin)})


def take_turns(
    turns: Mapping[str, Callable[[], S]], repeats: int, progress: Callable[[float], None]
) -> dict[str, list[S]]:
    """Every turn once as a warm-up, not counted, then `repeats` rounds of all of them, in order -> what they returned.

    progress: called behind each turn with the share of all turns that is done.
    """
    samples: dict[str, list[S]] = {name: [] for name in turns}
    for number in range(repeats + 1):
        for i, (name, turn) in enumerate(turns.items()):
            sample = turn()
            if number:
                samples[name].append(sample)
            progress((number * len(turns) + i + 1) / ((repeats + 1) * len(turns)))
    return samples


def _tokens(model: PreTrainedModel, rows: int, columns: int) -> torch.Tensor:
    """Random tokens of the model's vocabulary, int64 [rows, columns], on its device: the same for each model."""
    random = torch.Generator().manual_seed(_SEED)
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (rows, columns), generator=random, device="cpu").to(model.device)


def _now(model: PreTrainedModel) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
