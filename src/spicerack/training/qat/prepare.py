"""Quantization-aware training: `prepare_qat` before any training loop, `freeze` behind it.

    model = spicerack.prepare_qat(model, "w4g32")
    ...                                                     # the loop: the model computes with rounded weights
    small = spicerack.freeze(model)
    spicerack.save(small, "out")

A float model gets the layers of `fake_layers` in the places of its own, with its own parameters in them, which round
as they compute; what is learned beside the weights, and every gradient, is told in `numerics/fake.py`. A packed model
gets those of `tuned_layers`, whose codes stay and whose scales train; or, with weights=True, it becomes a float model
first, its weights in the middle of their codes' cells, and is then prepared like any other.

Replacing is the last step: all that can be refused is refused before the model changes. `freeze` asks each layer for
the codes that it computes with, so that nothing is searched or rounded once more, and puts packed layers into a copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.algorithms.method import Method
from spicerack.arguments import checked
from spicerack.errors import SchemeError, UsageError, listed
from spicerack.kernels.kernel import Compute
from spicerack.nn import kinds
from spicerack.nn.kinds import LayerKind
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import recipe as recipes
from spicerack.quantization.modules.copies import as_before, with_packed
from spicerack.quantization.modules.layers import weight_name
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.runtime import hf
from spicerack.training.qat import gather
from spicerack.training.qat.start import (
    QATConfig,
    choose,
    first_scales,
    learned_of,
    observed,
    rounding_as,
    rounding_of,
)
from spicerack.training.qat.trained import TrainedLayer
from spicerack.training.qat.tuned_layers import SharedWeight
from spicerack.training.qat.twins import Learned, Start, fake_twin, tuned_twin

_DEFAULTS = QATConfig()
_LISTED = 8
"""Layers that a message names before it counts the rest."""


@checked
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

    Parameters stay the ones that they were, tied ones tied; scales come beside them, as `weight_scale`, `weight_zero`
    and `input_scale` (`scales` lists them). A layer on its own is not changed: the one that trains comes back. Of a
    packed model codes and zero points stay, and `weight_scale` is all that trains: every other parameter is frozen
    (requires_grad is False) until you say otherwise.

    scheme    as in `quantize`: a name, a Scheme or a Recipe; a packed model has its own, and takes None
    rules     as in `quantize`, which decides in the same way which layers these are
    config    how weights are rounded while they train; None in it is the default of the scheme
    inputs    for static activations (a8s): batches that the float model is called with, to find where their scales
              begin; mappings are keyword arguments
    weights   of a packed model all trains instead, weights from the middle of their codes' cells, scales and zero
              points from where they are

    Raises RecipeError, SchemeError, ShapeError, WeightError, UsageError (prepared already, no inputs for static
    activations, no scheme for a float model or one for a packed model).
    """
    if _trained(model):
        raise UsageError(f"{type(model).__name__} is prepared already", "prepare the float model, and once")
    if packed := _packed(model):
        if scheme is not None or tuple(rules) or (config != _DEFAULTS and not weights):
            raise UsageError(
                f"{type(model).__name__} is packed: " + ("it has its scheme" if weights else "only its scales train"),
                "leave scheme, rules and config out (weights=True takes a config), or prepare the float model",
            )
        return _unpacked(model, packed, config) if weights else _tuned(model, packed)
    if scheme is None or weights:
        raise UsageError(
            f"{type(model).__name__} is not packed" + ("" if weights else ", and no scheme was given"),
            "prepare_qat(model, 'w4g32')",
        )
    recipe = recipes.of(scheme, rules)
    if recipe.method not in (None, Method()):
        raise UsageError(f"training has no use for {recipe.method}", "leave the method out: it begins with rounding")
    return _rounded(model, recipe, config, inputs)


@checked
def scales(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales and zero points of a prepared model, each once, static scales of activations among them.

    For an optimizer's group of their own: a scale that decays is a grid that shrinks.
    """
    parameters = [
        layer._parameters.get(name)
        for layer in _trained(model).values()
        for name in ("weight_scale", "weight_zero", "input_scale")
    ]
    return list(dict.fromkeys(part for part in parameters if part is not None))


@checked
def freeze(model: nn.Module, *, compute: Compute | None = None) -> nn.Module:
    """A copy of a prepared model with packed layers, whose codes are those that it computes with; `save` writes it.

    `model` is not changed: it can train on. compute: as in `load`, of the copy. Within DistributedDataParallel, the
    model in it is frozen. One that FSDP2 shards is gathered, a weight at a time: all processes call this together, and
    each gets the whole copy, on the CPU. Raises UsageError (not prepared, or sharded otherwise), WeightError.
    """
    model = gather.unwrapped(model)
    sharded = gather.resharded(model)
    layers = _trained(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} is not prepared", "use spicerack.prepare_qat(model, scheme) first")
    weights: dict[tuple[int, bool], PackedWeight] = {}
    for name, layer in layers.items():
        if layer.kind.inputs == "maps" and layer.scheme.activations is not None:
            raise SchemeError(
                f"{name}: {layer.scheme}: packed convolutions compute with float activations so far",
                "train it without a8",
            )
        if (key := _key(layer)) not in weights:
            q = (gather.whole(layer) if sharded else layer).qtensor(weight_name(name))
            device = torch.device("cpu") if sharded else layer.tied.device
            weights[key] = PackedWeight(q, layer.weight_dtype, device, compute)
    small = with_packed(
        model,
        {name: weights[_key(layer)] for name, layer in layers.items()},
        _kind_of,
        [layer.largest for layer in layers.values()],
        gather.copied if sharded else copy.deepcopy,
    )
    if "_original_forward" in vars(small):  # accelerate's wrapper, which would call the model that was copied
        del vars(small)["_original_forward"], vars(small)["forward"]
    return small


# ---- what is there ---------------------------------------------------------------------------------------------------


def _trained(model: nn.Module) -> dict[str, TrainedLayer]:
    """Path -> layer that is trained in few bits, under all their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in modules if isinstance(layer, TrainedLayer)}


def _packed(model: nn.Module) -> dict[str, PackedLayer]:
    """Path -> packed layer, under all their names, those of experts in a stack too."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in modules if isinstance(layer, PackedLayer)}


def _kind_of(layer: nn.Module) -> LayerKind:
    """That of a trained layer."""
    assert isinstance(layer, TrainedLayer)
    return layer.kind


def _key(layer: TrainedLayer) -> tuple[int, bool]:
    """Layers with one key are frozen to one PackedWeight: a Conv1D reads the same numbers the other way round."""
    return id(layer.tied), layer.kind.transposed


# ---- what is prepared ------------------------------------------------------------------------------------------------


def _rounded(model: nn.Module, recipe: Recipe, config: QATConfig, inputs: Iterable[Any]) -> nn.Module:
    """A float model, changed in place: the recipe's layers round as they compute.

    inputs: batches to find static scales of activations by. Layers that are tied share what is learned.
    """
    layers, schemes = choose(model, recipe)
    roundings = {name: rounding_of(name, layer, schemes[name], config) for name, layer in layers.items()}
    static = {name: layers[name] for name, scheme in schemes.items() if scheme.activations == "static"}
    ranges = observed(model, static, inputs)
    learned: dict[int, Learned] = {}
    for name, layer in layers.items():
        if id(layer.weight) not in learned:
            learned[id(layer.weight)] = first_scales(name, layer, roundings[name], config.init or recipe.range_)
    starts = {
        name: Start(layer, roundings[name], learned[id(layer.weight)], ranges.get(id(layer)))
        for name, layer in layers.items()
    }
    return _converted(model, starts)


def _unpacked(model: nn.Module, layers: Mapping[str, PackedLayer], config: QATConfig) -> nn.Module:
    """A packed model, changed in place: all of it trains, from what its packed layers hold.

    Weights begin where their codes decode to, which is the middle of the codes' cells, so that it computes what it did.
    """
    codes = {id(layer.packed): layer.packed.qtensor() for layer in layers.values()}
    floats = _float_twins(layers)
    learned: dict[int, Learned] = {}
    starts: dict[str, Start] = {}
    for name, layer in floats.items():
        q, weight = codes[id(layers[name].packed)], kinds.weight_of(layer)
        how = rounding_as(name, layer, q, config)
        if id(weight) not in learned:
            learned[id(weight)] = learned_of(q, weight)
        static = None if q.input_scale is None else q.input_scale.to(weight).reshape(1, 1)
        starts[name] = Start(layer, how, learned[id(weight)], static)
    for name, old in layers.items():
        as_before(floats[name], old)
        if name:
            model.set_submodule(name, floats[name])
    return _converted(floats.get("", model), starts)


def _float_twins(layers: Mapping[str, PackedLayer]) -> dict[str, nn.Module]:
    """Path -> the float layer that each was quantized from, with the weight that it holds; one where they are one."""
    weights: dict[int, nn.Parameter] = {}
    floats: dict[int, nn.Module] = {}
    for layer in layers.values():
        kind = kinds.of_packed(layer)
        if id(layer.packed) not in weights:
            weights[id(layer.packed)] = nn.Parameter(layer.decode().contiguous())
        if id(layer) not in floats:
            floats[id(layer)] = kind.unpack(weights[id(layer.packed)], kind.options(layer), layer.bias)
    return {name: floats[id(layer)] for name, layer in layers.items()}


def _converted(model: nn.Module, starts: Mapping[str, Start]) -> nn.Module:
    """`model`, changed in place: the layers at these paths train in few bits. Warns of those whose weight does not."""
    trained: dict[int, TrainedLayer] = {}
    for name, start in starts.items():
        if id(start.layer) not in trained:
            trained[id(start.layer)] = fake_twin(name, start)
    if frozen := [name for name, start in starts.items() if not kinds.weight_of(start.layer).requires_grad]:
        warnings.warn(
            f"{listed(frozen, _LISTED, 'layers')}: rounded, but not trained (requires_grad is False)", stacklevel=5
        )
    return _replaced(model, {name: trained[id(start.layer)] for name, start in starts.items()})


def _tuned(model: nn.Module, layers: Mapping[str, PackedLayer]) -> nn.Module:
    """A packed model, changed in place: the scales of its packed layers train, and nothing else.

    layers: path -> packed layer. Layers that are tied share one scale. Raises SchemeError for scales that are no plain
    floats, before anything is replaced.
    """
    shared: dict[int, SharedWeight] = {}
    trained: dict[int, TrainedLayer] = {}
    for name, layer in layers.items():
        if id(layer.packed) not in shared:
            shared[id(layer.packed)] = SharedWeight(name, layer.packed)
        if id(layer) not in trained:
            new = tuned_twin(name, layer, shared[id(layer.packed)])
            as_before(new, layer)
            trained[id(layer)] = new
    model.requires_grad_(False)
    return _replaced(model, {name: trained[id(layer)] for name, layer in layers.items()})


def _replaced(model: nn.Module, layers: Mapping[str, TrainedLayer]) -> nn.Module:
    """`model`, changed in place to have these layers, or the layer itself if it is all there is."""
    if "" in layers:
        return layers[""]
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoderLayer):  # its fast path calls no layer: inputs would not be rounded
            part.activation_relu_or_gelu = 0
    _tell(model)
    return model


def _tell(model: nn.Module) -> None:
    """Let the transformers models in it know that they train."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            hf.tell_trainers(part)
