"""Whether an encoder has the parts that one native call can compute, and why not.

What the parts of a family are called is data (`models.families.encoders`); here it is checked, module by module, that a
model has these and no others. Whatever is not expected is an obstacle, by name: a module that nobody knows might do
anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import (
    FastGELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)

from spicerack.kernels import panels
from spicerack.kernels.multiply import PanelMatrix
from spicerack.kernels.plan import Function
from spicerack.models.families.encoders import ENCODERS, Encoder
from spicerack.nn import attention
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.gelu import is_gelu
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight

SLIDING = "sliding_attention"
"""What blocks whose attention is within a window say of themselves."""
_WIDTH = 16
"""Heads are multiples of it wide, as in `kernels.attention`."""
_OFF: dict[str, Any] = {
    "is_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0, "output_attentions": False,
    "output_hidden_states": False, "return_dict": True, "is_causal": False,
}  # fmt: skip
"""What a config may not ask for otherwise, as far as it speaks of it."""
_STEADY = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary positions whose frequencies do not depend on how long a sequence is."""
_FUNCTIONS: dict[type[nn.Module], Function] = {
    SiLUActivation: "silu", nn.SiLU: "silu", QuickGELUActivation: "gelu_quick", GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh", FastGELUActivation: "gelu_tanh",
}  # fmt: skip


def family_of(model: nn.Module) -> Encoder | None:
    """The encoder that `model` is, of exactly that class, or None; its parts may still be others."""
    kind = type(model)
    return next((e for e in ENCODERS if (e.model, e.file) == (kind.__name__, kind.__module__)), None)


def parts(model: nn.Module, family: Encoder) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all that a plan takes the place of: the model itself, and all but what runs by its own code."""
    own = {family.pooler, family.embed} - {""}
    for path, module in model.named_modules(remove_duplicate=False):
        if path.split(".")[0] not in own:
            yield path, module


def dtype(model: nn.Module, family: Encoder) -> torch.dtype:
    """The type of a model without an `obstacle`: of all its parts."""
    return next(t for _, module in parts(model, family) for t in _dtypes(module))


def project(model: nn.Module, family: Encoder) -> nn.Linear | None:
    """The layer behind the first norm, in a model that has one."""
    layer = model._modules.get(family.project)
    return layer if isinstance(layer, nn.Linear) else None


def head_width(block: nn.Module, family: Encoder) -> int:
    """Columns of a head of the block's attention."""
    path, attribute = family.block.heads
    width: int = vars(block.get_submodule(path))[attribute]
    return width


def function(module: nn.Module) -> Function | None:
    """What an activation computes, if a plan can."""
    if is_gelu(module):
        return "gelu"
    if type(module) is nn.GELU:
        return "gelu_tanh"
    return _FUNCTIONS.get(type(module))


def obstacle(model: PreTrainedModel, family: Encoder) -> str | None:
    """Why no plan can be made of `model`, of this family, as the end of a sentence; None if one can."""
    for key, value in model.config.to_dict().items():
        if key in _OFF and value not in (_OFF[key], None):
            return f"its config has {key}={value}"
    if family.looks_up and not str(model.config._attn_implementation).startswith(attention.NAME):
        return f"its attention is {model.config._attn_implementation}"
    expected = _expected(model, family)
    there, first = dict(parts(model, family)), None
    for path, module in there.items():
        fits = expected.get(path)
        if fits is None or not fits(module):
            return f"{path or 'it'} is a {type(module).__name__}"
        reason = _tensor_obstacle(module)
        for kind in () if reason else _dtypes(module):
            first = first or kind
            if kind != first:
                reason = f"is {_name(kind)}, and what comes before it is {_name(first)}"
        if reason is not None:
            return f"{path or 'it'} {reason}"
    missing = [path for path in expected if path not in there and path not in _optional(family, expected)]
    if missing:
        return f"it has no {missing[0]}"
    return _rotary_obstacle(model, family) or _heads_obstacle(model, family) or _share_obstacle(there.values())


def _heads_obstacle(model: nn.Module, family: Encoder) -> str | None:
    for block in model.get_submodule(family.blocks).children():
        if head_width(block, family) % _WIDTH:
            return f"widths of its heads are no multiples of {_WIDTH}"
    return None


def _share_obstacle(modules: Iterable[nn.Module]) -> str | None:
    """Of a model that is mostly float, for which torch has the faster products."""
    layers = [m for m in modules if isinstance(m, nn.Linear)]
    floats = sum(m.in_features * m.out_features for m in layers if not isinstance(m, QLinear))
    if 2 * floats > sum(m.in_features * m.out_features for m in layers):
        return "more than half of its layers' weights are float"
    return None


def _rotary_obstacle(model: nn.Module, family: Encoder) -> str | None:
    if not family.rotary:
        return None
    kinds = vars(model.get_submodule(family.rotary))["rope_type"]
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if kind not in _STEADY:
            return f"its rotary positions are {kind}"
    return None


def _expected(model: nn.Module, family: Encoder) -> dict[str, Callable[[nn.Module], bool]]:
    """Path -> whether a module there is of the class that belongs there."""
    file, data = vars(sys.modules[family.file]), family.block

    def exactly(*kinds: type) -> Callable[[nn.Module], bool]:
        return lambda module: type(module) in kinds

    layer, table, packed = exactly(QLinear, nn.Linear), exactly(nn.Embedding, QEmbedding), exactly(PackedWeight)
    norm = exactly(nn.LayerNorm)
    inner_norm = exactly(nn.LayerNorm, nn.Identity) if data.first else norm
    expected = {"": exactly(type(model)), family.blocks: exactly(nn.ModuleList)}
    expected |= {path: norm for path in (family.norm, family.final) if path}
    for path in _tables(family):
        expected |= {path: table, f"{path}.packed": packed}
    if family.project:
        expected |= {family.project: layer, f"{family.project}.packed": packed}
    blocks = [f"{family.blocks}.{name}" for name, _ in model.get_submodule(family.blocks).named_children()]
    for block in blocks:
        for path in (*data.qkv, data.out, *data.up, data.down):
            expected |= {f"{block}.{path}": layer, f"{block}.{path}.packed": packed}
        expected |= {f"{block}.{path}": inner_norm for path in data.norms}
        expected[f"{block}.{data.activation}"] = _has_function
    for path, name in family.classes.items():
        of_block = path.startswith(".")
        for place in [block + path.rstrip(".") for block in blocks] if of_block else [path]:
            expected[place] = exactly(file[name])
    idle = exactly(nn.Dropout, nn.Identity, *(file[name] for name in family.idle))
    return {path: idle for path, module in parts(model, family) if idle(module)} | expected


def _tables(family: Encoder) -> list[str]:
    """Paths of all tables."""
    path, name = family.distances
    return [table for table, _ in family.tables] + ([f"{path}.{name}"] if path else [])


def _optional(family: Encoder, expected: dict[str, Any]) -> set[str]:
    """Expected paths that need not be there: tables and layers may be float, a projection may be missing."""
    return {family.project} | {path for path in expected if path.endswith(".packed")}


def _has_function(module: nn.Module) -> bool:
    return function(module) is not None


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    """Of a module's own floats, and of those that a table's codes stand for; layers give what they get."""
    own = [p.dtype for p in module._parameters.values() if p is not None]
    return [module.packed.dtype] if isinstance(module, QEmbedding) else own


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _tensor_obstacle(module: nn.Module) -> str | None:
    """Why a module's own tensors, or its kernel, have no place in a plan; None if they have."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and not tensor.is_cpu:
            return f"is on {tensor.device}"
    for kind in _dtypes(module):
        if kind not in panels.TYPES:
            return f"is {_name(kind)}, and one call takes {', '.join(map(_name, panels.TYPES))}"
    if isinstance(module, PackedWeight) and not isinstance(module.prepared(), PanelMatrix):
        return f"is computed by the kernel {module.choice.kernel.name}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "normalizes its rows"
    if isinstance(module, nn.LayerNorm) and module.weight is None:
        return "has no weight"
    return None
