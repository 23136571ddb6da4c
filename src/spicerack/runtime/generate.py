"""Let a model continue a text: what a quantized folder is for, and the quickest look at what is left of it.

transformers' own `generate` does the work, so that caches, samplers and chat templates are those that the model's users
know. By default the most likely token is taken each time: then two folders differ because their weights do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    set_seed,
)

from spicerack.errors import TextError, UsageError
from spicerack.machine import devices
from spicerack.machine.memory import settle
from spicerack.models.inputs import RUN_ERRORS, Limits, limits
from spicerack.models.kind import unreadable
from spicerack.runtime.folder import Folder
from spicerack.runtime.load import load
from spicerack.storage.files import locate
from spicerack.text import chats
from spicerack.text.tokenizer import read_tokenizer

Write = Callable[[str], None]
"""Is called with the next piece of a text."""
NEW_TOKENS = 64
"""Tokens that are made where nobody says how many."""
_SEEDS = 2**32
"""Seeds that there are: `set_seed` sets numpy's, too, which knows no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How a model is loaded to continue a text, and how tokens are taken.

    max_new_tokens      the most that are made; the model may end earlier. None: 64, or what there is room for behind
                        the prompt in a model whose positions are a table
    temperature         0 takes the most likely token each time, else tokens are sampled from the logits divided by it
    top_p, top_k        of the sampling: the likeliest tokens that have this probability together, and how many at most;
                        None: as the model's generation_config.json says
    seed                of the sampling, from 0 to 2**32 - 1
    raw                 no chat template, even if the tokenizer has one
    device              where the model runs: "cpu", "cuda" ...
    engine              that packed layers compute with, as in `load`; None: the fastest of this processor
    cache               bits of keys and values, as in `load`; None: as computed
    trust_remote_code   whether code that came with the model may run, of the tokenizer too

    Raises UsageError for numbers that these cannot be.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    raw: bool = False
    device: str = "cpu"
    engine: str | None = None
    cache: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", "use 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}", "use 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", "it is a share, above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}", "use 1 or more")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"seed is {self.seed}", f"use a number from 0 to {_SEEDS - 1}")


_DEFAULTS = GenerateOptions()


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model made of a prompt.

    prompt         as it was given, without a chat template
    text           the continuation, without the prompt
    tokens         new tokens in it
    tokens_per_s   of these, the time for reading the prompt included
    """

    prompt: str
    text: str
    tokens: int
    tokens_per_s: float


def generate(
    model: str | Path, prompt: str, options: GenerateOptions = _DEFAULTS, *, write: Write | None = None
) -> Generated:
    """Continue `prompt` with the model in a folder (or at a hub id), quantized or not.

    options: how it is loaded, and how tokens are taken. write: called with pieces of the text as they come, with the
    end of the last line behind them; None: only the result has the text. Raises UsageError for a model that does not
    generate text, CheckpointError if the folder has no tokenizer, and what `load` raises.
    """
    folder, trusted = locate(model), options.trust_remote_code
    _sampling(options)
    devices.find(options.device, torch.float32)
    if reason := unreadable(Folder.open(folder).config):
        raise UsageError(f"{folder} {reason}", "only models that are given text and write text generate here")
    loaded = load(folder, device=options.device, engine=options.engine, cache=options.cache, trust_remote_code=trusted)
    if not loaded.can_generate():
        raise UsageError(
            f"{folder}: {type(loaded).__name__} does not generate text", "spicerack eval compares encoders"
        )
    tokenizer = read_tokenizer(folder, loaded.config, trust_remote_code=trusted)
    return continue_text(loaded, tokenizer, prompt, options, write=write)


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerateOptions = _DEFAULTS,
    *,
    write: Write | None = None,
) -> Generated:
    """As `generate`, with a model that is loaded already, where and as it is.

    Of `options` only those count that say how tokens are taken. Raises UsageError for a prompt that has no tokens, or
    some that the model has not, or that leaves no room for the new ones.
    """
    inputs = _encode(tokenizer, prompt, options.raw).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise UsageError("the prompt has no tokens", "give some text to continue")
    given = limits(model, model.config)
    given.check_ids(inputs["input_ids"])
    most = _room(given, length, options.max_new_tokens, apart=bool(model.config.is_encoder_decoder))
    set_seed(options.seed)
    sampling = _sampling(options)
    padding = _padding(model, tokenizer)
    run: Any = model.generate
    started = time.perf_counter()
    try:
        with torch.no_grad():
            ids = run(
                **inputs, **sampling, max_new_tokens=most, pad_token_id=padding,
                stopping_criteria=StoppingCriteriaList([_Steady()]),
                streamer=None if write is None else _Streamer(tokenizer, write),
            )  # fmt: skip
    except RUN_ERRORS as error:  # of a class that wants more than text, or a config that lacks a token
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(
            f"{type(model).__name__} cannot continue a text: {reason}", "is config.json the model's own?"
        ) from error
    seconds = time.perf_counter() - started
    new = ids[0] if model.config.is_encoder_decoder else ids[0, length:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert isinstance(text, str)
    return Generated(prompt, text, len(new), round(len(new) / seconds, 2))


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    """How transformers is to take tokens. Raises UsageError for a choice among tokens where the likeliest is taken."""
    choices = {"top_p": options.top_p, "top_k": options.top_k}
    named = {name: value for name, value in choices.items() if value is not None}
    if options.temperature > 0:
        return {"do_sample": True, "temperature": options.temperature, **named}
    if named:
        name = next(iter(named))
        raise UsageError(f"{name} has no effect at temperature 0", "pass --temperature 0.8 (temperature=0.8), or so")
    return {"do_sample": False}


class _Steady(StoppingCriteria):
    """Ends nothing: transformers asks it behind each token, which is where memory can be given back."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Called with the ids [B, L] so far -> bool [B], whether a text is to end."""
        settle()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Streamer(TextStreamer):
    """Hands the continuation to `write` as soon as its words are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with the next piece, and with stream_end behind the last one."""
        self._write(text + "\n" if stream_end else text)


def _room(given: Limits, length: int, asked: int | None, *, apart: bool) -> int:
    """How many new tokens are made behind a prompt of `length`: as asked, else 64 or what there is room for.

    apart: prompt and answer have positions of their own, as in an encoder-decoder. Only a table of positions has an
    end; computed ones go on, less well. Raises UsageError where it would be passed.
    """
    wanted = NEW_TOKENS if asked is None else asked
    if not given.table or given.positions is None:
        return wanted
    left = given.positions - (0 if apart else length)
    if length > given.positions or left < 1 or (asked is not None and asked > left):
        raise UsageError(
            f"a prompt of {length} tokens and {wanted} new ones do not fit into {given.positions} positions",
            "give a shorter prompt, or lower --max-new-tokens",
        )
    return min(wanted, left)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> Any:
    """input_ids and attention_mask int64 [1, L]: the prompt, or a chat in which it is the first message.

    Raises TextError for a prompt that is no text, and a template that does not take it.
    """
    if chats.whole(prompt)[1]:
        raise TextError("the prompt is no valid text: it has half of a character", "give it in UTF-8")
    if not tokenizer.chat_template or raw:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    messages = [{"role": "user", "content": prompt}]
    try:
        text = chats.render(tokenizer, messages, "the prompt", add_generation_prompt=True)
    except TextError as error:
        raise TextError(error.message, "pass --raw (raw=True) to continue the prompt itself") from error
    # the template has written the special tokens that it wants
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token to pad with. Only batches are padded; naming it keeps transformers from warning that it chose one."""
    config = model.generation_config
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return next((token for token in (config.pad_token_id, tokenizer.pad_token_id, end) if token is not None), None)
