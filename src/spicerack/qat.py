"""Quantization-aware training: `prepare_qat` before any training loop, `freeze` behind it.

    model = spicerack.prepare_qat(model, "w4g32")
    ...                                                     # the loop: the model computes with rounded weights
    small = spicerack.freeze(model)
    spicerack.save(small, "out")

The layers are those of `nn/fake_layers.py`, what is learned that of `nn/fake.py`. A model that is packed already trains
its scales alone, in the layers of `nn/tuned_layers.py`.
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
from spicerack.nn.gelu import JoinedGELU
from spicerack.nn.linear import QLinear
from spicerack.nn.packed import PackedWeight
from spicerack.nn.tuned_layers import Packed, Shared, TunedConv2d, TunedEmbedding, TunedLayer, tuned
from spicerack.qat_start import Learned, QATConfig, choose, observed, plan_of, start
from spicerack.recipe import Recipe, Rule
from spicerack.scheme import Scheme, parse

_DEFAULTS = QATConfig()
_LISTED = 8
Trained = FakeLayer | TunedLayer


def prepare_qat(
    model: nn.Module,
    scheme: str | Scheme | Recipe | None = None,
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
    that trains comes back.

    Of a packed model, which takes no scheme, codes and zero points stay, and `weight_scale` is all that trains: every
    other parameter is frozen (requires_grad is False) until you say otherwise.

    Raises RecipeError, SchemeError, ShapeError, WeightError, UsageError (prepared already, no inputs for static
    activations, no scheme for a float model or one for a packed model).
    """
    if any(True for _ in _trained(model)):
        raise UsageError(f"{type(model).__name__} is prepared already", "prepare the float model, and once")
    if packed := {n: part for n, part in model.named_modules(remove_duplicate=False) if isinstance(part, Packed)}:
        if scheme is not None or tuple(rules) or config != _DEFAULTS:
            raise UsageError(
                f"{type(model).__name__} is packed: its codes stay what they are, and only scales train",
                "prepare_qat(model) without scheme, rules and config; for other codes prepare the float model",
            )
        return _tune(model, packed)
    if scheme is None:
        raise UsageError(
            f"{type(model).__name__} is not packed, and no scheme was given", "prepare_qat(model, 'w4g32')"
        )
    what = scheme if isinstance(scheme, Recipe) else Recipe(parse(scheme) if isinstance(scheme, str) else scheme)
    what = what.then(recipe.rule(r) if isinstance(r, str) else r for r in rules)
    if what.method not in (None, Method()):
        raise UsageError(f"training has no use for {what.method}", "leave the method out: it begins with rounding")
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
    found = [
        layer._parameters.get(name)
        for _, layer in _trained(model)
        for name in ("weight_scale", "weight_zero", "input_scale")
    ]
    return list(dict.fromkeys(part for part in found if part is not None))


def freeze(model: nn.Module, *, compute: Compute | None = None) -> nn.Module:
    """A copy of a prepared model with packed layers, whose codes are those that it computes with; `save` writes it.

    `model` is not changed: it can train on. compute: as in `load`. Raises UsageError (not prepared, or
    sharded), WeightError.
    """
    layers = dict(_trained(model))
    if not layers:
        raise UsageError(f"{type(model).__name__} is not prepared", "use spicerack.prepare_qat(model, scheme) first")
    packed: dict[tuple[int, bool], PackedWeight] = {}
    for name, layer in layers.items():
        own = _own(layer)
        if isinstance(own, DTensor):
            raise UsageError(
                f"{name}.weight is sharded over processes", "gather the state dict, and load it into a prepared model"
            )
        if isinstance(layer, nn.Conv2d) and layer.plan.scheme.activations is not None:
            raise SchemeError(
                f"{name}: {layer.plan.scheme}: packed convolutions compute with float activations so far",
                "train it without a8",
            )
        if (key := _key(layer)) not in packed:
            dtype = layer.layout.weight_dtype if isinstance(layer, TunedLayer) else own.dtype
            packed[key] = PackedWeight(layer.qtensor(swap.weight_of(name)), dtype, own.device, compute)
    large = [layer.codes if isinstance(layer, TunedLayer) else layer.weight for layer in layers.values()]
    small = copy.deepcopy(model, {id(one): one for one in large})  # they leave at once, and are never there twice
    old = {name: small.get_submodule(name) for name in layers}
    new: dict[int, nn.Module] = {}
    for name, trained in old.items():
        assert isinstance(trained, Trained)
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


def _trained(model: nn.Module) -> Iterator[tuple[str, Trained]]:
    """Under all their names."""
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Trained):
            yield name, layer


def _tune(model: nn.Module, layers: dict[str, Packed]) -> nn.Module:
    """`model`, changed in place: the scales of its packed layers train, and nothing else."""
    shared = {id(layer.packed): Shared(name, layer.packed) for name, layer in layers.items()}
    made = {id(layer): swap.as_before(tuned(layer, shared[id(layer.packed)]), layer) for layer in layers.values()}
    model.requires_grad_(False)
    if "" in layers:
        return made[id(model)]
    for name, layer in layers.items():
        model.set_submodule(name, made[id(layer)])
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if isinstance(part, JoinedGELU):  # what it was joined with is gone
            model.set_submodule(name, part.activation)
    return model


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more layers" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# ---- what is frozen --------------------------------------------------------------------------------------------------


def _own(layer: Trained) -> nn.Parameter:
    """What tied layers have in common."""
    own = layer.weight_scale if isinstance(layer, TunedLayer) else layer.weight
    assert isinstance(own, nn.Parameter)
    return own


def _key(layer: Trained) -> tuple[int, bool]:
    return id(_own(layer)), isinstance(layer, Conv1D)


def _frozen(old: Trained, packed: PackedWeight) -> nn.Module:
    """The packed layer in the place of `old`, with its bias, its mode and its hooks."""
    bias = old._parameters.get("bias")
    if isinstance(old, nn.Conv2d | TunedConv2d):
        geometry = old.geometry if isinstance(old, TunedConv2d) else Geometry.of(old)
        return swap.as_before(QConv2d(packed, geometry, bias), old)
    if isinstance(old, nn.Embedding | TunedEmbedding):
        return swap.as_before(QEmbedding(packed, old.padding_idx), old)
    return swap.as_before(QLinear(packed, bias), old)
