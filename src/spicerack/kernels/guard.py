"""`Guard`: whether modules are still what they were when native code was given addresses of what they hold.

Asked at each call, so that it has to cost little, and a model has a thousand things to look at: identities are
compared, natively, and no number is read. What a tensor holds may change at will; that it is another tensor does not go
unnoticed. Whether it has other memory is `Plan.is_current`'s question.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from spicerack import _native

_CAPTURING = "transformers.utils.output_capturing"
"""Whose hooks are no change: they collect nothing unless the call itself asks for it, and stay after the first that
did."""


class Guard:
    """Of modules: their classes, public attributes, children, parameters, buffers and hooks, as they are now.

    modules    what is watched
    top        the one of them that something takes the place of: hooks of its own run around that
    changing   attributes that decide nothing about what a module computes
    """

    def __init__(self, modules: Iterable[nn.Module], top: nn.Module, changing: frozenset[str] = frozenset()) -> None:
        watched: list[Any] = []  # dictionary, key, value; or module, None, class
        self._hooks: list[dict[int, Any]] = []
        for m in modules:
            own = vars(m)
            watched += (m, None, type(m))
            if m is not top:
                watched += (own, "forward", None)  # nobody has given it one of its own
                self._hooks += (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            public = {key: value for key, value in own.items() if not key.startswith("_") and key not in changing}
            public.pop("forward", None)
            for entries, kept in ((own, public), (m._modules, m._modules), (m._parameters, m._parameters),
                                  (m._buffers, m._buffers)):  # fmt: skip
                for key, value in kept.items():
                    watched += (entries, key, value)
        self._watched = tuple(watched)

    def holds(self) -> bool:
        """Whether nothing has changed, nobody watches by hooks, and no module has got a forward of its own."""
        return (
            _native.unchanged(self._watched)
            and not torch_module._has_any_global_hook()
            and (not any(self._hooks) or all(map(_are_idle, self._hooks)))
        )


def _are_idle(hooks: dict[int, Any]) -> bool:
    return all(hook.__module__ == _CAPTURING for hook in hooks.values())
