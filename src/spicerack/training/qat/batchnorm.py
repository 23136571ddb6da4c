"""`fold_batchnorm`: batch normalisation into the layer before it, float or packed.

    gamma (W x + b - mean) / sqrt(var + eps) + beta  =  (f W) x + (f (b - mean) + beta),    f = gamma / sqrt(var + eps)

Of packed weights only the scales change, by the factor of their row: no code is rounded again. So a network may train
in few bits with its normalisation as it is, and lose it when it is frozen. Given up: scales are rounded to their type
once more, by at most half a unit in their last place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx, nn

from spicerack.arguments import checked
from spicerack.errors import RecipeError, WeightError
from spicerack.nn import kinds
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics import codec
from spicerack.numerics.scales import smallest_scale
from spicerack.training.qat.fake_layers import FakeLayer

_Norm = nn.BatchNorm1d | nn.BatchNorm2d
"""Normalisations that are folded: over channels, with running statistics."""
_Float = nn.Linear | nn.Conv2d
"""Float layers that a factor for each row can go into."""


@checked
def fold_batchnorm(model: nn.Module) -> nn.Module:
    """`model`, changed in place: each BatchNorm behind one nn.Conv2d, nn.Linear, or packed layer becomes an Identity.

    It computes what it computed in eval mode. Scales of packed layers are rounded to their type once more. Raises
    RecipeError (a model that torch.fx cannot trace, a prepared layer, a packed one without scales of its own for each
    row), WeightError (a scale that leaves its type).
    """
    for name, layer, place, norm in list(_pairs(model)):
        factor, shift = _line(norm)
        if isinstance(layer, FakeLayer):
            raise RecipeError(f"{name} is trained in few bits", "fold before prepare_qat, or behind freeze")
        if isinstance(layer, PackedLayer):
            layer.packed = _scaled(layer.packed, factor, name)
        else:
            assert isinstance(layer, _Float)
            layer.weight.data.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)).to(layer.weight.dtype))
        bias = shift if layer.bias is None else layer.bias.detach().float() * factor + shift
        if layer.bias is None:
            layer.bias = nn.Parameter(bias.to(norm.running_mean))
        else:
            layer.bias.data.copy_(bias)
        model.set_submodule(place, nn.Identity().train(norm.training))
    return model


class _Tracer(fx.Tracer):
    """Traces a model down to torch's own layers and to ours, which are not looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Called by torch.fx: whether a module is a single node of the graph, as torch's own layers and ours are."""
        return isinstance(m, (PackedLayer, FakeLayer)) or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, _Norm]]:
    """(path, layer, path, norm) where the norm reads a layer and nothing else sees what that computes.

    Raises RecipeError for a model that torch.fx cannot trace.
    """
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RecipeError(f"{type(model).__name__} cannot be traced: {error}", "fold its parts one by one") from error
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or calls.count(str(node.target)) > 1:
            continue
        norm, before = model.get_submodule(str(node.target)), node.args[0]
        if not isinstance(norm, _Norm) or norm.running_mean is None:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        name = str(before.target)
        layer = model.get_submodule(name)
        if calls.count(name) == 1 and _has_channels(layer):
            yield name, layer, str(node.target), norm


def _has_channels(layer: nn.Module) -> bool:
    """Whether what a layer computes has a channel for each row of its matrix, where a factor can go."""
    return isinstance(layer, _Float) or (isinstance(layer, PackedLayer) and kinds.of_packed(layer).inputs != "ids")


def _line(norm: _Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 factor [N] and shift [N] of a norm in eval mode: it computes factor * y + shift."""
    assert norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    return factor.float(), shift.float()


def _scaled(packed: PackedWeight, factor: torch.Tensor, name: str) -> PackedWeight:
    """A packed weight of the same codes, whose scales are multiplied by factor [N] of their row.

    Raises RecipeError if rows share scales, WeightError if a scale leaves its type.
    """
    q = packed.qtensor()
    if q.scheme.group[0] != 1 or q.scheme.scale_obstacle is not None:
        raise RecipeError(f"{name}: {q.scheme} has no scales for each row that a factor could go into", "keep the norm")
    scale = (q.plain_scale.float() * factor.to(q.plain_scale.device)[:, None]).to(q.plain_scale.dtype)
    scale = torch.where(scale == 0, smallest_scale(scale.dtype), scale)
    if not codec.scale_fits(scale):
        raise WeightError(f"{name}: a scale times its channel's factor is too large for {scale.dtype}", "keep the norm")
    folded = dataclasses.replace(q, scale=scale)
    device = next(iter(packed.tensors.values())).device
    kernel = packed.choice.kernel
    return PackedWeight(folded, packed.dtype, device, kernel.compute, kernel.engine)
