"""`ExpertStack`: the experts of a mixture as layers of their own, where transformers keeps one 3-D parameter.

A family's code is written for that parameter. Instead of replacing the code, something takes the parameter's place that
answers torch's calls as the parameter would: torch asks operands that are no tensors how a function is to be computed
with them (`__torch_function__`). What is given up: the one product over all experts that transformers has for speed
(`put` asks for the eager loop), and calls that no family makes are not answered, but end in a TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn


class ExpertStack(nn.Module):
    """Stands for a parameter [E, N, K], or [E, K, N] if transposed, in the code of a family.

    That code multiplies by one expert's matrix at a time, `linear(x, stack[e])` or `x @ stack[e]`, or by all at once,
    `bmm(x, stack)`; torch hands these calls to the operands (`__torch_function__`), and here the layers answer them:
    layer `e.p` of the stack, part p of expert e, with hooks and packed weights like any other.

    experts      for each expert the layers [N_p, K] whose outputs, side by side, are its own, such as gate and up
    shape        of the parameter
    transposed   the parameter is [E, K, N]
    """

    def __init__(self, experts: Sequence[Sequence[nn.Module]], shape: Sequence[int], *, transposed: bool) -> None:
        super().__init__()
        self.shape, self.transposed = torch.Size(shape), transposed
        for number, parts in enumerate(experts):
            self.add_module(str(number), nn.ModuleList(parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | torch.Tensor) -> ExpertMatrix:
        """One expert's matrix, as an operand; nothing is computed or copied. index: 0 to E - 1, or a tensor of one."""
        return ExpertMatrix(self, int(index))

    def parts(self, expert: int) -> list[nn.Module]:
        """The layers [N_p, K] of one expert, in the order of its rows: gate, then up, say."""
        return list(self.get_submodule(str(expert)).children())

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.bmm and len(args) == 2 and isinstance(args[1], cls) and args[1].transposed:
            x, stack = args
            return torch.stack([x[expert] @ stack[expert] for expert in range(len(stack))])
        return NotImplemented

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, transposed={self.transposed}"


class ExpertMatrix:
    """Expert `index` of a stack, as an operand: [N, K] of `linear`, [K, N] on the right of `@` if transposed.

    Other functions of torch that are called with it raise TypeError.
    """

    def __init__(self, stack: ExpertStack, index: int) -> None:
        self.stack, self.index = stack, index

    @property
    def shape(self) -> torch.Size:
        """[N, K], or [K, N] if transposed: that of the parameter's slice."""
        return self.stack.shape[1:]

    def float(self) -> ExpertMatrix:
        """Itself, where a family's code multiplies in float32: what a layer gives has the type of what it is given."""
        return self

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> what this expert makes of it, [..., N]: the outputs of its layers side by side."""
        outputs = [part(x) for part in self.stack.parts(self.index)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if len(args) < 2 or not isinstance(args[0], torch.Tensor) or not isinstance(args[1], cls):
            return NotImplemented
        x, matrix = args[:2]
        if function is nn.functional.linear and not matrix.stack.transposed:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            y = matrix.multiply(x)
            return y if bias is None else y + bias
        if function in (torch.Tensor.matmul, torch.matmul) and matrix.stack.transposed:
            return matrix.multiply(x)
        return NotImplemented


def put(owner: nn.Module, attribute: str, stack: nn.Module) -> None:
    """Put `stack` in place of the parameter `attribute` of `owner`, which is changed.

    The owner multiplies by one expert at a time from now on: its config, which it may share with others, says so.
    stack: a module that answers as the parameter would, such as an `ExpertStack`, or a slot that becomes one.
    """
    config = vars(owner).get("config")
    if config is not None:
        config._experts_implementation = "eager"
    delattr(owner, attribute)
    owner.add_module(attribute, stack)


def linear(weight: torch.Tensor) -> nn.Linear:
    """A float layer with this weight [N, K], no bias and no gradient, for an expert that is not packed."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
