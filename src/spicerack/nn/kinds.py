"""Kinds of layers: a row of `KINDS` says all that is needed to quantize one, to save it, to load it, to open it again.

Who replaces layers (`quantize`, `freeze`, `save`, `load`, `prepare_qat`) asks this table and never for a class. A new
kind is a row here and a file with its packed layer; to be trained in few bits it needs a row of
`training/qat/twins.py` as well, which is keyed by `LayerKind.name`.

Heads, routers and the matrices of experts (`ExpertStack` holds a layer for each) are no kinds of their own: they are
linear layers, and what they are for is told by their names (`models/census.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack.errors import UsageError
from spicerack.models.families import names
from spicerack.nn.conv import Geometry, QConv2d
from spicerack.nn.embedding import Lookup, QEmbedding, ScaledEmbedding
from spicerack.nn.linear import QConv1D, QLinear
from spicerack.nn.weight import PackedLayer, PackedWeight

Inputs = Literal["tokens", "maps", "ids"]
"""What flows into a layer: [..., K], of which each token may have a scale of its own; [..., I, H, W], which has no
tokens; or indices of rows."""
Bias = nn.Parameter | None


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One kind of layer whose weight has a packed form.

    name          what folders call it (`storage.format.StoredTensor.role`), and what other tables are keyed by
    role          what recipes go by, as a role of `models.census`: convolutions are quantized where linear layers are
    float_class   torch's class; its subclasses may compute something else and are of no kind
    packed_class  the layer that takes its place, a subclass of it
    options       float layer, or any layer in its place, packed or trained -> what it is beside weight and bias, which
                  is all that is kept of it; None if there is nothing
    pack          (weight, options, bias) -> the packed layer
    blank         (weight, options) -> a float layer that this weight fits, without its numbers, for `unpack`
    obstacle      float layer -> why it stays in float whatever the scheme, None if nothing is in the way
    inputs        what flows into it, which decides how a scheme can round that
    transposed    the weight is stored [K, N], inputs first
    plain_only    only in modules of one's own: in a transformers model, whose folder is read by names and shapes, it
                  stays in float
    subclasses    names of the subclasses of `float_class` that compute the same, or what `options` tell of
    """

    name: str
    role: str
    float_class: type[nn.Module]
    packed_class: type[PackedLayer]
    options: Callable[[Any], Any]
    pack: Callable[[PackedWeight, Any, Bias], PackedLayer]
    blank: Callable[[torch.Tensor, Any], nn.Module]
    obstacle: Callable[[Any], str | None]
    inputs: Inputs
    transposed: bool = False
    plain_only: bool = False
    subclasses: frozenset[str] = frozenset()

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A float layer's weight -> the matrix [N, K] that is quantized, a row for each output, a view where it can be.

        `PackedLayer.weight` is the way back.
        """
        return weight.t() if self.transposed else weight.flatten(1)

    def unpack(self, weight: nn.Parameter, options: Any, bias: Bias) -> nn.Module:
        """The float layer with these, in training mode; weight in the layer's own shape. The inverse of `pack`."""
        with torch.device("meta"):
            layer = self.blank(weight, options)
        layer.register_parameter("weight", weight)
        if "bias" in layer._parameters:
            layer.register_parameter("bias", bias)
        return layer

    def __reduce__(self) -> tuple[Callable[[str], LayerKind], tuple[str]]:
        """Copies and pickles of layers that hold a row hold the very row: its functions could not be pickled."""
        return named, (self.name,)


def _nothing(_layer: nn.Module) -> None:
    """Of kinds whose layers have no options, or no obstacle: None."""


def _looks_up_more(layer: nn.Embedding) -> str | None:
    """Why an embedding stays in float, None if nothing is in the way.

    With max_norm a lookup rescales rows in place; the two others are about gradients that a packed table does not have.
    """
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return "an embedding with max_norm, scale_grad_by_freq or sparse stays in float"
    if (
        (scale := layer._buffers.get("embed_scale")) is not None
        and scale.is_meta
        and not hasattr(layer, "scalar_embed_scale")
    ):
        return "its scale is not known before the model is loaded"
    return None


def _pads_otherwise(layer: nn.Conv2d) -> str | None:
    """Why a convolution stays in float: torch's function of a weight, which `QConv2d` calls, pads with zeros only."""
    if layer.padding_mode != "zeros":
        return f"a convolution with padding_mode={layer.padding_mode!r} has no packed form"
    return None


def _blank_table(weight: torch.Tensor, lookup: Any) -> nn.Module:
    """The table of this weight [rows, K] and Lookup."""
    rows, columns = weight.shape
    return (
        nn.Embedding(rows, columns, lookup.padding_idx)
        if lookup.scale is None
        else ScaledEmbedding(rows, columns, lookup)
    )


def _blank_conv2d(weight: torch.Tensor, g: Any) -> nn.Module:
    """The convolution of this weight [O, I / groups, height, width] and Geometry."""
    rows, inputs = weight.shape[:2]
    return nn.Conv2d(inputs * g.groups, rows, g.kernel_size, g.stride, g.padding, g.dilation, g.groups)


KINDS: tuple[LayerKind, ...] = (
    LayerKind(
        name="embedding",
        role="embedding",
        float_class=nn.Embedding,
        packed_class=QEmbedding,
        options=Lookup.of,
        pack=lambda weight, lookup, _bias: QEmbedding(weight, lookup),
        blank=_blank_table,
        obstacle=_looks_up_more,
        inputs="ids",
        subclasses=names.SCALED_EMBEDDING | {ScaledEmbedding.__name__},
    ),
    LayerKind(
        name="conv2d",
        role="linear",
        float_class=nn.Conv2d,
        packed_class=QConv2d,
        options=Geometry.of,
        pack=QConv2d,
        blank=_blank_conv2d,
        obstacle=_pads_otherwise,
        inputs="maps",
        plain_only=True,
    ),
    LayerKind(
        name="conv1d",
        role="conv1d",
        float_class=Conv1D,
        packed_class=QConv1D,
        options=_nothing,
        pack=lambda weight, _options, bias: QConv1D(weight, bias),
        blank=lambda weight, _options: Conv1D(weight.shape[1], weight.shape[0]),
        obstacle=_nothing,
        inputs="tokens",
        transposed=True,
    ),
    LayerKind(
        name="linear",
        role="linear",
        float_class=nn.Linear,
        packed_class=QLinear,
        options=_nothing,
        pack=lambda weight, _options, bias: QLinear(weight, bias),
        blank=lambda weight, _options: nn.Linear(weight.shape[1], weight.shape[0]),
        obstacle=_nothing,
        inputs="tokens",
        subclasses=names.PLAIN_LINEAR,
    ),
)
"""Of kinds that share a weight the first gives it its name in a folder: whoever reads that as a linear layer would miss
that it is a table, too."""


def named(name: str) -> LayerKind:
    """The row of this name, as folders and twins call it. Raises KeyError where there is none."""
    return {kind.name: kind for kind in KINDS}[name]


def find(layer: nn.Module) -> LayerKind | None:
    """The kind of a float layer, None if it has none: of another class, or a subclass that may compute otherwise.

    A subclass counts by its class's name alone, if its row lists that: it is known to compute the same.
    """
    for kind in KINDS:
        same = isinstance(layer, kind.float_class) and type(layer).__name__ in kind.subclasses
        if same or type(layer) is kind.float_class:
            return kind
    return None


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer of a kind stays in float whatever the scheme, as its kind says, or because it computes something of
    its own; None if nothing is in the way."""
    if "forward" in vars(layer):
        return "its forward was replaced in this instance, and a packed layer would not compute that"
    return of(layer).obstacle(layer)


def inside_wrappers(module: nn.Module) -> tuple[str, ...]:
    """Beginnings of the paths in `module` of what adapters add around a layer, whose own path goes on behind them.

    An adapter, of PEFT's, holds the layer under a name of `names.WRAPPED`; all else in it is its own, and trains.
    """
    beginnings: list[str] = []
    for path, part in module.named_modules(remove_duplicate=False):
        adapts = any(cls.__module__.split(".")[0] == "peft" for cls in type(part).__mro__)
        if adapts and any(name in part._modules for name in names.WRAPPED):
            own = [name for name in part._modules if name not in names.WRAPPED]
            beginnings += [f"{path}.{name}." if path else f"{name}." for name in own]
    return tuple(beginnings)


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Path in the module -> float layer that multiplies tokens by its weight.

    Classes of the table only: subclasses may compute something else.
    """
    classes = {kind.float_class for kind in KINDS if kind.inputs == "tokens"}
    return {path: layer for path, layer in module.named_modules() if type(layer) in classes}


def of(layer: nn.Module) -> LayerKind:
    """The kind of a float layer that has one. Raises KeyError where `find` gives None."""
    kind = find(layer)
    if kind is None:
        raise KeyError(type(layer).__name__)
    return kind


def of_packed(layer: PackedLayer) -> LayerKind:
    """The kind of the float layer in whose place a packed one is: the row of its class, or of the next one above it.

    Raises UsageError for a class that has no row.
    """
    for cls in type(layer).__mro__:
        for kind in KINDS:
            if cls is kind.packed_class and layer.packed.transposed == kind.transposed:
                return kind
    raise UsageError(f"a {type(layer).__name__} is of no kind that is saved or trained", "give it a row in nn/kinds.py")


def may_be_tied(layer: nn.Module) -> bool:
    """Whether a layer is of a kind, or of any subclass of one: then its `weight` may be another layer's as well."""
    return any(isinstance(layer, kind.float_class) for kind in KINDS)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a float layer, in its own shape; typed, which attributes of modules are not."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def bias_of(layer: nn.Module) -> Bias:
    """The bias of a layer, None if it has none."""
    return layer._parameters.get("bias")
