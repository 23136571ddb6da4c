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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spicerack.algorithms.method import Method
from spicerack.errors import SchemeError, UsageError, listed
from spicerack.kernels.kernel import Compute
from spicerack.nn.conv import Geometry, QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.fused import fuse
from spicerack.nn.gelu import JoinedGELU
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import module, recipe
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.runtime import hf
from spicerack.training.qat import gather
from spicerack.training.qat.fake_layers import Convertible, FakeLayer, Plan, convert
from spicerack.training.qat.start import (
    Learned,
    QATConfig,
    begun,
    choose,
    float_twin,
    observed,
    plan_from,
    plan_of,
    start,
)
from spicerack.training.qat.tuned_layers import Packed, Shared, TunedConv2d, TunedEmbedding, TunedLayer, tuned

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
    weights: bool = False,
) -> nn.Module:
    """`model`, changed in place: its layers compute with weights as they would be stored, and train through them.

    scheme, rules: as in `quantize`; convolutions are quantized like linear layers, except in transformers models.
    inputs: for static activations (a8s), batches that the float model is called with (mappings are keyword arguments)
    to find where their scales begin. Parameters stay the ones that they were, tied ones tied; scales come beside them,
    as `weight_scale`, `weight_zero` and `input_scale` (`scales` lists them). A layer on its own is not changed: the one
    that trains comes back.

    Of a packed model, which has its scheme, codes and zero points stay, and `weight_scale` is all that trains: every
    other parameter is frozen (requires_grad is False) until you say otherwise. weights: all of it trains instead, the
    weights from the middle of their codes' cells, scales and zero points from where they are.

    Raises RecipeError, SchemeError, ShapeError, WeightError, UsageError (prepared already, no inputs for static
    activations, no scheme for a float model or one for a packed model).
    """
    if any(True for _ in _trained(model)):
        raise UsageError(f"{type(model).__name__} is prepared already", "prepare the float model, and once")
    if packed := {n: part for n, part in model.named_modules(remove_duplicate=False) if isinstance(part, Packed)}:
        if scheme is not None or tuple(rules) or (config != _DEFAULTS and not weights):
            raise UsageError(
                f"{type(model).__name__} is packed: " + ("it has its scheme" if weights else "only its scales train"),
                "leave scheme, rules and config out (weights=True takes a config), or prepare the float model",
            )
        return _unpacked(model, packed, config) if weights else _tune(model, packed)
    if scheme is None or weights:
        raise UsageError(
            f"{type(model).__name__} is not packed" + ("" if weights else ", and no scheme was given"),
            "prepare_qat(model, 'w4g32')",
        )
    what = recipe.of(scheme, rules)
    if what.method not in (None, Method()):
        raise UsageError(f"training has no use for {what.method}", "leave the method out: it begins with rounding")
    layers, chosen = choose(model, what)
    plans = {name: plan_of(name, layer, chosen[name], config) for name, layer in layers.items()}
    static = observed(model, {n: layers[n] for n, s in chosen.items() if s.activations == "static"}, inputs)
    started: dict[int, Learned] = {}
    for name, layer in layers.items():
        if id(layer.weight) not in started:
            started[id(layer.weight)] = start(name, layer, plans[name], config.init or what.range_)
    return _converted(model, layers, plans, started, static)


def _converted(
    model: nn.Module,
    layers: Mapping[str, Convertible],
    plans: Mapping[str, Plan],
    started: Mapping[int, Learned],
    static: Mapping[int, torch.Tensor],
) -> nn.Module:
    """`model`, changed in place. started: by id of weights; static: by id of layers."""
    made: dict[int, FakeLayer] = {}
    for name, layer in layers.items():
        if id(layer) not in made:
            made[id(layer)] = convert(layer, plans[name], *started[id(layer.weight)], static.get(id(layer)))
    if frozen := [name for name, layer in layers.items() if not layer.weight.requires_grad]:
        warnings.warn(
            f"{listed(frozen, _LISTED, 'layers')}: rounded, but not trained (requires_grad is False)", stacklevel=3
        )
    if "" in layers:
        return made[id(model)]
    for name, layer in layers.items():
        model.set_submodule(name, made[id(layer)])
    _tell(model)
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

    `model` is not changed: it can train on. compute: as in `load`. Within DistributedDataParallel, the model in it is
    frozen. One that FSDP2 shards is gathered, a weight at a time: all processes call this together, and each gets the
    whole copy, on the CPU. Raises UsageError (not prepared, or sharded otherwise), WeightError.
    """
    model = gather.unwrapped(model)
    sharded = gather.resharded(model)
    layers = dict(_trained(model))
    if not layers:
        raise UsageError(f"{type(model).__name__} is not prepared", "use spicerack.prepare_qat(model, scheme) first")
    packed: dict[tuple[int, bool], PackedWeight] = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.plan.scheme.activations is not None:
            raise SchemeError(
                f"{name}: {layer.plan.scheme}: packed convolutions compute with float activations so far",
                "train it without a8",
            )
        if (key := _key(layer)) not in packed:
            own = _own(layer)
            dtype = layer.layout.weight_dtype if isinstance(layer, TunedLayer) else own.dtype
            q = (gather.whole(layer) if sharded else layer).qtensor(module.weight_of(name))
            packed[key] = PackedWeight(q, dtype, "cpu" if sharded else own.device, compute)
    large = [layer.codes if isinstance(layer, TunedLayer) else layer.weight for layer in layers.values()]
    copied = gather.copied if sharded else copy.deepcopy
    small = copied(model, {id(one): one for one in large})  # they leave at once, and are never there twice
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
            hf.tell_transformers(part)
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
    made = {id(layer): module.as_before(tuned(layer, shared[id(layer.packed)]), layer) for layer in layers.values()}
    model.requires_grad_(False)
    if "" in layers:
        return made[id(model)]
    for name, layer in layers.items():
        model.set_submodule(name, made[id(layer)])
    _separate(model)
    _tell(model)
    return model


def _unpacked(model: nn.Module, layers: dict[str, Packed], config: QATConfig) -> nn.Module:
    """`model`, changed in place: all of it trains, from what its packed layers hold."""
    tied: dict[int, nn.Parameter] = {}
    codes = {id(layer.packed): layer.packed.qtensor() for layer in layers.values()}
    floats: dict[str, Convertible] = {}
    made: dict[int, Convertible] = {}
    for name, layer in layers.items():
        if id(layer.packed) not in tied:
            tied[id(layer.packed)] = nn.Parameter(layer.weight.detach().contiguous())
        if id(layer) not in made:
            made[id(layer)] = float_twin(layer, tied[id(layer.packed)])
        floats[name] = made[id(layer)]
    plans, started, static = {}, {}, {}
    for name, layer in layers.items():
        q = codes[id(layer.packed)]
        plans[name] = plan_from(name, floats[name], q, config)
        started[id(floats[name].weight)] = begun(q, floats[name].weight)
        if q.input_scale is not None:
            static[id(floats[name])] = q.input_scale.to(floats[name].weight).reshape(1, 1)
    for name, old in layers.items():
        module.as_before(floats[name], old)
        if name:
            model.set_submodule(name, floats[name])
    _separate(model)
    return _converted(model if "" not in layers else floats[""], floats, plans, started, static)


def _tell(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            hf.tell_trainers(part)


def _separate(model: nn.Module) -> None:
    """Activations that were joined with packed layers, which are gone, are themselves again."""
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if isinstance(part, JoinedGELU):
            model.set_submodule(name, part.activation)


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
        return module.as_before(QConv2d(packed, geometry, bias), old)
    if isinstance(old, nn.Embedding | TunedEmbedding):
        return module.as_before(QEmbedding(packed, old.padding_idx), old)
    return module.as_before(QLinear(packed, bias), old)
