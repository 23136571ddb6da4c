"""A device that is not there: tensors that say they are on it, whose values the CPU computes.

Within `Pretending` operations refuse operands that lie apart, as CUDA's do: only copies, indices and numbers may be
elsewhere. `seen` counts what ran where.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)  # of the types that torch knows the one that needs nothing, not even for gradients
_COPIES = ("aten::copy_", "aten::_to_copy")
_INDEXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")


class There(torch.Tensor):
    """A tensor on the device; `values` is the same on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> There:
        wrapper: There = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )  # fmt: skip
        wrapper.values = values
        return wrapper

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} outside of `Pretending`")


class Pretending(TorchDispatchMode):
    """seen: (operation, whether on the device) -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, bool]] = Counter()

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device) asks, too
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function._schema.name, dict(kwargs or {})
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, There) for x in operands)
        bound = [args[0], *args[2:3]] if name in _INDEXED else [] if name in _COPIES else operands
        if there and not all(isinstance(x, There) or x.ndim == 0 for x in bound):
            raise RuntimeError(f"{name}: operands on {[str(x.device) for x in operands]}")
        if kwargs.get("device") is not None:
            there = kwargs["device"] == DEVICE
            kwargs["device"] = torch.device("cpu")
        elif name == "aten::copy_":
            there = isinstance(args[0], There)
        self.seen[name.removeprefix("aten::"), there] += 1
        given = {id(x.values): x for x in operands if isinstance(x, There)}
        inner = tree_map(lambda x: x.values if isinstance(x, There) else x, (args, kwargs))
        result = function(*inner[0], **inner[1])
        if not there:
            return result
        return tree_map(lambda x: given.get(id(x), There(x)) if isinstance(x, torch.Tensor) else x, result)
