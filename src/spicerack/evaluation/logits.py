"""Logits of one window, a few positions at a time: [window, vocabulary] never exists at once.

How it works. The model's body runs once; its own `forward` then makes the logits of each group of positions, while the
body answers with the output it gave before. So soft-capping, scaling and biases of every family stay in force, without
a table of families here.

What is given up. Where a family's head goes through a part of the body only, or its `forward` cannot be asked for some
positions, the whole window's logits are computed at once: right, and large.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from spicerack.models.families.names import KEY_VALUE_CACHES

CHUNK_ELEMENTS = 1 << 23
"""Logits held at once, in elements: 64 MiB each time they are held in float64, whatever the vocabulary."""


def chunk_positions(vocabulary: int) -> int:
    """How many positions are computed at once, for a vocabulary of so many tokens: one at least."""
    return max(CHUNK_ELEMENTS // max(vocabulary, 1), 1)


def logits(model: PreTrainedModel, ids: torch.Tensor, positions: int) -> Iterator[torch.Tensor]:
    """Logits [1, <= positions, V] of the window `ids` [1, L], in order, in the type that the model computes in.

    Each chunk is computed when it is asked for. Where a model cannot compute some positions only, the whole window's
    logits are computed at once, then cut.
    """
    length = ids.shape[1]
    if not computes_some(model) or positions >= length:
        yield from torch.split(model(input_ids=ids, use_cache=False).logits, positions, dim=1)
        return
    groups = torch.split(torch.arange(length, device=ids.device), positions)  # logits_to_keep takes positions, too
    with _outputs(model.base_model) as outputs:
        first = model(input_ids=ids, use_cache=False, logits_to_keep=groups[0]).logits
    if len(outputs) != 1:  # the head uses a part of the body, which runs again for every group
        del first
        yield from torch.split(model(input_ids=ids, use_cache=False).logits, positions, dim=1)
        return
    yield first
    for group in groups[1:]:
        with _answering(model.base_model, outputs[0]):
            chunk = model(input_ids=ids, use_cache=False, logits_to_keep=group).logits
        yield chunk


def logits_through_cache(
    model: PreTrainedModel, ids: torch.Tensor, positions: int, step: int
) -> Iterator[torch.Tensor]:
    """As `logits`, reading `step` tokens at a time, so that each step sees the earlier ones through the cache.

    Chunks are of `positions` tokens, or fewer at the end, and a step does not cross from one to the next.
    """
    cache: dict[str, Any] = {}
    for group in ids.split(positions, dim=1):
        parts = []
        for part in group.split(step, dim=1):
            output = model(input_ids=part, use_cache=True, **cache)
            name = next(name for name in KEY_VALUE_CACHES if name in output)  # by version of transformers
            cache = {name: output[name]}
            parts.append(output.logits)
        yield torch.cat(parts, dim=1)


def computes_some(model: PreTrainedModel) -> bool:
    """Whether `model` can compute the logits of some positions only: a head apart from the body, whose forward takes
    `logits_to_keep`, as most of transformers' decoders have it."""
    return model.base_model is not model and "logits_to_keep" in inspect.signature(model.forward).parameters


@contextmanager
def _outputs(module: torch.nn.Module) -> Iterator[list[Any]]:
    """The list that `module`'s outputs are appended to, while the context is open."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _answering(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """`module` answers with `output`, without computing, while the context is open.

    The instance gets a `forward` of its own, which is found before its class's; what was there comes back.
    """
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before
