"""`PackedWeight`: a quantized matrix as a module, whose buffers are what its kernel packed. `PackedLayer` holds one.

It is a module of its own, and no tensor of the layer's, so that layers that are tied can hold the same one: torch then
copies and moves it once. Its buffers have the layout of a kernel, which differs from processor to processor:
they are in a state dict, for copies in memory, and never in a folder, where `qtensor` goes. No float of the weight's
size is kept; `decode` makes one at each call, `forward` none; `PackedLayer.weight` makes one when its numbers are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from spicerack.errors import UsageError
from spicerack.kernels import kernel
from spicerack.kernels.kernel import Choice, Compute
from spicerack.nn.decoded import DecodedWeight, refusal
from spicerack.numerics.packed import Rows
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme

# Integers as wide as a buffer's elements: a view of these is what no cast touches.
_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedWeight(nn.Module):
    """W [N, K], packed. Two layers that are tied (a head and an embedding) hold the same PackedWeight.

    q         what is packed, of two axes; `qtensor` gives it back, bit for bit
    dtype     of the float weight it replaces, which casts of the model change (`model.half()`); decides nothing but the
              type of `decode` and `rows`
    device    where it will run, which decides the kernel; the tensors are moved there
    compute   "int8", "float" or None, as in `kernel.pick`
    engine    an instruction set or None, as in `kernel.pick`

    Moved to another kind of device it is laid out anew, for the kernel that runs it there, from the same codes and
    scales; on meta, where there is nothing to lay out, it stays as it is, and computes shapes. Raises SchemeError if no
    kernel runs the scheme, UsageError for an engine that is not here.
    """

    def __init__(
        self,
        q: QTensor,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        compute: Compute | None = None,
        engine: str | None = None,
    ) -> None:
        rows, columns = q.shape
        choice = kernel.pick(q.scheme, (rows, columns), dtype, torch.device(device), compute, engine)
        tensors = {name: tensor.to(device) for name, tensor in choice.kernel.pack(q).items()}
        self._hold(q.scheme, (rows, columns), choice, tensors, dtype, q.transposed)

    @classmethod
    def of_packed(
        cls,
        scheme: Scheme,
        shape: tuple[int, int],
        choice: Choice,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
    ) -> PackedWeight:
        """What is packed already, for the chosen kernel, where it will run; dtype: as above."""
        weight = cls.__new__(cls)
        weight._hold(scheme, shape, choice, tensors, dtype, transposed)
        return weight

    def _hold(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        choice: Choice,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        transposed: bool,
    ) -> None:
        """Become the module of these tensors: buffers, under names without dots, which scales of scales have."""
        super().__init__()
        self.scheme, self.shape, self.transposed, self.dtype = scheme, shape, transposed, dtype
        self._lie(choice, tensors)

    def _lie(self, choice: Choice, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold these tensors, which are laid out for the chosen kernel, and no others."""
        self.choice = choice
        self._names = {name: name.replace(".", "_") for name in tensors}
        self._buffers.clear()
        for name, tensor in tensors.items():
            self.register_buffer(self._names[name], tensor)
        self._prepared: Any = None
        self._prepared_of: tuple[tuple[str, torch.Tensor | None], ...] = ()

    def extra_repr(self) -> str:
        return f"{self.scheme}, shape={list(self.shape)}, kernel={self.choice.kernel.name}"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The packed tensors, by the kernel's names for them; the buffers themselves, wherever they are now."""
        buffers: dict[str, torch.Tensor] = self._buffers  # type: ignore[assignment]
        return {name: buffers[buffer] for name, buffer in self._names.items()}

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return next(buffer.device for buffer in self._buffers.values() if buffer is not None)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed tensors take in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> x W^T + bias [..., N] in x's type.

        bias: [N], or None. Differentiable in x and bias. Raises ShapeError for an x of another width.
        """
        return self.choice.kernel.run(x, (self.prepared(),), (bias,))[0]

    def prepared(self) -> Any:
        """The matrix as its kernel's `run` takes it; prepared once, and anew when a buffer is another tensor.

        A buffer becomes another tensor when the module is moved, or takes another state: comparing identities costs
        less than preparing, and cannot miss one. What is written into a buffer in place needs nothing, because it has
        the same memory.
        """
        if torch.compiler.is_compiling():  # tensors are not the ones that will be
            return self.choice.kernel.prepare(self.scheme, self.shape, self.tensors)
        _refuse_transforms()
        stale = self._prepared is None
        for name, tensor in self._prepared_of:
            stale |= self._buffers[name] is not tensor
        if stale:
            self._prepared_of = tuple(self._buffers.items())
            self._prepared = self.choice.kernel.prepare(self.scheme, self.shape, self.tensors)
        return self._prepared

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: all but the prepared matrix, which holds addresses of these very tensors."""
        return self.__dict__ | {"_prepared": None, "_prepared_of": ()}

    def rows(self, which: Rows) -> torch.Tensor:
        """The chosen rows, decoded: [R, K] in `dtype`. which: indices int64 [R], or a slice."""
        if not torch.compiler.is_compiling():
            _refuse_transforms()
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")[which]
        return self.choice.kernel.rows(self.scheme, self.shape, self.tensors, which).to(self.dtype)

    def decode(self) -> torch.Tensor:
        """The float weight in `dtype`, in the order that the replaced layer had ([K, N] for a Conv1D): made anew at
        each call."""
        weight = self.rows(slice(None))
        return weight.t() if self.transposed else weight

    def qtensor(self) -> QTensor:
        """The codes and scales themselves, bit for bit those that were packed: what saving and exporting need."""
        q = self.choice.kernel.unpack(self.scheme, self.shape, self.tensors)
        return dataclasses.replace(q, transposed=self.transposed)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeight:
        """Move between devices, as `model.to` asks; but `model.half()` and its like must not round the scales.

        fn casts floats only, so it is shown integers of the same bits, whatever the buffers are; one that casts those
        as well (`model.type`) moves nothing. What it casts floats to is the type of rows from then on.
        """
        asked = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype = asked.dtype
        if asked.device.type not in (self.device.type, "meta"):
            self._lie_for(asked.device)

        def moved(bits: torch.Tensor) -> torch.Tensor:
            result = fn(bits)
            return result if result.dtype == bits.dtype else bits

        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        for name, buffer in before.items():
            self._buffers[name] = buffer.view(_AS_INTEGERS[buffer.itemsize])
        nn.Module._apply(self, moved, recurse)
        for name, buffer in before.items():
            result = self.get_buffer(name)
            stays = result.device == buffer.device and result.data_ptr() == buffer.data_ptr()
            self._buffers[name] = buffer if stays else result.view(buffer.dtype)
        if any(self._buffers[name] is not buffer for name, buffer in before.items()):
            self._prepared, self._prepared_of = None, ()  # nobody else keeps what was moved away
        return self

    def _lie_for(self, device: torch.device) -> None:
        """Be laid out for the kernel that runs the weight on `device`, still where it is now.

        An instruction set that was asked for is one of CPUs: it means nothing elsewhere, and holds again on the way
        back. Raises UsageError on meta, where there are no codes to lay out, if the present layout does not run there.
        """
        asked = self.choice
        engine = asked.engine if device.type == "cpu" else None
        choice = kernel.pick(self.scheme, self.shape, self.dtype, device, asked.compute, engine)
        choice = dataclasses.replace(choice, engine=asked.engine)
        if choice.kernel is asked.kernel:
            self.choice = choice
        elif self.device.type != "meta":
            self._lie(choice, choice.kernel.pack(self.qtensor()))
        elif (reason := asked.kernel.obstacle(self.scheme, self.shape, self.dtype, device)) is not None:
            raise UsageError(
                f"packed weights on meta have no codes to lay out for {device.type}: {asked.kernel.name} {reason}",
                "load the folder there (device=...), or move the model before it goes to meta",
            )


def _refuse_transforms() -> None:
    """Raise UsageError where torch turns what is computed into something else.

    A kernel of ours is no function of torch's there: `torch.jit.trace` would keep uninitialized memory in its place,
    and derivatives in the forward direction would be zero.
    """
    if torch._C._is_tracing():
        raise UsageError("packed layers cannot be recorded by torch.jit.trace", "use torch.compile or torch.export")
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise UsageError(
            "packed layers cannot be transformed by torch.func, nor differentiated in the forward direction",
            "use torch.autograd (backward, grad, functional.jacobian), or the float model",
        )


class PackedLayer(nn.Module):
    """What layers with packed weights have in common, beside the float class that each is a subclass of.

    So those who look for that class find them (adapters, above all), and `weight` tells them what they ask for. packed:
    the weight as a matrix [N, K]; layers that are tied hold the same one. bias: [N], a parameter like any
    other, or None.
    """

    packed: PackedWeight
    bias: nn.Parameter | None

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)  # and not that of the float class, which would make a weight
        self.packed = packed
        self.register_parameter("bias", bias)

    def decode(self) -> torch.Tensor:
        """The float weight in the shape that the float layer has it in, decoded anew at each call."""
        return self.packed.decode()

    def _strided(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of what `decode` gives."""
        rows, columns = self.packed.shape
        return ((columns, rows), (1, columns)) if self.packed.transposed else ((rows, columns), (columns, 1))

    @property
    def weight(self) -> torch.Tensor:
        """The float weight, to look at: see `DecodedWeight`. Writes into it raise UsageError."""
        if torch.compiler.is_compiling():  # a graph has the decoding in it
            return self.decode()
        return DecodedWeight(*self._strided(), self.packed.dtype, self.packed.device, self.decode)

    @weight.setter
    def weight(self, value: object) -> None:
        """Takes what is the layer's own already, which adapters give back when they are taken off."""
        if not (isinstance(value, DecodedWeight) and value.decode == self.decode):
            raise refusal()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's, which assignments of parameters go through. Raises UsageError for a weight."""
        if name == "weight":
            raise refusal()
        super().register_parameter(name, param)
