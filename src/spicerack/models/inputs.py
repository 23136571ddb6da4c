"""The one door for what a model is given: can it take this kind of input, these ids, this many positions?

Every command asks here before it runs a model: what does not fit is a UsageError with the reason, and never an index
that some embedding does not have. `limits` looks at the model itself, on torch's meta device where it is not loaded
yet, because a config's `max_position_embeddings` is not always how long a text may be: RoBERTa and its kin never use
the first rows of their table, OPT has two more than it says, and rotary models can go on behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from spicerack.errors import UsageError
from spicerack.models.architecture import on_meta
from spicerack.models.blocks.reads import Reads

RUN_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What classes of transformers raise where they are given less than they want, or a config that contradicts itself."""
_PROBE = 16
"""Tokens that a model is tried with: enough for those that read several together (CANINE)."""
_SPARE_ROWS = 8
"""Rows that a table of positions may have beyond the positions that its config names."""
_POSITIONS = ("position", "wpe", "pos_emb", "pos_enc", "embed_pos")
"""What families call a table of positions, or a part of it."""
_OWN_TOKENIZER = "is it the model's own tokenizer?"


@dataclass(frozen=True, slots=True)
class Limits:
    """What ids a model can be given.

    vocabulary  rows of its table of tokens: ids are below; None: not known
    positions   how long a text it reads as it was trained; None: it has no limit of its own (state spaces, ALiBi)
    table       whether positions are rows of a table, beyond which nothing can be computed
    """

    vocabulary: int | None
    positions: int | None
    table: bool

    def check_ids(self, ids: torch.Tensor) -> None:
        """Raises UsageError for an id, in a tensor of any shape, that the model has no row for."""
        highest = int(ids.max()) if ids.numel() else -1
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise UsageError(
                f"the tokenizer makes token {highest}, but the model's vocabulary has {self.vocabulary} entries",
                _OWN_TOKENIZER,
            )

    def check_length(self, length: int, option: str) -> None:
        """Raises UsageError for texts of more tokens than there are positions. option: where the length was given."""
        if self.positions is not None and length > self.positions:
            raise UsageError(
                f"{option} {length}: the model has {self.positions} positions", f"use {option} {self.positions} or less"
            )


def limits(model: nn.Module, config: PreTrainedConfig) -> Limits:
    """What `model` can be given: a whole one on any device, the meta device too. config: its own."""
    text = config.get_text_config(decoder=True)
    # getattr, not vars: GPT-2's config and others answer by this name what they store under one of their own
    declared = getattr(text, "max_position_embeddings", None)
    positions = declared if isinstance(declared, int) and declared > 0 else None
    rows = list(_usable_rows(text_part(model, config), positions))
    usable = min((count for count in (*rows, positions) if count is not None), default=None)
    return Limits(_vocabulary(model, text), usable, bool(rows))


def limits_of(config: Mapping[str, Any], built: PreTrainedConfig) -> Limits:
    """The same of a model that is not loaded. config: its config.json; built: transformers' object of it."""
    model = on_meta(config)
    return limits(nn.Module() if model is None else model, built)


def text_part(model: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """The part of a model that reads text: all of it, or the language model of one that also sees or hears."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return model
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and type(part.config) is type(text)]
    return parts[0] if parts else model


def _usable_rows(model: nn.Module, positions: int | None) -> Iterator[int]:
    """How many rows each of a model's tables of positions has for a text; nothing of a model that computes them.

    positions: as its config says, which tells its table from that of a picture's patches. A table is whatever is called
    so and has a row for each position: layers that look up rows, packed or not, and plain tensors.
    """
    for path, module in model.named_modules():
        attributes = vars(module)
        own = {"": attributes.get("num_embeddings"), **{name: len(x) for name, x in _tensors(module) if x.ndim == 2}}
        for name, rows in own.items():
            called = (name if name not in ("", "weight") else path.rpartition(".")[2]).lower()
            if not isinstance(rows, int) or not any(word in called for word in _POSITIONS):
                continue
            if 0 <= rows - (rows if positions is None else positions) <= _SPARE_ROWS:
                yield rows - _first_row(attributes)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own tensors by name: parameters, buffers and plain attributes."""
    held = {**vars(module), **module._parameters, **module._buffers}
    return ((name, value) for name, value in held.items() if isinstance(value, torch.Tensor) and value.ndim)


def _first_row(attributes: Mapping[str, Any]) -> int:
    """The first row of a table of positions that a text uses: behind an offset, or behind the row for padding."""
    offset, padding = attributes.get("offset"), attributes.get("padding_idx")
    if isinstance(offset, int):
        return offset
    return padding + 1 if isinstance(padding, int) else 0


def _vocabulary(model: nn.Module, text: PreTrainedConfig) -> int | None:
    """Rows of the table of tokens; what the config says where the model does not say which table that is."""
    table = None
    if isinstance(model, PreTrainedModel):
        try:
            table = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # a class that never said where it is
            table = None
    rows = None if table is None else vars(table).get("num_embeddings")
    declared = vars(text).get("vocab_size")
    return next((count for count in (rows, declared) if isinstance(count, int) and count > 0), None)


@torch.no_grad()
def check_text(model: PreTrainedModel, *, head: bool) -> frozenset[str]:
    """Run a model on a few tokens -> the paths of the layers that text reaches: those that were called, and those whose
    weight was computed with.

    head: whether logits are wanted, of the model as a whole; else hidden states, of its body. Raises UsageError for a
    model that cannot be run on ids alone, or returns something else.
    """
    name = type(model).__name__
    length = min(_PROBE, limits(model, model.config).positions or _PROBE)
    ids = torch.ones((1, length), dtype=torch.int64, device=model.device)
    wanted, body = ("logits", model) if head else ("last_hidden_state", model.base_model)
    weights = {path: module._parameters["weight"] for path, module in model.named_modules()
               if module._parameters.get("weight") is not None}  # fmt: skip
    with _calls(model) as called, Reads(weights) as reads:
        try:
            output = body(input_ids=ids, **({} if head else {"attention_mask": torch.ones_like(ids)}))
        except RUN_ERRORS as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UsageError(
                f"{name} cannot be run on text alone: {reason}", "only language models and text encoders can"
            ) from error
    result = output.get(wanted) if isinstance(output, Mapping) else None
    if not isinstance(result, torch.Tensor) or result.ndim != 3 or result.shape[1] != length:
        raise UsageError(f"{name} makes no {wanted} for each token", "only language models and text encoders do")
    return frozenset(called | reads.given)


@contextmanager
def _calls(model: nn.Module) -> Iterator[set[str]]:
    """Within, the paths of the modules of `model` that are called are collected."""
    called: set[str] = set()
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            hook = module.register_forward_pre_hook(lambda _module, _inputs, path=path: called.add(path))
            hooks.callback(hook.remove)
        yield called
