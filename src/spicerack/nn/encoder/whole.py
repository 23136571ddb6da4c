"""An encoder computed by one native call, unseen by the model's own code.

`use_native_encoders` gives a model of a known family, whose parts are all as they should be (`parts`), a
`forward` of its own instance: it makes a plan of native steps (`plan`), and runs it for whatever the plan can
do (`inputs`). Nothing is patched in transformers; names, state dict and class are what they were. What the plan
does not do, the modules do as ever: gradients, training, hooks or adapters inside, outputs of layers, embeddings as
inputs, other masks, tracing, another config, other weights in the place of those that were loaded. A model that is
moved or cast lets its plan go, and makes and checks another one at its next call.

It is checked when a model is loaded: two small batches, one of them padded, both ways. If they differ by more than the
family's bound, the modules keep the model, and `obstacles` says so.

What is given up. Rows that the mask hides are not computed; they come out as zeros, where modules compute something
that nobody should read. A pooler reads the first row: where the mask hides that, modules run. In the last bits results
are not those of the modules, whose sums run in another order; with activations rounded to int8 a last bit may become a
step of that rounding. A float16 or bfloat16 model is computed in float32 and rounded once, where its modules round
after each step.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_outputs

from spicerack.errors import ShapeError
from spicerack.kernels.guard import Guard
from spicerack.models.families.encoders import Encoder
from spicerack.nn.encoder import inputs as encoder_inputs
from spicerack.nn.encoder import parts as encoder_parts
from spicerack.nn.encoder import plan as encoder_plan
from spicerack.nn.encoder.plan import Built

_PLACE = "_spicerack_encoder"
"""Among the attributes of a model: its `NativeEncoder`."""


class _Ready(NamedTuple):
    """A plan, and what it was made of: the modules, and the config."""

    built: Built
    guard: Guard
    config: dict[str, Any]

    def is_current(self, model: PreTrainedModel) -> bool:
        return self.guard.holds() and self.built.plan.is_current() and vars(model.config) == self.config


class _Method:
    """A function bound to a model that has it among its attributes, and that it does not keep.

    A method of Python's would: the model would be in a circle with itself, and its memory stay until somebody looks for
    those. function: named as the attribute. Whoever calls it after the model is gone is told by a ReferenceError.
    """

    def __init__(self, function: Callable[..., Any], model: PreTrainedModel) -> None:
        self._function, self._model = function, weakref.ref(model)
        functools.update_wrapper(self, function)
        self.__code__ = function.__code__  # torch.export names its inputs by the place of that
        signature = inspect.signature(function)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **others: Any) -> Any:
        return self._function(self._owner(), *args, **others)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        return _Method(self._function, copy.deepcopy(self._owner(), memo))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[PreTrainedModel, str]]:
        return getattr, (self._owner(), self._function.__name__)  # as methods are pickled: what the class has

    def _owner(self) -> PreTrainedModel:
        model = self._model()
        if model is None:
            raise ReferenceError(f"the model whose {self._function.__name__} this is is gone")
        return model


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
        self.obstacle = encoder_parts.obstacle(model, self.family)
        if self.obstacle is not None:
            return
        try:
            built = encoder_plan.build(model, self.family, self.engine)
        except (ShapeError, ValueError) as error:  # parts that do not fit together: their own code may know why they do
            self.obstacle = f"its parts do not fit: {error}"
            return
        modules = [module for _, module in encoder_parts.parts(model, self.family)]
        ready = _Ready(built, Guard(modules, model), copy.deepcopy(vars(model.config)))
        batches = encoder_inputs.batches(model, self.family)
        difference = max(self._difference(ready, model, batch) for batch in batches)
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

    def moved(self, model: PreTrainedModel) -> None:
        """Forget a plan whose tensors are not where they were, or why there is none: the next call makes another."""
        if self._ready is None or not self._holds_tensors_of(self._ready, model):
            self._ready = self.obstacle = None

    def _run(self, ready: _Ready, model: PreTrainedModel, asked: dict[str, Any]) -> Any:
        if _is_watched():
            return None
        if not ready.is_current(model):
            if not self._holds_tensors_of(ready, model):  # which nobody else may have any more
                self._ready, self.obstacle = None, "its tensors are not those that it was loaded with"
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            return None
        plan = ready.built.plan
        inputs = encoder_inputs.inputs(model, self.family, asked, plan.dtype)
        if inputs is None:
            return None
        pooler = model._modules.get(self.family.pooler)
        pools = pooler is not None or (self.family.pooled and not self.family.pooler)
        if pools and inputs.mask is not None and not bool(inputs.mask[:, 0].all()):
            return None
        state = plan.run(inputs, ready.built.result)
        if state is None:
            return None
        output = vars(modeling_outputs)[self.family.output]
        if not pools:
            return output(last_hidden_state=state)
        read = state if self.family.pooled == "result" else state[:, 0]
        return output(state, read if pooler is None else pooler(read))

    def _holds_tensors_of(self, ready: _Ready, model: PreTrainedModel) -> bool:
        """Whether the plan's tensors are the model's, where they were when it was made."""
        modules = [module for _, module in encoder_parts.parts(model, self.family)]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        return ready.built.plan.is_current() and ready.built.plan.is_of(tensors)

    def _difference(self, ready: _Ready, model: PreTrainedModel, asked: dict[str, Any]) -> float:
        """The largest difference of both ways' results, of rows that are seen, in parts of the largest number.

        NaN where there is none to tell: something in the results is no number, or modules are watched from the start.
        """
        with torch.no_grad():
            output = self._run(ready, model, asked)
            expected = type(model).forward(model, **asked).last_hidden_state
        if output is None:
            return math.nan
        mask = asked.get("attention_mask")
        seen = torch.ones(expected.shape[:2], dtype=torch.bool, device="cpu") if mask is None else mask.bool()
        ours, theirs = output.last_hidden_state[seen].float(), expected[seen].float()
        return float((ours - theirs).abs().max() / theirs.abs().max())


def use_native_encoders(model: nn.Module, engine: str | None = None) -> None:
    """Let the encoders inside `model`, or it itself, be computed by one native call where that is possible.

    Each is changed in place: it gets a `forward` of its own and remembers its plan, or why there is none. Called once,
    when all packed layers are in and attention is native. engine: of norms and attention, as in `load`.
    """
    for part in model.modules():
        family = encoder_parts.family_of(part)
        if family is None or not isinstance(part, PreTrainedModel) or "forward" in vars(part):
            continue
        vars(part)[_PLACE] = native = NativeEncoder(family, engine)
        native.prepare(part)
        if native.obstacle is None:
            vars(part)["forward"] = _Method(_forward(type(part)), part)
            vars(part)["_apply"] = _Method(_apply(type(part)), part)


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


def _apply(kind: type[PreTrainedModel]) -> Any:
    """`_apply` of a model of this class, by which torch moves and casts it and whatever holds it."""
    ordinary: Any = kind._apply

    @functools.wraps(ordinary)
    def apply(self: PreTrainedModel, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        native: NativeEncoder = vars(self)[_PLACE]
        moved: nn.Module = ordinary(self, fn, recurse)
        native.moved(self)
        return moved

    return apply


def _is_watched() -> bool:
    """Whether somebody records or changes what torch computes: a trace, automatic casts, or a mode that dispatches."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")  # type: ignore[attr-defined, no-untyped-call]
