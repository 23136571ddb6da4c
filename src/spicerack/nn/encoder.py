"""An encoder computed by one native call, unseen by the model's own code.

`use_native_encoders` gives a model of a known family, whose parts are all as they should be, a `forward` of its own
instance: it makes a plan of native steps (`encoder_plan`), and runs it for whatever the plan can do. Nothing is patched
in transformers; names, state dict and class are what they were. What the plan does not do, the modules do as ever:
gradients, training, hooks or adapters inside, outputs of layers, embeddings as inputs, other masks, tracing, another
config, other weights in the place of those that were loaded.

It is checked when a model is loaded: two small batches, one of them padded, both ways. If they differ by more than the
family's bound, the modules keep the model, and `obstacles` says so.

What is given up. Rows that the mask hides are not computed; they come out as zeros, where modules compute something
that nobody should read. A pooler reads the first row: where the mask hides that, modules run. In the last bits results
are not those of the modules, whose sums run in another order; with activations rounded to int8 a last bit may become a
step of that rounding.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from types import MethodType
from typing import Any, NamedTuple, overload

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_outputs

from spicerack.errors import ShapeError
from spicerack.kernels.guard import Guard
from spicerack.models.families.encoders import Encoder
from spicerack.nn import encoder_plan
from spicerack.nn.encoder_plan import Built

_PLACE = "_spicerack_encoder"
"""Among the attributes of a model: its `NativeEncoder`."""
_SWITCHES = {"return_dict": (None, True), "output_attentions": (None, False), "output_hidden_states": (None, False),
             "use_cache": (None, False, True)}  # fmt: skip
"""Arguments that say how, and what they may say; only decoders have a cache to use."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_INTEGERS = (torch.int64, torch.int32)
_CHANGING = frozenset({"joined"})
"""Attributes of modules that say what is computed together, and not what is computed."""


class _Ready(NamedTuple):
    """A plan, and what it was made of: the modules, and the config."""

    built: Built
    guard: Guard
    config: dict[str, Any]

    def is_current(self, model: PreTrainedModel) -> bool:
        return self.guard.holds() and self.built.plan.is_current() and vars(model.config) == self.config


class NativeEncoder:
    """What a model's `forward` asks first: the plan, how it is known to be the model's still, or why there is none.

    family     which parts the model has
    engine     of norms and attention, as in `load`
    obstacle   why the modules run, as the end of a sentence; None: they do not, unless asked for what a plan cannot do

    A copy makes its own plan, when it is first called: addresses are those of the original.
    """

    def __init__(self, family: Encoder, engine: str | None) -> None:
        self.family, self.engine = family, engine
        self.obstacle: str | None = None
        self._ready: _Ready | None = None

    def __reduce__(self) -> tuple[type[NativeEncoder], tuple[Encoder, str | None]]:
        return NativeEncoder, (self.family, self.engine)

    def prepare(self, model: PreTrainedModel) -> None:
        """Make the plan and compare it with the modules, or note the obstacle.

        In training mode, whose results are random, this waits for the first call in another.
        """
        if model.training:
            return
        self.obstacle = encoder_plan.obstacle(model, self.family)
        if self.obstacle is not None:
            return
        try:
            built = encoder_plan.build(model, self.family, self.engine)
        except (ShapeError, ValueError) as error:  # parts that do not fit together: their own code may know why they do
            self.obstacle = f"its parts do not fit: {error}"
            return
        modules = [module for _, module in encoder_plan.parts(model, self.family)]
        ready = _Ready(built, Guard(modules, model, _CHANGING), copy.deepcopy(vars(model.config)))
        difference = max(self._difference(ready, model, *batch) for batch in _batches(model, self.family))
        if difference <= self.family.bound:
            self._ready = ready
        else:
            self.obstacle = f"its results differ from those of its modules by {difference:.2g} of the largest number"

    def run(self, model: PreTrainedModel, asked: dict[str, Any]) -> Any:
        """What `model` returns when it is called with the arguments `asked`, by name; None: its modules must run."""
        if model.training or self.obstacle is not None:
            return None
        if self._ready is None:
            self.prepare(model)
        return None if self._ready is None else self._run(self._ready, model, asked)

    def _run(self, ready: _Ready, model: PreTrainedModel, asked: dict[str, Any]) -> Any:
        if _is_watched():
            return None
        inputs = _inputs(asked, {index for _, index in self.family.tables})
        if inputs is None or not ready.is_current(model):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            return None
        pooler = model._modules.get(self.family.pooler)
        if pooler is not None and inputs[1] is not None and not bool(inputs[1][:, 0].all()):
            return None
        state = ready.built.plan.run(*inputs, ready.built.result)
        output = vars(modeling_outputs)[self.family.output]
        return output(last_hidden_state=state) if pooler is None else output(state, pooler(state))

    def _difference(self, ready: _Ready, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None) -> float:
        """The largest difference of both ways' results, of rows that are seen, in parts of the largest number.

        NaN where there is none to tell: something in the results is no number, or modules are watched from the start.
        """
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        with torch.no_grad():
            output = self._run(ready, model, {"input_ids": ids, "attention_mask": mask})
            expected = type(model).forward(model, input_ids=ids, attention_mask=mask).last_hidden_state[seen]
        if output is None:
            return math.nan
        return float((output.last_hidden_state[seen] - expected).abs().max() / expected.abs().max())


def use_native_encoders(model: nn.Module, engine: str | None = None) -> None:
    """Let the encoders inside `model`, or it itself, be computed by one native call where that is possible.

    Each is changed in place: it gets a `forward` of its own and remembers its plan, or why there is none. Called once,
    when all packed layers are in and attention is native. engine: of norms and attention, as in `load`.
    """
    for part in model.modules():
        family = encoder_plan.family_of(part)
        if family is None or not isinstance(part, PreTrainedModel) or "forward" in vars(part):
            continue
        vars(part)[_PLACE] = native = NativeEncoder(family, engine)
        native.prepare(part)
        if native.obstacle is None:
            vars(part)["forward"] = MethodType(_forward(type(part)), part)


def obstacles(model: nn.Module) -> dict[str, str | None]:
    """Path of each encoder of a known family in `model` ("" for itself) -> why its modules run, as the end of a
    sentence, or None where one native call does."""
    natives = {path: vars(part).get(_PLACE) for path, part in model.named_modules()}
    return {path: native.obstacle for path, native in natives.items() if isinstance(native, NativeEncoder)}


def _forward(kind: type[PreTrainedModel]) -> Any:
    """`forward` of a model of this class: natively where it can be, else as the class has it."""
    ordinary: Any = kind.forward
    names = list(inspect.signature(ordinary).parameters)[1:]

    @functools.wraps(ordinary)
    def forward(self: PreTrainedModel, *args: Any, **others: Any) -> Any:
        if torch.compiler.is_compiling():
            return ordinary(self, *args, **others)
        native: NativeEncoder = vars(self)[_PLACE]
        output = native.run(self, dict(zip(names, args, strict=False)) | others)
        return ordinary(self, *args, **others) if output is None else output

    return forward


def _is_watched() -> bool:
    """Whether somebody records or changes what torch computes: a trace, automatic casts, or a mode that dispatches."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")  # type: ignore[attr-defined, no-untyped-call]


def _inputs(
    asked: dict[str, Any], indexes: set[str]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] | None:
    """ids, mask, token types and positions as `Plan.run` takes them; None if a plan cannot do what is asked.

    indexes: what tells rows of the model's tables; types are not given to one that has none.
    """
    for name, value in asked.items():
        if value is None or name in _INPUTS:
            continue
        if name not in _SWITCHES or value not in _SWITCHES[name]:
            return None
    ids, mask, types, positions = map(asked.get, _INPUTS)
    if types is not None and "types" not in indexes:
        return None
    if type(ids) is not torch.Tensor or ids.dim() != 2 or not ids.shape[1]:
        return None
    if type(positions) is torch.Tensor and positions.shape == (1, ids.shape[1]):
        positions = positions.expand(ids.shape)
    if type(mask) is torch.Tensor and mask.dtype == torch.bool:
        mask = mask.to(torch.int64)
    for index in (ids, mask, types, positions):
        if index is None:
            continue
        if type(index) is not torch.Tensor or index.dtype not in _INTEGERS:
            return None
        if index.shape != ids.shape or not index.is_cpu:
            return None
    return _whole(ids), _whole(mask), _whole(types), _whole(positions)


@overload
def _whole(index: torch.Tensor) -> torch.Tensor: ...
@overload
def _whole(index: torch.Tensor | None) -> torch.Tensor | None: ...
def _whole(index: torch.Tensor | None) -> torch.Tensor | None:
    return None if index is None else index.to(torch.int64).contiguous()


def _batches(model: PreTrainedModel, family: Encoder) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Ids and masks of a sentence of five tokens, and of one of seven beside one of three."""
    table = model.get_submodule(family.tables[0][0])
    rows, pad = vars(table)["num_embeddings"], vars(table)["padding_idx"]
    known = torch.tensor([id for id in range(min(rows, 100)) if id != pad], dtype=torch.int64, device="cpu")
    ids = (torch.arange(14, device="cpu") * 37 % len(known)).view(2, 7)
    mask = torch.ones(2, 7, dtype=torch.int64, device="cpu")
    mask[1, 3:] = 0
    length = max(min(7, model.config.max_position_embeddings - 2), 1)
    one, two = known[ids[:1, 2:7]], known[ids]
    return [(one[:, :length], None), (two[:, :length].contiguous(), mask[:, :length].contiguous())]
