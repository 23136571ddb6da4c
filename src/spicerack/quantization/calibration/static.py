"""Static scales of activations: what an observer makes of a layer's inputs, behind all that is quantized already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from spicerack.errors import ActivationError
from spicerack.machine.ranks import ALONE
from spicerack.models import blocks
from spicerack.numerics.qtensor import moved
from spicerack.quantization.calibration.block import Work
from spicerack.quantization.calibration.observers import OBSERVERS, Observer


def observe(work: Work, group: Sequence[str]) -> None:
    """Find one scale for the layers at these paths, which share an input, where they are static.

    It is found over the whole text, a sequence at a time, padding left out. Raises ActivationError naming block, layer
    and sequence, also where no token comes.
    """
    static = [path for path in group if path in work.roundings and work.roundings[path].static]
    if not static:
        return
    observer = _observer(work)
    path = static[0]
    where = f"{work.name}.{path}"
    for number, chunk, arguments in work.calls(ALONE if observer.in_order else None):
        hidden = work.states.read(work.index, number)[0]
        x = blocks.inputs_of([path], work.stack, work.block, hidden, arguments)
        for i, (rows, mask) in enumerate(_sequences(x.get(path), chunk)):
            try:
                observer.add(rows, mask)
            except ActivationError as error:
                place = f"{where}, sequence {number * work.states.rows + i}"
                raise ActivationError(f"{place}: {error.message}", error.hint) from error
    observer.share(work.ranks)
    try:
        scale = moved(work.ranks.largest(_stored(observer, work.types[f"{path}.weight"])), work.device)
    except ActivationError as error:
        raise ActivationError(f"{where}: {error.message}", error.hint) from error
    for path in static:
        work.roundings[path].scale = scale.clone()  # each is stored


def on_trial(work: Work, path: str, x: torch.Tensor) -> torch.Tensor | None:
    """What the scale of a static layer would be if its inputs were x [tokens, K]; None if there are none."""
    observer = _observer(work)
    observer.add(x)
    return moved(_stored(observer, work.types[f"{path}.weight"]), work.device) if len(x) else None


def _observer(work: Work) -> Observer:
    name = work.job.recipe.observer
    assert name is not None, "decided before work starts"
    return OBSERVERS[name]()


def _stored(observer: Observer, dtype: torch.dtype) -> torch.Tensor:
    """float32 [1]: its scale, as a number of the layer's type, which is that of its readers."""
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return torch.tensor([max(observer.scale(), least)]).to(dtype).float()


def _sequences(
    x: torch.Tensor | None, chunk: Mapping[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The inputs of each sequence, and where they are no padding; all at once where rows are no sequences (experts)."""
    if x is None:
        return
    mask, ids = chunk.get("attention_mask"), chunk["input_ids"]
    if x.numel() != ids.numel() * x.shape[-1]:
        yield x, None
        return
    for i, rows in enumerate(x.reshape(*ids.shape, -1)):
        yield rows, None if mask is None else mask[i]
