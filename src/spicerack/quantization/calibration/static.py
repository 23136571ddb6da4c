"""Static scales of activations: what an observer makes of a layer's inputs, behind all that is quantized already.

A layer's scale is found right before the layer is solved: earlier layers hold their codes, and round their own inputs,
so that what is observed is what will flow. From then on its inputs are rounded by that scale, and the layer is solved
for inputs that are. Layers that share an input share the scale, so that the input can be rounded once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from spicerack.errors import ActivationError
from spicerack.machine.ranks import ALONE
from spicerack.models.blocks.look import inputs_of
from spicerack.numerics.qtensor import moved
from spicerack.quantization.calibration import observer as observers
from spicerack.quantization.calibration.flow import Flow
from spicerack.quantization.calibration.observer import Observer
from spicerack.quantization.calibration.pair import Pair


def observe(pair: Pair, flow: Flow, readers: Sequence[str], name: str | None) -> None:
    """Find one scale for layers that read one input, by the observer `name`, where they are static.

    It is found over the whole text, a sequence at a time, padding left out. Raises ActivationError naming block, layer
    and sequence, also where no token comes.
    """
    static = pair.static(readers)
    if not static:
        return
    observer = _begin(name)
    path = static[0]
    where = f"{flow.name}.{path}"
    for call in flow.calls(ALONE if observer.in_order else None):
        x = inputs_of([path], flow.stack, pair.quantized, flow.hidden(call)[0], call.arguments)
        for i, (rows, mask) in enumerate(_sequences(x.get(path), call.inputs)):
            try:
                observer.add(rows, mask)
            except ActivationError as error:
                place = f"{where}, sequence {call.number * flow.text.rows + i}"
                raise ActivationError(f"{place}: {error.message}", error.hint) from error
    observer.share(flow.ranks)
    try:
        scale = moved(flow.ranks.largest(_stored(observer, pair.type_of(path))), flow.device)
    except ActivationError as error:
        raise ActivationError(f"{where}: {error.message}", error.hint) from error
    for path in static:
        pair.fix_scale(path, scale.clone())  # each is stored


def on_trial(pair: Pair, path: str, x: torch.Tensor, name: str | None) -> torch.Tensor | None:
    """The scale, float32 [1], that a static layer would have were its inputs x [tokens, K]; None if there are none."""
    observer = _begin(name)
    observer.add(x)
    return moved(_stored(observer, pair.type_of(path)), pair.device) if len(x) else None


def _begin(name: str | None) -> Observer:
    """A new observer; a recipe with static activations names one."""
    assert name is not None, "decided before work starts"
    return observers.begin(name)


def _stored(observer: Observer, dtype: torch.dtype) -> torch.Tensor:
    """The observer's scale, float32 [1], as a number of the layer's type, which is that of those who read the folder.

    It is at least that type's smallest number, so that nothing is divided by 0.
    """
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return torch.tensor([max(observer.scale(), least)], dtype=torch.float32, device="cpu").to(dtype).float()


def _sequences(
    x: torch.Tensor | None, inputs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A layer's inputs by sequence, and where each is no padding; all at once where rows are no sequences (experts)."""
    if x is None:
        return
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    if x.numel() != ids.numel() * x.shape[-1]:
        yield x, None
        return
    for i, rows in enumerate(x.reshape(*ids.shape, -1)):
        yield rows, None if mask is None else mask[i]
