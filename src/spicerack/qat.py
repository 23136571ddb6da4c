"""Quantization-aware training: `prepare_qat` before any training loop, `freeze` behind it.

model = spicerack.prepare_qat(model, "w4g32")
...                                                    # the loop: the model computes with rounded weights
small = spicerack.freeze(model)
spicerack.save(small, "out")
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spicerack import recipe, swap
from spicerack.algorithms import rtn
from spicerack.errors import RecipeError, SchemeError, UsageError
from spicerack.kernel import Compute
from spicerack.levels import dtype_of
from spicerack.nn.conv import Geometry, QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.fake import Clip, Grid
from spicerack.nn.fake_layers import LEARNED, Convertible, FakeLayer, Plan, Quantizer, convert
from spicerack.nn.fused import fuse
from spicerack.nn.linear import QLinear
from spicerack.nn.packed import PackedWeight
from spicerack.recipe import Recipe, Rule
from spicerack.scheme import IntLevels, Scheme, parse
from spicerack.search import is_ternary

Init = Literal["opt", "absmax", "lsq"]
_CLIPS: dict[Quantizer, Clip] = {"lsq": "levels", "seq": "cells", "absmax": "cells", "absmean": "none"}
_LISTED = 8


@dataclass(frozen=True, slots=True)
class QATConfig:
    """How weights are rounded while they train; None is the default of the scheme (docs/training.md).

    quantizer   "lsq": scales and zero points are learned (LSQ, LSQ+); "seq": the same, on ParetoQ's stretched grid;
                "absmax": each step from the weights' range; "absmean": from the mean of |w|, as BitNet b1.58
    init        where learned scales begin: "opt": least squared error; "absmax": the range; "lsq": 2 mean|w| / sqrt(Qp)
    """

    quantizer: Quantizer | None = None
    init: Init | None = None


def prepare_qat(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    rules: Iterable[str | Rule] = (),
    config: QATConfig = QATConfig(),
) -> nn.Module:
    """`model`, changed in place: its layers compute with weights as they would be stored, and train through them.

    scheme, rules: as in `quantize`; convolutions are quantized like linear layers, except in transformers models.
    Parameters stay the ones that they were, tied ones tied; scales come beside them, as `weight_scale` and
    `weight_zero` (`scales` lists them). A layer on its own is not changed: the one that trains comes back.
    Raises RecipeError, SchemeError, ShapeError, WeightError, UsageError (prepared already).
    """
    what = scheme if isinstance(scheme, Recipe) else Recipe(parse(scheme) if isinstance(scheme, str) else scheme)
    what = what.then(recipe.rule(r) if isinstance(r, str) else r for r in rules)
    if any(True for _ in _fakes(model)):
        raise UsageError(f"{type(model).__name__} is prepared already", "prepare the float model, and once")
    layers, chosen = _choose(model, what)
    plans = {name: _plan(name, layer, chosen[name], config) for name, layer in layers.items()}
    started: dict[int, _Learned] = {}
    made: dict[int, FakeLayer] = {}
    for name, layer in layers.items():
        key = id(layer.weight)
        if key not in started:
            started[key] = _start(name, layer, plans[name], config.init or what.range_)
        if id(layer) not in made:
            made[id(layer)] = convert(layer, plans[name], *started[key])
    if frozen := [name for name, layer in layers.items() if not layer.weight.requires_grad]:
        warnings.warn(f"{_few(frozen)}: rounded, but not trained (requires_grad is False)", stacklevel=2)
    if "" in layers:
        return made[id(model)]
    for name, layer in layers.items():
        model.set_submodule(name, made[id(layer)])
    _tie_scales(model)
    return model


def scales(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales and zero points, each once: for an optimizer's group without weight decay."""
    found = (part for _, layer in _fakes(model) for part in (layer.weight_scale, layer.weight_zero) if part is not None)
    return list(dict.fromkeys(found))


def freeze(model: nn.Module, *, compute: Compute | None = None) -> nn.Module:
    """A copy of a prepared model with packed layers, whose codes are those that it computes with; `save` writes it.

    `model` is not changed: it can train on. compute: as in `load`. Raises UsageError (not prepared, or
    sharded), WeightError.
    """
    layers = dict(_fakes(model))
    if not layers:
        raise UsageError(f"{type(model).__name__} is not prepared", "use spicerack.prepare_qat(model, scheme) first")
    packed: dict[tuple[int, bool], PackedWeight] = {}
    for name, layer in layers.items():
        if isinstance(layer.weight, DTensor):
            raise UsageError(
                f"{name}.weight is sharded over processes", "gather the state dict, and load it into a prepared model"
            )
        if (key := _key(layer)) not in packed:
            packed[key] = PackedWeight(layer.qtensor(name), layer.weight.dtype, layer.weight.device, compute)
    shared = {id(layer.weight): layer.weight for layer in layers.values()}
    small = copy.deepcopy(model, dict(shared))  # the float weights, which leave at once, are never there twice
    new: dict[int, nn.Module] = {}
    for name in layers:
        old = small.get_submodule(name)
        if id(old) not in new:
            assert isinstance(old, FakeLayer)
            new[id(old)] = _frozen(old, packed[_key(old)])
        if not name:
            return new[id(old)]
    for name in layers:
        small.set_submodule(name, new[id(small.get_submodule(name))])
    fuse(small)
    for part in small.modules():
        if isinstance(part, PreTrainedModel):
            swap.tell_transformers(part)
    return small


# ---- what is prepared ------------------------------------------------------------------------------------------------

_Learned = tuple[nn.Parameter | None, nn.Parameter | None]
"""Scale and zero point."""


def _fakes(model: nn.Module) -> Iterator[tuple[str, FakeLayer]]:
    """Under all their names."""
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, FakeLayer):
            yield name, layer


def _choose(model: nn.Module, what: Recipe) -> tuple[dict[str, Convertible], dict[str, Scheme]]:
    """Path -> layer, and its scheme, for what is trained in few bits."""
    found = dict(swap.layers_of(model))
    roles = swap.roles_of(model, found)
    convolutions = dict(_convolutions(model))
    everything: dict[str, Convertible] = {**found, **convolutions}
    if not everything:
        raise RecipeError(f"{type(model).__name__} has no layer that is trained in few bits", "it needs linear layers")
    roles |= dict.fromkeys(convolutions, "linear")
    tied = swap.ties_of(everything, roles)
    decisions = recipe.resolve(what, {name: role for name, role in roles.items() if name not in tied}, tied)
    chosen = {name: scheme for name in everything if (scheme := decisions[name].scheme) is not None}
    if not chosen:
        raise RecipeError(
            f"{type(model).__name__} has no layer that the recipe quantizes",
            f"embeddings and heads must be named by a rule, such as '{next(iter(everything))}={what.scheme.name}'",
        )
    swap.check({n: found[n] for n in chosen if n in found}, {n: s for n, s in chosen.items() if n in found})
    for name, scheme in chosen.items():
        if name in convolutions:
            _check_convolution(name, convolutions[name], scheme)
    swap.check_owners(model, everything, chosen)
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
    if scheme.activations is not None:
        raise SchemeError(f"{name}: a convolution has no tokens to find scales of", "use the scheme without a8")
    scheme.check_shape(f"{name}.weight", (layer.out_channels, layer.weight[0].numel()))


def _plan(name: str, layer: Convertible, scheme: Scheme, config: QATConfig) -> Plan:
    levels = scheme.levels
    if not isinstance(levels, IntLevels) or not isinstance(scheme.scale, str) or scheme.min is not None:
        what = "its levels are a table" if not isinstance(levels, IntLevels) else "its scales are quantized themselves"
        raise SchemeError(f"{name}: {scheme} is not trained: {what}", "use integer levels, such as w4g32 or ternary")
    quantizer = config.quantizer or default_quantizer(scheme)
    if quantizer not in _CLIPS:
        raise UsageError(f"unknown quantizer {quantizer!r}", f"one of {', '.join(_CLIPS)}")
    if quantizer == "absmean" and not is_ternary(scheme):
        raise SchemeError(f"{name}: absmean is for ternary weights, not for {scheme}", "use lsq, seq or absmax")
    rows = layer.weight.shape[1] if isinstance(layer, Conv1D) else layer.weight.shape[0]
    block = scheme.block_shape(rows, layer.weight.numel() // rows)
    return Plan(scheme, quantizer, Grid(levels, block, _CLIPS[quantizer]), dtype_of(scheme.scale, layer.weight.dtype))


def default_quantizer(scheme: Scheme) -> Quantizer:
    """The best that was measured (docs/training.md)."""
    if is_ternary(scheme):
        return "absmean"
    return "seq" if scheme.bits == 2 else "lsq"


def _start(name: str, layer: Convertible, plan: Plan, init: Init) -> _Learned:
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
        q = rtn.solve(w, plan.scheme, range_=init, name=f"{name}.weight")
        assert isinstance(q.scale, torch.Tensor)
        scale, zero = q.scale, q.zero
    return tuple(  # type: ignore[return-value]
        None if part is None else nn.Parameter(part.to(weight), layer.weight.requires_grad) for part in (scale, zero)
    )


def _tie_scales(model: nn.Module) -> None:
    """Tell transformers of scales that are tied because their weights are: it stores them once, too."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            fakes = dict(_fakes(part))
            ties = {
                f"{alias.removesuffix('.weight')}.{key}": f"{owner.removesuffix('.weight')}.{key}"
                for alias, owner in part.all_tied_weights_keys.items()
                if (layer := fakes.get(alias.removesuffix(".weight"))) is not None
                for key in ("weight_scale", "weight_zero")
                if getattr(layer, key) is not None
            }
            if ties:
                part._tied_weights_keys = {**(part._tied_weights_keys or {}), **ties}
                part.all_tied_weights_keys |= ties


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more layers" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# ---- what is frozen --------------------------------------------------------------------------------------------------


def _key(layer: FakeLayer) -> tuple[int, bool]:
    return id(layer.weight), isinstance(layer, Conv1D)


def _frozen(old: FakeLayer, packed: PackedWeight) -> nn.Module:
    """The packed layer in the place of `old`, with its bias, its mode and its hooks."""
    bias = old._parameters.get("bias")
    if isinstance(old, nn.Conv2d):
        return swap.as_before(QConv2d(packed, Geometry.of(old), bias), old)
    if isinstance(old, nn.Embedding):
        return swap.as_before(QEmbedding(packed, old.padding_idx), old)
    assert isinstance(old, (nn.Linear, Conv1D))
    return swap.as_before(QLinear(packed, bias), old)
