"""What a model gains by knowing its own structure: all of it at once, unseen by the model's own code.

A packed layer returns x W^T + b, whoever calls it and whatever stands between it and the next. Joined with others it
would not: layers that share an input once ran as one call, and activations were applied by the layers before them, for
which hooks, wrappers and writes into tensors had to be guessed at. On today's kernels that gained nothing that could be
measured (0 to 7 % were lost with one token, through the bookkeeping), so that it is gone. Results differ from those of
the modules in the last bits of attention and of encoders.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from spicerack.nn.attention import use_native_attention
from spicerack.nn.encoder.whole import use_native_encoders
from spicerack.nn.weight import PackedLayer


def fuse(model: nn.Module, engine: str | None = None) -> None:
    """Let attention in `model` go native, and let encoders that one native call can compute be computed so.

    torch's own encoder layers do not take the fast path that computes with the weights of their layers, and its
    encoders leave padded rows in, which other layers than that path's do not take.

    The model is changed in place, its weights are not. Called once, when all packed layers are in. engine: of that
    attention, as in `load`; layers have theirs already.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            use_native_attention(part, engine)
            _leave_scales(part)
        elif isinstance(part, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            _leave_fast_path(part)
    use_native_encoders(model, engine)


def _leave_scales(model: PreTrainedModel) -> None:
    """Let RWKV not halve its hidden states every few layers, for which it would divide weights in place.

    Both together change nothing but the range of float16. Its config is changed, unless that was done to its weights
    before they were packed.
    """
    if vars(model).get("layers_are_rescaled") is False:
        model.config.rescale_every = 0


def _leave_fast_path(part: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
    """Let torch call the layers inside, if any of them is packed, by the switches that torch itself reads."""
    if not any(isinstance(layer, PackedLayer) for layer in part.modules()):
        return
    if isinstance(part, nn.TransformerEncoder):
        part.use_nested_tensor = False
    else:
        part.activation_relu_or_gelu = 0
