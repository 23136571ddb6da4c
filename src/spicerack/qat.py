"""Quantization-aware training: `prepare_qat` before any training loop, `freeze` behind it.

    model = spicerack.prepare_qat(model, "w4g32")
    ...                                                     # the loop: the model computes with rounded weights
    small = spicerack.freeze(model)
    spicerack.save(small, "out")

The layers are those of `nn/fake_layers.py`, what is learned that of `nn/fake.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spicerack import recipe, swap
from spicerack.errors import SchemeError, UsageError
from spicerack.kernel import Compute
from spicerack.method import Method
from spicerack.nn.conv import Geometry, QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.fake_layers import FakeLayer, convert
from spicerack.nn.fused import fuse
from spicerack.nn.linear import QLinear
from spicerack.nn.packed import PackedWeight
from spicerack.qat_start import Learned, QATConfig, choose, observed, plan_of, start
from spicerack.recipe import Recipe, Rule
from spicerack.scheme import Scheme, parse

_DEFAULTS = QATConfig()
_LISTED = 8


def prepare_qat(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    rules: Iterable[str | Rule] = (),
    config: QATConfig = _DEFAULTS,
    inputs: Iterable[Any] = (),
) -> nn.Module:
    """`model`, changed in place: its layers compute with weights as they would be stored, and train through them.

    scheme, rules: as in `quantize`; convolutions are quantized like linear layers, except in transformers models.
    inputs: for static activations (a8s), batches that the float model is called with (mappings are keyword arguments)
    to find where their scales begin. Parameters stay the ones that they were, tied ones tied; scales come beside them,
    as `weight_scale`, `weight_zero` and `input_scale` (`scales` lists them). A layer on its own is not changed: the one
    that trains comes back. Raises RecipeError, SchemeError, ShapeError, WeightError, UsageError (prepared already, no
    inputs for static activations).
    """
    what = scheme if isinstance(scheme, Recipe) else Recipe(parse(scheme) if isinstance(scheme, str) else scheme)
    what = what.then(recipe.rule(r) if isinstance(r, str) else r for r in rules)
    if what.method not in (None, Method()):
        raise UsageError(f"training has no use for {what.method}", "leave the method out: it begins with rounding")
    if any(True for _ in _fakes(model)):
        raise UsageError(f"{type(model).__name__} is prepared already", "prepare the float model, and once")
    layers, chosen = choose(model, what)
    plans = {name: plan_of(name, layer, chosen[name], config) for name, layer in layers.items()}
    static = observed(model, {n: layers[n] for n, s in chosen.items() if s.activations == "static"}, inputs)
    started: dict[int, Learned] = {}
    made: dict[int, FakeLayer] = {}
    for name, layer in layers.items():
        key = id(layer.weight)
        if key not in started:
            started[key] = start(name, layer, plans[name], config.init or what.range_)
        if id(layer) not in made:
            made[id(layer)] = convert(layer, plans[name], *started[key], static.get(id(layer)))
    if frozen := [name for name, layer in layers.items() if not layer.weight.requires_grad]:
        warnings.warn(f"{_few(frozen)}: rounded, but not trained (requires_grad is False)", stacklevel=2)
    if "" in layers:
        return made[id(model)]
    for name, layer in layers.items():
        model.set_submodule(name, made[id(layer)])
    return model


def scales(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales and zero points, each once: for an optimizer's group without weight decay."""
    found = [part for _, layer in _fakes(model) for part in (layer.weight_scale, layer.weight_zero, layer.input_scale)]
    return list(dict.fromkeys(part for part in found if isinstance(part, nn.Parameter)))


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
        if layer.plan.scheme.activations is not None and isinstance(layer, nn.Conv2d):
            raise SchemeError(
                f"{name}: {layer.plan.scheme}: packed convolutions compute with float activations so far",
                "train it without a8",
            )
        if (key := _key(layer)) not in packed:
            packed[key] = PackedWeight(
                layer.qtensor(swap.weight_of(name)), layer.weight.dtype, layer.weight.device, compute
            )
    shared = {id(layer.weight): layer.weight for layer in layers.values()}
    small = copy.deepcopy(model, dict(shared))  # the float weights, which leave at once, are never there twice
    old = {name: small.get_submodule(name) for name in layers}
    new: dict[int, nn.Module] = {}
    for name, trained in old.items():
        assert isinstance(trained, FakeLayer)
        if id(trained) not in new:
            new[id(trained)] = _frozen(trained, packed[_key(layers[name])])
        if not name:
            return new[id(trained)]
        small.set_submodule(name, new[id(trained)])
    if "_original_forward" in vars(small):  # accelerate's wrapper, which would call the model that was copied
        del vars(small)["_original_forward"], vars(small)["forward"]
    fuse(small)
    for part in small.modules():
        if isinstance(part, PreTrainedModel):
            swap.tell_transformers(part)
    return small


# ---- what is prepared ------------------------------------------------------------------------------------------------


def _fakes(model: nn.Module) -> Iterator[tuple[str, FakeLayer]]:
    """Under all their names."""
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, FakeLayer):
            yield name, layer


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
