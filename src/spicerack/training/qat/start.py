"""What `prepare_qat` decides before it changes anything: which layers, how each is rounded, where scales begin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spicerack.errors import RecipeError, SchemeError, UsageError
from spicerack.nn.conv import QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.numerics import rounding
from spicerack.numerics.dtypes import SOURCE_BY_WORD
from spicerack.numerics.fake import Clip, Grid
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import module
from spicerack.quantization.recipe import Recipe
from spicerack.training.qat.fake_layers import LEARNED, Convertible, Plan, Quantizer, Ranges, range_of
from spicerack.training.qat.tuned_layers import Packed

Init = Literal["opt", "absmax", "lsq"]
Stored = Literal["float32", "float16", "bfloat16"]
_CLIPS: dict[Quantizer, Clip] = {"lsq": "levels", "seq": "cells", "absmax": "cells", "absmean": "none"}


@dataclass(frozen=True, slots=True)
class QATConfig:
    """How weights are rounded while they train; None is the default of the scheme (docs/training.md).

    quantizer   "lsq": scales and zero points are learned (LSQ, LSQ+); "seq": the same, on ParetoQ's stretched grid;
                "absmax": each step from the weights' range; "absmean": from the mean of |w|, as BitNet b1.58
    init        where learned scales begin: "opt": least squared error; "absmax": the range; "lsq": 2 mean|w| / sqrt(Qp)
    ranges      of static activations (a8s): "lsq": learned; "ema": a moving average
    stored      float type that the model will be stored in, which decides the type of scales; None: the weights' own
    """

    quantizer: Quantizer | None = None
    init: Init | None = None
    ranges: Ranges = "lsq"
    stored: Stored | None = None

    def __post_init__(self) -> None:
        for given, known in (
            (self.quantizer, get_args(Quantizer)),
            (self.init, get_args(Init)),
            (self.ranges, get_args(Ranges)),
            (self.stored, get_args(Stored)),
        ):
            if given is not None and given not in known:
                raise UsageError(f"QATConfig has no {given!r}", f"one of {', '.join(known)}")


Learned = tuple[nn.Parameter | None, nn.Parameter | None]
"""Scale and zero point."""


def choose(model: nn.Module, what: Recipe) -> tuple[dict[str, Convertible], dict[str, Scheme]]:
    """Path -> layer, and its scheme, for what is trained in few bits."""
    found = dict(module.layers_of(model))
    roles = module.roles_of(model, found)
    convolutions = dict(_convolutions(model))
    everything: dict[str, Convertible] = {**found, **convolutions}
    if not everything:
        raise RecipeError(f"{type(model).__name__} has no layer that is trained in few bits", "it needs linear layers")
    roles |= dict.fromkeys(convolutions, "linear")
    chosen, _ = module.chosen_of(model, what, everything, roles)
    weights_of = {
        name: dataclasses.replace(scheme, activations=None)
        if scheme.activations == "static" and not isinstance(everything[name], nn.Embedding)
        else scheme
        for name, scheme in chosen.items()
    }
    module.check({n: found[n] for n in chosen if n in found}, {n: s for n, s in weights_of.items() if n in found})
    for name, scheme in chosen.items():
        if name in convolutions:
            _check_convolution(name, convolutions[name], scheme)
    module.check_owners(model, everything, chosen)
    return {name: everything[name] for name in chosen}, chosen


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Those of plain modules: `load` fills convolutions of modules that are passed to it."""
    inside = [f"{name}." for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    if any(prefix == "." for prefix in inside):
        return
    for name, layer in model.named_modules(remove_duplicate=False):
        if type(layer) is nn.Conv2d and not name.startswith(tuple(inside)):
            yield name, layer


def _check_convolution(name: str, layer: nn.Conv2d, scheme: Scheme) -> None:
    if layer.padding_mode != "zeros":
        raise RecipeError(
            f"{name}: a convolution with padding_mode={layer.padding_mode!r} has no packed form", "skip it"
        )
    if scheme.activations == "token":
        raise SchemeError(f"{name}: a convolution has no tokens to find scales of", "use the scheme without a8")
    if "weight" not in dict(layer.named_parameters(recurse=False)) or layer.weight.is_meta:
        raise RecipeError(
            f"{module.weight_of(name)} is no parameter with values", "load it, or remove what computes it"
        )
    scheme.check_shape(module.weight_of(name), (layer.out_channels, layer.weight[0].numel()))


def plan_of(name: str, layer: Convertible, scheme: Scheme, config: QATConfig) -> Plan:
    """How `layer` is rounded. Raises SchemeError for a scheme that cannot be trained."""
    reason = scheme.levels_obstacle or scheme.scale_obstacle
    if reason is not None:
        raise SchemeError(f"{name}: {scheme} is not trained: {reason}", "use integer levels, such as w4g32 or ternary")
    quantizer = config.quantizer or default_quantizer(scheme)
    if quantizer == "absmean" and not scheme.is_ternary:
        raise SchemeError(f"{name}: absmean is for ternary weights, not for {scheme}", "use lsq, seq or absmax")
    rows = layer.weight.shape[1] if isinstance(layer, Conv1D) else layer.weight.shape[0]
    block = scheme.block_shape(rows, layer.weight.numel() // rows)
    return Plan(
        scheme,
        quantizer,
        Grid(scheme.integers, block, _CLIPS[quantizer]),
        dtype_of(scheme.scale, layer.weight.dtype if config.stored is None else SOURCE_BY_WORD[config.stored]),
        config.ranges,
    )


@torch.no_grad()
def observed(model: nn.Module, layers: Mapping[str, Convertible], inputs: Iterable[Any]) -> dict[int, torch.Tensor]:
    """id of layer -> the scale [1, 1] that holds the largest of its inputs."""
    if not layers:
        return {}
    found: dict[int, torch.Tensor] = {}

    def look(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen = range_of(args[0]).to(layer.get_parameter("weight"))
        found[id(layer)] = torch.maximum(found.get(id(layer), seen), seen)

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
        if id(layer) not in found:
            raise UsageError(
                f"{name}: nothing flowed through it to find its static scale by", "pass inputs=[batch, ...]"
            )
    return found


def default_quantizer(scheme: Scheme) -> Quantizer:
    """BitNet's for ternary weights, LSQ for all others (docs/training.md has what was measured)."""
    return "absmean" if scheme.is_ternary else "lsq"


def start(name: str, layer: Convertible, plan: Plan, init: Init) -> Learned:
    """What is learned, at its beginning. Scales have the weight's type, because FSDP takes no mixture."""
    if plan.quantizer not in LEARNED:
        return None, None
    weight = layer.weight.detach()
    w = (weight.t() if isinstance(layer, Conv1D) else weight.flatten(1)).contiguous().cpu()
    levels, tiles = plan.grid.levels, plan.grid.tiles(w).float().abs()
    zero: torch.Tensor | None = None
    if init == "lsq":
        if plan.scheme.zero:
            raise SchemeError(f"{name}: LSQ's first step is for symmetric levels, not for {plan.scheme}", "init='opt'")
        scale = 2 * tiles.mean((1, 3)) / math.sqrt(levels.hi + 0.5 * levels.half)
    elif init == "absmax" and plan.quantizer == "seq" and not plan.scheme.zero:
        scale = 2 * tiles.amax((1, 3)) / (levels.hi - levels.lo + 1)
    else:
        q = rounding.to_nearest(w, plan.scheme, range_=init, name=module.weight_of(name))
        scale, zero = q.plain_scale, q.zero
    return tuple(  # type: ignore[return-value]
        None if part is None else nn.Parameter(part.to(weight), layer.weight.requires_grad) for part in (scale, zero)
    )


# ---- of packed models ------------------------------------------------------------------------------------------------


def float_twin(layer: Packed, weight: nn.Parameter) -> Convertible:
    """The layer that `layer` was quantized from, with `weight` and the bias that is there."""
    made: Convertible
    rows, columns = weight.shape[:2]
    if isinstance(layer, QEmbedding):
        made = nn.Embedding(rows, columns, layer.padding_idx, device="meta")
    elif isinstance(layer, QConv2d):
        g: Any = layer.geometry
        made = nn.Conv2d(
            columns * g.groups, rows, g.kernel_size, g.stride, g.padding, g.dilation, g.groups, device="meta"
        )
    elif layer.packed.transposed:
        made = Conv1D(columns, rows)
    else:
        made = nn.Linear(columns, rows, device="meta")
    made.weight = weight
    if not isinstance(layer, QEmbedding):
        made.register_parameter("bias", layer.bias)
    return made


def plan_from(name: str, layer: Convertible, q: QTensor, config: QATConfig) -> Plan:
    """How a layer is rounded as `q` is, whose scales are where learning begins. Raises SchemeError."""
    quantizer = config.quantizer or "lsq"
    if quantizer not in LEARNED:
        raise SchemeError(f"{name}: {quantizer} finds scales anew, and does not begin where they are", "use lsq or seq")
    if config.init is not None:
        raise SchemeError(f"{name}: its scales begin where they are, not at {config.init}", "leave init out")
    plan = plan_of(name, layer, q.scheme, dataclasses.replace(config, quantizer=quantizer))
    return dataclasses.replace(plan, dtype=q.plain_scale.dtype)


def begun(q: QTensor, weight: torch.Tensor) -> Learned:
    """Scale and zero point of a packed weight, to be learned."""
    zero = None if q.zero is None else nn.Parameter(q.zero.to(weight))
    return nn.Parameter(q.plain_scale.to(weight)), zero
