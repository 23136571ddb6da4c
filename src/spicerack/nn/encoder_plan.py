"""From the modules of an encoder to a native plan: whether it has the parts that one call can compute, and the steps.

What the parts of a family are called is data (`models.families.encoders`); here it is checked, module by module, that a
model has these and no others. Whatever is not expected is an obstacle, by name: a module that nobody knows might do
anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.kernels.multiply import PanelMatrix
from spicerack.kernels.plan import Plan
from spicerack.models.families.encoders import ENCODERS, Encoder
from spicerack.nn import attention
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.gelu import is_gelu
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight

_WIDTH = 16
"""Heads are multiples of it wide, as in `kernels.attention`."""
_OFF: dict[str, Any] = {
    "is_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0, "output_attentions": False,
    "output_hidden_states": False, "return_dict": True,
}  # fmt: skip
"""What a config may not ask for otherwise, as far as it speaks of it."""


class Built(NamedTuple):
    """A plan, and the buffer that holds the result."""

    plan: Plan
    result: int


def family_of(model: nn.Module) -> Encoder | None:
    """The encoder that `model` is, of exactly that class, or None; its parts may still be others."""
    kind = type(model)
    return next((e for e in ENCODERS if (e.model, e.file) == (kind.__name__, kind.__module__)), None)


def parts(model: nn.Module, family: Encoder) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all that a plan takes the place of: the model itself, and all but its pooler."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not family.pooler or path.split(".")[0] != family.pooler:
            yield path, module


def obstacle(model: PreTrainedModel, family: Encoder) -> str | None:
    """Why no plan can be made of `model`, of this family, as the end of a sentence; None if one can."""
    for key, value in model.config.to_dict().items():
        if key in _OFF and value not in (_OFF[key], None):
            return f"its config has {key}={value}"
    if not str(model.config._attn_implementation).startswith(attention.NAME):
        return f"its attention is {model.config._attn_implementation}"
    expected = _expected(model, family)
    there = dict(parts(model, family))
    for path, module in there.items():
        fits = expected.get(path)
        if fits is None or not fits(module):
            return f"{path or 'it'} is a {type(module).__name__}"
        reason = _float_obstacle(module)
        if reason is not None:
            return f"{path or 'it'} {reason}"
    missing = [path for path in expected if path not in there and path not in _optional(family)]
    if missing:
        return f"it has no {missing[0]}"
    for block in model.get_submodule(family.blocks).children():
        heads = _heads(block, family)
        if any(_layer(block, path).out_features % (heads * _WIDTH) for path in family.qkv):
            return f"widths of its heads are no multiples of {_WIDTH}"
    return None


def build(model: nn.Module, family: Encoder, engine: str | None) -> Built:
    """The plan of a model without an `obstacle`; its tensors are taken as they lie.

    engine: of norms and attention; layers have theirs. Raises ShapeError and ValueError where parts do not fit.
    """
    get = model.get_submodule
    blocks = list(get(family.blocks).children())
    embedded = _columns(get(family.tables[0][0]))
    widths = [embedded]
    project = _project(model, family)
    hidden = embedded if project is None else project.out_features
    queries, keys, values, up = (_layer(blocks[0], path).out_features for path in (*family.qkv, family.up))
    first, x, q, k, v, attended, y, inner = range(8)
    widths += [hidden, queries, keys, values, values, hidden, up]
    if project is None:
        first = x
    pad = vars(get(family.tables[0][0].rpartition(".")[0]))["padding_idx"] if family.counted else None
    plan = Plan(widths, pad, engine)
    plan.look_up([(_table(get(path)), index) for path, index in family.tables], first)
    _norm(plan, get(family.norm), first, None, first)
    if project is not None:
        _product(plan, first, [(project, x)])
    for block in blocks:
        part = partial(_layer, block)
        _product(plan, x, list(zip(map(part, family.qkv), (q, k, v), strict=True)))
        scale = vars(block.get_submodule(family.heads[0]))["scaling"]
        plan.attention(q, k, v, attended, _heads(block, family), scale)
        _product(plan, attended, [(part(family.out), y)])
        _norm(plan, block.get_submodule(family.norms[0]), y, x, x)
        _product(plan, x, [(part(family.up), inner)], gelu=True)
        _product(plan, inner, [(part(family.down), y)])
        _norm(plan, block.get_submodule(family.norms[1]), y, x, x)
    return Built(plan, x)


def _expected(model: nn.Module, family: Encoder) -> dict[str, Callable[[nn.Module], bool]]:
    """Path -> whether a module there is of the class that belongs there."""
    file = vars(sys.modules[family.file])

    def exactly(*kinds: type) -> Callable[[nn.Module], bool]:
        return lambda module: type(module) in kinds

    layer, table, packed = exactly(QLinear), exactly(nn.Embedding, QEmbedding), exactly(PackedWeight)
    norm, dropout = exactly(nn.LayerNorm), exactly(nn.Dropout)
    expected = {"": exactly(type(model)), family.norm: norm, family.blocks: exactly(nn.ModuleList)}
    for path, _ in family.tables:
        expected |= {path: table, f"{path}.packed": packed}
    if family.project:
        expected |= {family.project: layer, f"{family.project}.packed": packed}
    blocks = [f"{family.blocks}.{name}" for name, _ in model.get_submodule(family.blocks).named_children()]
    for block in blocks:
        for path in (*family.qkv, family.out, family.up, family.down):
            expected |= {f"{block}.{path}": layer, f"{block}.{path}.packed": packed}
        expected |= {f"{block}.{path}": norm for path in family.norms}
        expected[f"{block}.{family.activation}"] = is_gelu
    for path, name in family.classes.items():
        of_block = path.startswith(".")
        for place in [block + path.rstrip(".") for block in blocks] if of_block else [path]:
            expected[place] = exactly(file[name])
    expected |= {path: dropout for path, module in model.named_modules() if type(module) is nn.Dropout}
    return expected


def _optional(family: Encoder) -> set[str]:
    """Expected paths that need not be there: an embedding may be float, a projection may be missing."""
    tables = {f"{path}.packed" for path, _ in family.tables}
    return tables | ({family.project, f"{family.project}.packed"} if family.project else set())


def _float_obstacle(module: nn.Module) -> str | None:
    """Why a module's own tensors, or its kernel, have no place in a plan; None if they have."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and not tensor.is_cpu:
            return f"is on {tensor.device}"
        if isinstance(tensor, nn.Parameter) and tensor.dtype != torch.float32:
            return f"is {str(tensor.dtype).removeprefix('torch.')}, and one call computes in float32"
    if isinstance(module, PackedWeight):
        if module.dtype != torch.float32:
            return f"is {str(module.dtype).removeprefix('torch.')}, and one call computes in float32"
        if not isinstance(module.prepared(), PanelMatrix):
            return f"is computed by the kernel {module.choice.kernel.name}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "normalizes its rows"
    if isinstance(module, nn.LayerNorm) and module.weight is None:
        return "has no weight"
    return None


def _project(model: nn.Module, family: Encoder) -> QLinear | None:
    layer = model._modules.get(family.project)
    return layer if isinstance(layer, QLinear) else None


def _layer(block: nn.Module, path: str) -> QLinear:
    layer = block.get_submodule(path)
    assert isinstance(layer, QLinear)
    return layer


def _heads(block: nn.Module, family: Encoder) -> int:
    path, attribute = family.heads
    heads: int = vars(block.get_submodule(path))[attribute]
    return heads


def _columns(table: nn.Module) -> int:
    assert isinstance(table, nn.Embedding | QEmbedding)
    return table.embedding_dim


def _table(table: nn.Module) -> torch.Tensor | PanelMatrix:
    if isinstance(table, QEmbedding):
        matrix: PanelMatrix = table.packed.prepared()
        return matrix
    assert isinstance(table, nn.Embedding)
    return table.weight


def _norm(plan: Plan, norm: nn.Module, x: int, more: int | None, y: int) -> None:
    assert isinstance(norm, nn.LayerNorm)
    plan.norm(x, more, y, norm.weight, norm.bias, norm.eps)


def _product(plan: Plan, x: int, layers: list[tuple[QLinear, int]], gelu: bool = False) -> None:
    """One step for all layers that take x alike, one for each else."""
    products: dict[tuple[object, ...], list[tuple[PanelMatrix, torch.Tensor | None, int]]] = {}
    for layer, y in layers:
        kernel = layer.packed.choice.kernel
        matrix: PanelMatrix = layer.packed.prepared()
        fixed = matrix.input_scale
        key = (kernel.name, kernel.engine, matrix.activations, None if fixed is None else float(fixed))
        products.setdefault(key, []).append((matrix, layer.bias, y))
    for (_, engine, *_), some in products.items():
        plan.product(x, some, str(engine), gelu)
