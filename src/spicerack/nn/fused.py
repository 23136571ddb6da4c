"""What a model gains by knowing its own structure: all of it at once, unseen by the model's own code.

Layers are joined where names promise a pattern, and find out by what happens whether it holds: where it does not, each
computes for itself, as before. Results are the same either way but for the last bits of attention and of GELU.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from spicerack.nn.attention import use_native_attention
from spicerack.nn.encoder.whole import use_native_encoders
from spicerack.nn.gelu import join_gelus
from spicerack.nn.shared import share_inputs


def fuse(model: nn.Module, engine: str | None = None) -> None:
    """Join packed layers of `model` that share an input, and those with a GELU behind them; attention goes native, and
    encoders that one native call can compute are computed so.

    The model is changed in place, its weights are not. Called once, when all packed layers are in. engine: of that
    attention, as in `load`; layers have theirs already.
    """
    share_inputs(model)
    join_gelus(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            use_native_attention(part, engine)
    use_native_encoders(model, engine)
