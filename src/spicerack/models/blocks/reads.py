"""Which weights a model's code computes with, whether it calls the layers that they are of or not.

Mamba's code multiplies by `dt_proj.weight` and never calls `dt_proj`: hooks on layers do not see that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Reads(TorchFunctionMode):
    """While it is on, `given` collects the names of those tensors that a function of torch is given.

    tensors: name -> tensor; of one with several names all count.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.given: set[str] = set()
        self._names: dict[int, list[str]] = {}
        self._tensors = list(tensors.values())  # an id is a tensor's as long as that lives
        for name, tensor in tensors.items():
            self._names.setdefault(id(tensor), []).append(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self.given.update(self._names.get(id(leaf), ()))
        return func(*args, **(kwargs or {}))
