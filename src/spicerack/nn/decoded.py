"""`DecodedWeight`: what `layer.weight` of a packed layer is: a tensor to read, whose numbers exist while they are read.

Code that does not know about packing asks layers for their weight: mostly for its shape, type or device, which cost
nothing here; sometimes for the numbers, which are decoded for each function that wants them, and gone afterwards. A
write would change numbers that nobody holds: it fails, by name, instead of vanishing, also through `data`, `detach()`
and views. What makes a tensor of its own of it (`clone`, `float() * 1`, `copy.deepcopy`, pickles) gives an ordinary
one.

torch's encoder layers have fast paths that take weights from their layers and compute with them; they leave alone what
has a `__torch_function__`, and call the layers.

It has no memory, and so no address: two of them are never "the same by their address", and code in C that asks for
one (`torch.utils.dlpack.to_dlpack`) gets torch's own error in its place; `torch.from_dlpack` gets the numbers.

What is given up. Each function that reads numbers decodes them anew; whoever reads often takes a `clone` first. A
gradient for the weight there is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from spicerack.errors import UsageError

_ATEN = torch.ops.aten
_DETACHING = frozenset({_ATEN.detach.default, _ATEN.alias.default})
"""What makes a tensor of the same numbers, of which none is looked at."""
_TENSOR: Any = torch.Tensor
_OF_MEMORY = frozenset({
    _TENSOR.numpy, _TENSOR.__array__, _TENSOR.tolist, _TENSOR.storage,
    _TENSOR.untyped_storage, _TENSOR.__reduce_ex__, _TENSOR.__deepcopy__, _TENSOR.__repr__,
    _TENSOR.__format__, _TENSOR.__dlpack__,
})  # fmt: skip
"""Functions that torch does not dispatch, for they look at memory: they get the decoded tensor."""
_VIEWING = frozenset({_TENSOR.numpy, _TENSOR.__array__})
"""Those of them that hand out an array over that memory, into which nothing can be written."""
_SETTERS = frozenset({
    _TENSOR.data.__set__, _TENSOR.grad.__set__, _TENSOR.requires_grad.__set__,
    _TENSOR.requires_grad_, _TENSOR.set_, _TENSOR.share_memory_,
})  # fmt: skip
"""What would change the tensor itself."""
_HAS_ALREADY: dict[Any, tuple[tuple[object, ...], ...]] = {
    _TENSOR.requires_grad_: ((False,),),
    _TENSOR.requires_grad.__set__: ((False,),),
    _TENSOR.grad.__set__: ((None,),),
}
"""Arguments with which these change nothing: loops that freeze layers, or clear gradients, go over packed ones too."""


class DecodedWeight(torch.Tensor):
    """The float weight of a packed layer, decoded when its numbers are asked for. It is read, and never written.

    shape, strides, dtype, device   of the decoded tensor
    decode                          makes it, anew at each call
    """

    decode: Callable[[], torch.Tensor]

    def __new__(
        cls,
        shape: Iterable[int],
        strides: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
        decode: Callable[[], torch.Tensor],
    ) -> DecodedWeight:
        weight: DecodedWeight = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides=tuple(strides), dtype=dtype, device=device, requires_grad=False
        )
        torch._C._set_throw_on_mutable_data_ptr(weight)  # to whoever takes an address past torch's functions
        weight.decode = decode
        return weight

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.data_ptr:
            raise UsageError(
                "the weight of a packed layer has no address: it is decoded for whoever reads it",
                "take a copy (layer.weight.clone()); layers that are tied have the same layer.packed",
            )
        if function in _SETTERS and isinstance(args[0], cls):
            if args[1:] not in _HAS_ALREADY.get(function, ()):
                raise refusal()
            return args[0] if function is torch.Tensor.requires_grad_ else None
        with torch._C.DisableTorchFunctionSubclass():
            if function not in _OF_MEMORY:
                return function(*args, **kwargs)
            result = function(*_decoded(args), **_decoded(kwargs))
            if function in _VIEWING:
                result.flags.writeable = False
            return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as an instance's method
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = function._schema
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and _holds_one(value):
                raise refusal()
        if function in _DETACHING:
            return _again(args[0])
        result = function(*_decoded(args), **_decoded(kwargs))
        if any(returned.alias_info is not None for returned in schema.returns):  # views: no way to write, either
            return tree_map(lambda t: _over(t) if isinstance(t, torch.Tensor) else t, result)
        return result


def refusal() -> UsageError:
    """What a write into the weight of a packed layer is answered with."""
    return UsageError(
        "the weight of a packed layer is decoded for whoever reads it: a write would be lost",
        "take a copy (layer.weight.clone()), or let training change it (spicerack.prepare_qat); merge adapters into "
        "the float model, and quantize that",
    )


def _holds_one(value: object) -> bool:
    return isinstance(value, DecodedWeight) or (isinstance(value, list | tuple) and any(map(_holds_one, value)))


def _decoded(tree: Any) -> Any:
    """Arguments with ordinary tensors in the place of decoded weights."""
    return tree_map(lambda value: value.decode() if isinstance(value, DecodedWeight) else value, tree)


def _again(weight: DecodedWeight) -> DecodedWeight:
    return DecodedWeight(weight.shape, weight.stride(), weight.dtype, weight.device, weight.decode)


def _over(tensor: torch.Tensor) -> DecodedWeight:
    """A view of what was decoded, which holds that for as long as it lives."""
    return DecodedWeight(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, lambda: tensor)
