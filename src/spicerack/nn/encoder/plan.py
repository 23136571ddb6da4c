"""From the modules of an encoder to a native plan: the steps.

What the parts of a family are called is data (`models.families.encoders`); `parts` has checked that a model has
these and no others. Tensors are taken as they lie, whatever their type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.kernels.multiply import PanelMatrix
from spicerack.kernels.plan import Columns, Plan
from spicerack.models.families.encoders import Encoder
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.encoder import parts as encoder_parts
from spicerack.nn.linear import QLinear

_REACH = 128
"""Distance from which on all relative positions have one bias: `max_distance` of MPNet's buckets."""


class Built(NamedTuple):
    """A plan, and the buffer that holds the result."""

    plan: Plan
    result: int


def build(model: PreTrainedModel, family: Encoder, engine: str | None) -> Built:
    """The plan of a model without an `parts.obstacle`; its tensors are taken as they lie.

    engine: of all but layers, which have theirs. Raises ShapeError and ValueError where parts do not fit.
    """
    return _Builder(model, family, engine).build()


class _Builder:
    """Buffers, and the steps over them, of one model."""

    def __init__(self, model: PreTrainedModel, family: Encoder, engine: str | None) -> None:
        self.model, self.family = model, family
        self.blocks = list(model.get_submodule(family.blocks).children())
        block, widths = family.block, list[int]()

        def buffer(width: int) -> int:
            widths.append(width)
            return len(widths) - 1

        down = self._layer(self.blocks[0], block.down)
        hidden, inner = down.out_features, down.in_features
        self.x, self.y = buffer(hidden), buffer(hidden)
        self.normed = buffer(hidden) if block.first else self.x
        self.qkv = [buffer(self._layer(self.blocks[0], path).out_features) for path in block.qkv]
        self.attended = buffer(self._layer(self.blocks[0], block.out).in_features)
        self.up = [buffer(self._layer(self.blocks[0], path).out_features) for path in block.up]
        self.inner = buffer(inner) if block.gated else self.up[0]
        self.project = encoder_parts.project(model, family)
        self.first = self.x if self.project is None else buffer(self.project.in_features)
        self.turns = {kind: buffer(2 * len(self._frequencies(kind))) for kind in self._kinds()}
        pad = None
        if family.counted:
            pad = vars(model.get_submodule(family.tables[0][0].rpartition(".")[0]))["padding_idx"]
        self.plan = Plan(widths, pad, engine, encoder_parts.dtype(model, family))
        self.bias = self._bias()

    def build(self) -> Built:
        plan, family, get = self.plan, self.family, self.model.get_submodule
        if family.embed:
            plan.take(self.first)
        else:
            plan.look_up([(_table(get(path)), index) for path, index in family.tables], self.first)
        if family.norm:
            self._norm(get(family.norm), self.first, None, self.first)
        if self.project is not None:
            self._product(self.first, [(self.project, self.x)])
        for kind, buffer in self.turns.items():
            scale = vars(get(family.rotary))[f"{kind}_attention_scaling" if kind else "attention_scaling"]
            plan.turns(self._frequencies(kind), scale, buffer)
        for block in self.blocks:
            self._block(block)
        if family.final:
            self._norm(get(family.final), self.x, None, self.x)
        return Built(plan, self.x)

    def _block(self, block: nn.Module) -> None:
        """Both halves of a block, from x to x."""
        data = self.family.block
        for half, compute in enumerate((self._attention, self._rest)):
            norm = block.get_submodule(data.norms[half])
            if not data.first:
                compute(block, self.x)
                self._norm(norm, self.y, self.x, self.x)
                continue
            missing = type(norm) is nn.Identity
            if not missing:
                self._norm(norm, self.x, None, self.normed)
            compute(block, self.x if missing else self.normed)
            factor = vars(block.get_submodule(data.factors[half]))["_parameters"]["lambda1"] if data.factors else None
            self.plan.add(self.x, self.y, self.x, factor)

    def _attention(self, block: nn.Module, x: int) -> None:
        """Attention, from x to y."""
        data, plan = self.family.block, self.plan
        layers = [self._layer(block, path) for path in data.qkv]
        self._product(x, list(zip(layers, self.qkv, strict=True)))
        if len(layers) == 1:
            width = layers[0].out_features // 3
            q, k, v = (Columns(self.qkv[0], i * width, width) for i in range(3))
        else:
            q, k, v = map(plan.columns, self.qkv)
        path, _ = data.heads
        width = encoder_parts.head_width(block, self.family)
        kind = vars(block)[data.kind] if data.kind else ""
        if self.turns:
            for columns in (q, k):
                plan.rotate(columns, columns.width // width, self.turns[kind])
        window = self.model.config.sliding_window if kind == encoder_parts.SLIDING else None
        scale = vars(block.get_submodule(path))[data.scaling] if data.scaling else width**-0.5
        plan.attention(q, k, v, self.attended, q.width // width, scale, window=window, bias=self.bias)
        self._product(self.attended, [(self._layer(block, data.out), self.y)])

    def _rest(self, block: nn.Module, x: int) -> None:
        """The projections up and down, with what is between them, from x to y."""
        data, plan = self.family.block, self.plan
        function = encoder_parts.function(block.get_submodule(data.activation))
        assert function is not None
        gelu = function == "gelu" and len(data.up) == 1 and not data.gated  # which products have within them
        self._product(x, [(self._layer(block, path), y) for path, y in zip(data.up, self.up, strict=True)], gelu)
        if data.gated:
            width = plan.widths[self.inner]
            plan.gate(Columns(self.up[0], 0, width), Columns(self.up[0], width, width), self.inner, function)
        elif not gelu:
            more = plan.columns(self.up[1]) if len(self.up) > 1 else None
            plan.gate(plan.columns(self.up[0]), more, self.inner, function)
        self._product(self.inner, [(self._layer(block, data.down), self.y)])

    def _kinds(self) -> list[str]:
        """Of rotary positions; one without a name, where blocks do not tell."""
        kind = self.family.block.kind
        if not self.family.rotary:
            return []
        return sorted({vars(block)[kind] for block in self.blocks}) if kind else [""]

    def _frequencies(self, kind: str) -> torch.Tensor:
        return self.model.get_submodule(self.family.rotary).get_buffer(f"{kind}_inv_freq" if kind else "inv_freq")

    def _bias(self) -> int | None:
        """The bias of scores by distance, if there is one."""
        path, name = self.family.distances
        if not path:
            return None
        holder: Any = self.model.get_submodule(path)
        table = holder.get_submodule(name)
        buckets = holder.relative_position_bucket(torch.arange(-_REACH, _REACH + 1, device="cpu")).tolist()
        return self.plan.bias(_table(table), table.embedding_dim, buckets)

    def _norm(self, norm: nn.Module, x: int, more: int | None, y: int) -> None:
        assert isinstance(norm, nn.LayerNorm)
        self.plan.norm(x, more, y, norm.weight, norm.bias, norm.eps)

    def _product(self, x: int, layers: list[tuple[nn.Linear, int]], gelu: bool = False) -> None:
        """One step for all layers that take x alike, one for each else."""
        products: dict[tuple[object, ...], list[tuple[PanelMatrix, torch.Tensor | None, int]]] = {}
        for layer, y in layers:
            if not isinstance(layer, QLinear):
                self.plan.dense(x, layer.weight, layer.bias, y, gelu)
                continue
            kernel = layer.packed.choice.kernel
            matrix: PanelMatrix = layer.packed.prepared()
            fixed = matrix.input_scale
            key = (kernel.name, kernel.engine, matrix.activations, None if fixed is None else float(fixed))
            products.setdefault(key, []).append((matrix, layer.bias, y))
        for (_, engine, *_), some in products.items():
            self.plan.product(x, some, str(engine), gelu)

    def _layer(self, block: nn.Module, path: str) -> nn.Linear:
        layer = block.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return layer


def _table(table: nn.Module) -> torch.Tensor | PanelMatrix:
    if isinstance(table, QEmbedding):
        matrix: PanelMatrix = table.packed.prepared()
        return matrix
    assert isinstance(table, nn.Embedding)
    return table.weight
