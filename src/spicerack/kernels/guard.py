"""`Guard`: whether modules are still what they were when native code was given addresses of what they hold.

Asked at each call, so that it has to cost little, and a model has a thousand things to look at: identities are
compared, natively, and no number is read. What a tensor holds may change at will; that it is another tensor does not go
unnoticed. Whether it has other memory is `Plan.is_current`'s question.
"""

from __future__ import annotations

import weakref
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

    modules    what is watched; children that are none of them are not
    top        the one of them that something takes the place of: hooks of its own run around that, and what its
               attributes decide is for its caller to know; it is not kept alive, because the guard is among its own
    """

    def __init__(self, modules: Iterable[nn.Module], top: nn.Module) -> None:
        watched: list[Any] = []  # for `unchanged`, three at a time
        self._hooks: list[dict[int, Any]] = []
        members = {id(m): m for m in modules}
        self._top, self._kind = weakref.ref(top), type(top)
        for m in members.values():
            if m is not top:
                own, children = vars(m), m._modules
                watched += (m, None, type(m), own, "forward", None, children, None, len(children))
                self._hooks += (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
                # Packed layers are made in training mode, which means nothing to them, and stay so until eval().
                ignored = {"training"} if m.training else set()
                for key, value in own.items():
                    if not (key.startswith("_") or key in ignored or isinstance(value, dict | list | set)):
                        watched += (own, key, value)
            for entries in (m._modules, m._parameters, m._buffers):
                for key, value in entries.items():
                    if not isinstance(value, nn.Module) or id(value) in members:
                        watched += (entries, key, value)
        self._watched = tuple(watched)

    def holds(self) -> bool:
        """Whether nothing has changed, nobody watches by hooks, and no module has got a forward of its own."""
        return (
            type(self._top()) is self._kind
            and _native.unchanged(self._watched)
            and not torch_module._has_any_global_hook()
            and (not any(self._hooks) or all(map(_are_idle, self._hooks)))
        )


def _are_idle(hooks: dict[int, Any]) -> bool:
    return all(hook.__module__ == _CAPTURING for hook in hooks.values())
