"""What `prepare_qat` decides before it changes anything: which layers, how each is rounded, where scales begin.

Of a float model `choose` says which layers train, by the rules that `quantize` has; `rounding_of` how each is rounded;
`first_scales` and `observed` where what is learned begins. Of a packed model the folder has said all that already:
`rounding_as` and `learned_of` take it from its QTensors.

    scale at the beginning, of a group of weights w on levels lo ... hi

    "opt"      least sum of (w - w^)^2, as `quantize` finds it
    "absmax"   the range of w, as `quantize` finds it; with the stretched grid 2 max |w| / (hi - lo + 1), ParetoQ's
    "lsq"      2 mean |w| / sqrt(hi), LSQ's own; half a level more under the root where levels are half-integers
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from spicerack.arguments import check_fields
from spicerack.errors import SchemeError, UsageError
from spicerack.nn import kinds
from spicerack.numerics import rounding
from spicerack.numerics.dtypes import SOURCE_BY_WORD
from spicerack.numerics.fake import Clip, Grid
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme
from spicerack.quantization.modules.checks import check, check_owners
from spicerack.quantization.modules.floats import nothing, warn_of_staying
from spicerack.quantization.modules.layers import layers_of, weight_name
from spicerack.quantization.modules.schemes import schemes_of
from spicerack.quantization.recipe import Recipe
from spicerack.training.qat import twins
from spicerack.training.qat.fake_layers import LEARNED, Quantizer, Ranges, Rounding, range_of
from spicerack.training.qat.twins import Learned

Init = Literal["opt", "absmax", "lsq"]
"""Where learned scales begin: see `QATConfig`."""
Stored = Literal["float32", "float16", "bfloat16"]
"""Float types that a model may be stored in."""
_CLIPS: dict[Quantizer, Clip] = {"lsq": "levels", "seq": "cells", "absmax": "cells", "absmean": "none"}
"""Where the weights of each quantizer count as clipped: `numerics/fake.py`."""


@dataclass(frozen=True, slots=True)
class QATConfig:
    """How weights are rounded while they train; None is the default of the scheme (docs/training.md).

    quantizer   "lsq": scales and zero points are learned (LSQ, LSQ+); "seq": the same, on ParetoQ's stretched grid;
                "absmax": each step from the weights' range; "absmean": from the mean of |w|, as BitNet b1.58
    init        where learned scales begin: "opt": least squared error; "absmax": the range; "lsq": 2 mean|w| / sqrt(Qp)
    ranges      of static activations (a8s): "lsq": learned; "ema": a moving average
    stored      float type that the model will be stored in, which decides the type of scales; None: the weights' own

    Raises UsageError for a word that is none of these.
    """

    quantizer: Quantizer | None = None
    init: Init | None = None
    ranges: Ranges = "lsq"
    stored: Stored | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for given, known in (
            (self.quantizer, get_args(Quantizer)),
            (self.init, get_args(Init)),
            (self.ranges, get_args(Ranges)),
            (self.stored, get_args(Stored)),
        ):
            if given is not None and given not in known:
                raise UsageError(f"QATConfig has no {given!r}", f"one of {', '.join(known)}")


# ---- of float models -------------------------------------------------------------------------------------------------


def choose(model: nn.Module, recipe: Recipe) -> tuple[dict[str, nn.Module], dict[str, Scheme]]:
    """Path -> layer, and its scheme, for what is trained in few bits: what `quantize` would round, and nothing else.

    model: a float model, or one with float layers left. recipe: its schemes and rules; how codes are chosen is of no
    concern here. Raises RecipeError, SchemeError, ShapeError, WeightError as that does. Static activations, which it
    refuses, can be trained.
    """
    layers = layers_of(model)
    if not layers:
        raise nothing(model, "has no layer that is trained in few bits", "it needs linear layers")
    schemes, _ = schemes_of(model, recipe, layers)
    layers = {name: layers[name] for name in schemes}
    for name, layer in layers.items():
        twins.of(name, kinds.of(layer))
    check(layers, {name: _of_weights(layers[name], scheme) for name, scheme in schemes.items()})
    check_owners(model, layers)
    warn_of_staying(model, stacklevel=6)
    return layers, schemes


def _of_weights(layer: nn.Module, scheme: Scheme) -> Scheme:
    """The scheme without static activations, for layers that have activations at all."""
    if scheme.activations == "static" and kinds.of(layer).inputs != "ids":
        return dataclasses.replace(scheme, activations=None)
    return scheme


def rounding_of(name: str, layer: nn.Module, scheme: Scheme, config: QATConfig) -> Rounding:
    """How `layer`, whose path is `name`, is rounded to `scheme` while it trains.

    The type that scales are stored in follows from that of the weight, or from `config.stored`. Raises SchemeError for
    a scheme that cannot be trained: gradients of scales are those of integer levels times plain floats.
    """
    reason = scheme.levels_obstacle or scheme.scale_obstacle
    if reason is not None:
        raise SchemeError(f"{name}: {scheme} is not trained: {reason}", "use integer levels, such as w4g32 or ternary")
    quantizer = config.quantizer or default_quantizer(scheme)
    if quantizer == "absmean" and not scheme.is_ternary:
        raise SchemeError(f"{name}: absmean is for ternary weights, not for {scheme}", "use lsq, seq or absmax")
    weight = kinds.weight_of(layer)
    rows, columns = kinds.of(layer).matrix(weight).shape
    source = weight.dtype if config.stored is None else SOURCE_BY_WORD[config.stored]
    grid = Grid(scheme.integers, scheme.group_shape(rows, columns), _CLIPS[quantizer])
    return Rounding(scheme, quantizer, grid, dtype_of(scheme.scale, source), config.ranges)


def default_quantizer(scheme: Scheme) -> Quantizer:
    """The quantizer that a scheme is trained by unless a QATConfig says otherwise.

    BitNet's for ternary weights, LSQ for all others (docs/training.md has what was measured).
    """
    return "absmean" if scheme.is_ternary else "lsq"


def first_scales(name: str, layer: nn.Module, how: Rounding, init: Init) -> Learned:
    """What is learned of a layer's weight, at its beginning, on the weight's device.

    Scales have the weight's type, because FSDP takes no mixture of types; they train if the weight does. init: "lsq" is
    LSQ's own first step, "absmax" with the stretched grid that of ParetoQ, and else what `quantize` would find. Raises
    SchemeError for LSQ's own first step where there are zero points, WeightError.
    """
    if how.quantizer not in LEARNED:
        return None, None
    weight = kinds.weight_of(layer).detach()
    w = kinds.of(layer).matrix(weight).contiguous().cpu()
    levels, tiles = how.grid.levels, how.grid.tiles(w).float().abs()
    zero: torch.Tensor | None = None
    if init == "lsq":
        if how.scheme.zero:
            raise SchemeError(f"{name}: LSQ's first step is for symmetric levels, not for {how.scheme}", "init='opt'")
        scale = 2 * tiles.mean((1, 3)) / math.sqrt(levels.hi + 0.5 * levels.half)
    elif init == "absmax" and how.quantizer == "seq" and not how.scheme.zero:
        scale = 2 * tiles.amax((1, 3)) / (levels.hi - levels.lo + 1)
    else:
        q = rounding.to_nearest(w, how.scheme, range_=init, name=weight_name(name))
        # that of zeros, which any scale fits, counts as the smallest: one of 1 would be far above what is learned
        scale, zero = torch.where(tiles.amax((1, 3)) == 0, 0, q.plain_scale), q.zero
    trains = kinds.weight_of(layer).requires_grad
    zeros = None if zero is None else nn.Parameter(zero.to(weight), trains)
    return nn.Parameter(scale.to(weight), trains), zeros


@torch.no_grad()
def observed(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Iterable[Any]) -> dict[int, torch.Tensor]:
    """id of layer -> the scale [1, 1] that holds the largest of its inputs, in the weight's type.

    inputs: batches that the model is called with, in eval mode; its parts keep their modes, and no hook stays. Raises
    UsageError for a layer that nothing flowed through.
    """
    if not layers:
        return {}
    ranges: dict[int, torch.Tensor] = {}

    def look(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A hook in front of each layer."""
        newest = range_of(args[0]).to(layer.get_parameter("weight"))
        ranges[id(layer)] = torch.maximum(ranges.get(id(layer), newest), newest)

    modes = {part: part.training for part in model.modules()}
    hooks = [layer.register_forward_pre_hook(look) for layer in dict.fromkeys(layers.values())]
    try:
        model.eval()
        for batch in inputs:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    for name, layer in layers.items():
        if id(layer) not in ranges:
            raise UsageError(
                f"{name}: nothing flowed through it to find its static scale by", "pass inputs=[batch, ...]"
            )
    return ranges


# ---- of packed models ------------------------------------------------------------------------------------------------


def rounding_as(name: str, layer: nn.Module, q: QTensor, config: QATConfig) -> Rounding:
    """How a float layer is rounded as `q`, its weight when it was packed, is: by its scheme, on its grid of scales.

    Raises SchemeError for a QATConfig that would find scales anew, and as `rounding_of` does.
    """
    quantizer = config.quantizer or "lsq"
    if quantizer not in LEARNED:
        raise SchemeError(f"{name}: {quantizer} finds scales anew, and does not begin where they are", "use lsq or seq")
    if config.init is not None:
        raise SchemeError(f"{name}: its scales begin where they are, not at {config.init}", "leave init out")
    how = rounding_of(name, layer, q.scheme, dataclasses.replace(config, quantizer=quantizer))
    return dataclasses.replace(how, dtype=q.plain_scale.dtype)


def learned_of(q: QTensor, weight: torch.Tensor) -> Learned:
    """Scale and zero point of a packed weight, to be learned, in the type of the float one."""
    zero = None if q.zero is None else nn.Parameter(q.zero.to(weight))
    return nn.Parameter(q.plain_scale.to(weight)), zero
