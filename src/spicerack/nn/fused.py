"""What a model gains by knowing its own structure: all of it at once, unseen by the model's own code."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from spicerack.nn.attention import use_native_attention
from spicerack.nn.gelu import join_gelus
from spicerack.nn.shared import share_inputs


def fuse(model: nn.Module, engine: str | None = None) -> None:
    """Join layers that share an input, and layers with the GELU behind them; attention by the native kernel.

    engine: of that attention, as in `load`; layers have theirs already.
    """
    share_inputs(model)
    join_gelus(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            use_native_attention(part, engine)
