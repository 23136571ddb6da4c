"""Quantized tensors and the rows of bytes that GGUF has for them, both ways, exactly.

    decode(type, raw)     uint8 [.., N, row_bytes] -> QTensor [.., N, K] in the type's own scheme
    encode(type, q)       its inverse, and of every other QTensor whose numbers the type holds to the bit
    obstacle(type, q)     why it does not, naming the rule, the row and the value; None if it does
    types_for(scheme)     the types that may hold a scheme, smallest first, known before a weight is read
    no_type(scheme)       why there is none
    fitting(q)            the smallest type that does hold a tensor

Decoded are the numbers that llama.cpp has in float32, bit for bit: `codec.decode` multiplies and adds in its order.
What bytes say is kept, too: decoding and encoding again gives the same bytes, but for those of TQ1_0 that no writer
makes (`layouts.Trits`). Rows say nothing of activations, which engines round in their own way; and NVFP4's scale of the
whole tensor lies in a tensor beside it (`without_tensor_scale`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import torch

from spicerack.errors import CheckpointError, SchemeError, WeightError
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.gguf import layouts
from spicerack.storage.gguf.exact import InexactError, converted, is_rare, row_of, scheme_obstacle, scheme_of
from spicerack.storage.gguf.ggml import FLOATS, TYPES, GgmlType

_Matrix = TypeVar("_Matrix", bound=QTensor | Undecoded)
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NO_NUMBER = 255
"""MXFP4's power of two that stands for none."""
_MAX_E4M3 = 0x7E
"""NVFP4's largest scale: above it is what stands for none, and negative ones, whose sign llama.cpp does not read."""
_SIGNS = -0x7F7F7F80
"""The upper bit of each byte of a word, as an int32."""
_DAMAGED = "the file is damaged, or was written by a program that is not known"


def decode(type_: GgmlType, raw: torch.Tensor, name: str = "tensor", *, transposed: bool = False) -> QTensor:
    """Rows of bytes, uint8 [.., N, row_bytes] on the CPU -> QTensor [.., N, K] in the scheme `type_.scheme`.

    name: of the tensor, for errors. transposed: what the QTensor says of a checkpoint's order of axes. Raises
    CheckpointError, naming tensor, row and value, for scales that are not finite and codes that are no level, and for
    a type that is not decoded.
    """
    if type_.scheme is None:
        raise CheckpointError(f"{name}: {type_} is not decoded", "take the model in another type, such as Q4_K")
    own, rows = scheme_of(type_), _rows(type_, raw, name)
    return QTensor(own, _signed(rows["u"], own), *_scales(type_, rows, raw.shape), transposed=transposed)


def undecoded(type_: GgmlType, raw: torch.Tensor, name: str = "tensor", *, transposed: bool = False) -> Undecoded:
    """The same of a matrix [N, K], with its codes in a stream of as many bits as they have.

    Raises CheckpointError as `decode` does, but for codes that are no level.
    """
    own, rows = scheme_of(type_), _rows(type_, raw, name, stream=True)
    n, row_bytes = raw.shape
    words = rows["u"].reshape(n, -1)
    if own.bits == 8 and own.levels.lo:  # of bytes the lowest code is 0 there, and not the negative one
        words = words ^ _SIGNS
    scale, _, low = _scales(type_, rows, raw.shape)
    shape = (n, row_bytes // type_.nbytes * type_.block)
    return Undecoded(own, shape, "stream", words, scale, min=low, transposed=transposed)


def _rows(type_: GgmlType, raw: torch.Tensor, name: str, *, stream: bool = False) -> layouts.Parts:
    """Parts [.., N, those of a row] of rows of bytes; codes in bytes, or in words of a stream, where nobody has looked
    at them. Raises CheckpointError."""
    *leading, row_bytes = raw.shape
    if raw.dtype != torch.uint8 or row_bytes % type_.nbytes or len(raw.shape) < 2:
        raise CheckpointError(f"{name}: {raw.dtype} {[*raw.shape]} are no rows of {type_}", _DAMAGED)
    blocks = row_bytes // type_.nbytes
    parts = layouts.unpack(type_.name, raw.reshape(-1, type_.nbytes), scheme_of(type_).bits if stream else None)
    rows = {key: part.reshape(*leading, blocks * part.shape[1]) for key, part in parts.items()}
    _refuse(type_, {key: part for key, part in rows.items() if not stream or key != "u"}, name)
    return rows


def _scales(
    type_: GgmlType, rows: layouts.Parts, shape: tuple[int, ...]
) -> tuple[torch.Tensor | QTensor, None, torch.Tensor | QTensor | None]:
    """Scale, no zero point, and minimum of rows of bytes of that shape."""
    own = scheme_of(type_)
    scale: torch.Tensor | QTensor
    if type_.name == "MXFP4":
        scale = rows["e"].contiguous().view(torch.float8_e8m0fnu)
    elif type_.name == "NVFP4":
        ones = torch.ones((*shape[:-2], 1, 1), dtype=torch.float32, device="cpu")
        scale = _quantized(own.scale, rows["s"], ones)
    else:
        scale = _quantized(own.scale, rows.get("s"), rows["d"])
    low = None if own.min is None else _quantized(own.min, rows.get("t"), -rows["m"] if "t" in rows else rows["m"])
    return scale, None, low


def encode(type_: GgmlType, q: QTensor | Undecoded, name: str = "tensor") -> torch.Tensor:
    """A QTensor [.., N, K] -> rows of bytes, uint8 [.., N, row_bytes], that decode to the same numbers bit for bit.

    So does one whose codes nobody has decoded; of a stream they are not where the type has the same.

    Rows are q's own, whatever `q.transposed` says; name is that of the tensor, for errors. Raises SchemeError with the
    reason of `obstacle`. F32, F16 and BF16 hold the decoded numbers.
    """
    own = _own(type_, q)
    if isinstance(own, str):
        raise SchemeError(f"{name}: {q.scheme} cannot be {type_}: {own}", "choose another type, or another scheme")
    if isinstance(own, torch.Tensor):
        return encode_floats(type_, own, name)
    stream = None
    if isinstance(own, Undecoded):
        stream, words = own.scheme.bits, own.data
        blocks = {"u": words ^ _SIGNS if stream == 8 and own.scheme.levels.lo else words}
    else:
        blocks = {"u": _unsigned(own)}
    if type_.name == "NVFP4":
        assert isinstance(own.scale, QTensor)
        blocks["s"] = _unsigned(own.scale)
    elif type_.name == "MXFP4":
        blocks["e"] = own.plain_scale.view(torch.uint8)
    elif isinstance(own.scale, QTensor):
        blocks |= {"s": _unsigned(own.scale), "d": own.scale.plain_scale}
    else:
        blocks["d"] = own.scale
    if isinstance(own.min, QTensor):
        blocks |= {"t": _unsigned(own.min), "m": -own.min.plain_scale}
    elif own.min is not None:
        blocks["m"] = own.min
    count = math.prod(q.shape) // type_.block
    raw = layouts.pack(type_.name, {key: part.reshape(count, -1) for key, part in blocks.items()}, stream)
    return raw.reshape(*q.shape[:-1], type_.row_bytes(q.shape[-1]))


def obstacle(type_: GgmlType, q: QTensor | Undecoded) -> str | None:
    """Why `type_` cannot hold the numbers of q exactly, as the end of a sentence; None if it can."""
    own = _own(type_, q)
    return own if isinstance(own, str) else None


def types_for(scheme: Scheme, shape: tuple[int, ...]) -> tuple[GgmlType, ...]:
    """The types that may hold tensors [.., N, K] of `scheme` exactly, those of fewest bytes first.

    Whether one does is for `obstacle` to say, of values; floats are not among them. Last come types that hold only what
    is rare (`exact.is_rare`), so that the first one can be promised before a weight is read, as long as float16 holds
    the scales. Of types of equal size the one whose scheme it is comes first, and then the simpler one.
    """
    fit = [type_ for type_ in TYPES.values() if scheme_obstacle(type_, scheme, shape) is None]
    return tuple(sorted(fit, key=lambda type_: (is_rare(type_, scheme), *_size(type_, scheme))))


def no_type(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why no type holds tensors [.., N, K] of `scheme`: the reason of the one that holds most like it; None if one
    does."""
    if types_for(scheme, shape):
        return None
    own = [type_ for type_ in TYPES.values() if type_.scheme == scheme.name]
    able = own or [t for t in TYPES.values() if t.scheme is not None and scheme_of(t).levels.integers is not None]
    near = min(able, key=lambda type_: abs(8 * type_.nbytes / type_.block - scheme.bits))
    return f"no type of GGUF holds {scheme}; {near}: {scheme_obstacle(near, scheme, shape)}"


def fitting(q: QTensor) -> GgmlType | None:
    """The type of fewest bytes that holds q exactly; None if none does."""
    fit = [type_ for type_ in types_for(q.scheme, q.shape) if obstacle(type_, q) is None]
    return min(fit, key=lambda type_: _size(type_, q.scheme), default=None)


def _size(type_: GgmlType, scheme: Scheme) -> tuple[float, bool, int]:
    """What types are ordered by: bytes of a weight, whose scheme it is, and how simple they are."""
    return type_.nbytes / type_.block, type_.scheme != scheme.name, type_.block


# ---- floats ----------------------------------------------------------------------------------------------------------


def decode_floats(type_: GgmlType, raw: torch.Tensor) -> torch.Tensor:
    """Rows of F32, F16 or BF16, uint8 [.., row_bytes] -> floats [.., K], sharing memory where that is aligned."""
    dtype = _TORCH[type_.name]
    aligned = raw.is_contiguous() and raw.data_ptr() % dtype.itemsize == 0
    return (raw if aligned else raw.clone(memory_format=torch.contiguous_format)).view(dtype)


def encode_floats(type_: GgmlType, values: torch.Tensor, name: str = "tensor") -> torch.Tensor:
    """Floats [.., K] -> rows of F32, F16 or BF16, uint8 [.., row_bytes].

    name: of the tensor, for errors. Raises WeightError, naming the first, for numbers that the type does not hold.
    """
    stored = values.to(_TORCH[type_.name])
    lost = stored.to(values.dtype) != values
    if bool(lost.any()):
        place = [int(i) for i in lost.nonzero()[0]]
        value = float(values[tuple(place)])
        raise WeightError(f"{name}: {type_} does not hold {value:.9g} at {place}", "write it as F32")
    return stored.contiguous().view(torch.uint8)


# ---- NVFP4's scale of the tensor -------------------------------------------------------------------------------------


def without_tensor_scale(q: _Matrix) -> tuple[_Matrix, torch.Tensor | None]:
    """An NVFP4 tensor as GGUF has it: scales of blocks alone, and the float32 scale [1] of the tensor, which lies in a
    tensor of its own, or [E] of a stack; None if that is 1. Other tensors as they are, and None."""
    scales = q.scale
    if not isinstance(scales, QTensor) or q.scheme.name != "nvfp4" or bool((scales.plain_scale == 1).all()):
        return q, None
    ones = torch.ones_like(scales.plain_scale)
    inner = dataclasses.replace(scales, scale=ones)
    return dataclasses.replace(q, scale=inner), scales.plain_scale.float().reshape(-1)


def with_tensor_scale(q: _Matrix, scale: torch.Tensor) -> _Matrix:
    """Inverse of `without_tensor_scale`, for scales float32 of one number, or one for each matrix of a stack."""
    assert isinstance(q.scale, QTensor)
    whole = scale.float().reshape(-1, 1, 1).expand(q.scale.plain_scale.reshape(-1, 1, 1).shape)
    inner = dataclasses.replace(q.scale, scale=whole.reshape(q.scale.plain_scale.shape).contiguous())
    return dataclasses.replace(q, scale=inner)


# ---- parts -----------------------------------------------------------------------------------------------------------


def _own(type_: GgmlType, q: QTensor | Undecoded) -> QTensor | Undecoded | torch.Tensor | str:
    """q in the type's own scheme, or, of floats, its numbers; or why that cannot be."""
    if isinstance(q, Undecoded) and (type_.name in FLOATS or q.order != "stream"):
        q = q.qtensor()
    if type_.name in FLOATS:
        assert isinstance(q, QTensor)
        values = codec.decode(dataclasses.replace(q, transposed=False))
        lost = int((values.to(_TORCH[type_.name]).float() != values).sum())
        return f"it does not hold {lost} of its numbers" if lost else values
    reason = scheme_obstacle(type_, q.scheme, q.shape)
    if reason is not None:
        return reason
    try:
        own = converted(type_, q)
    except InexactError as error:
        return str(error)
    return (_nvfp4_obstacle(own) if type_.name == "NVFP4" else None) or own


def _nvfp4_obstacle(q: QTensor | Undecoded) -> str | None:
    """Why rows of NVFP4 do not hold a tensor of that scheme, or None."""
    assert isinstance(q.scale, QTensor)
    if bool((q.scale.plain_scale != 1).any()):
        return "its rows have no scale of the tensor, which lies beside them (without_tensor_scale)"
    place = _first(q.scale.codes > _MAX_E4M3)
    return f"{row_of(place)}, block {place[-1]} has a negative scale" if place else None


def _refuse(type_: GgmlType, rows: dict[str, torch.Tensor], name: str) -> None:
    """Raise CheckpointError for parts [.., N, blocks] that mean nothing."""
    for key, noun in (("d", "scale"), ("m", "minimum")):
        if key in rows and (place := _first(~torch.isfinite(rows[key]))):
            value = float(rows[key][tuple(place)])
            raise CheckpointError(f"{name}: {row_of(place)}, block {place[-1]} has a {noun} of {value}", _DAMAGED)
    wrong = None
    if type_.name == "MXFP4":
        wrong = _first(rows["e"] == _NO_NUMBER)
    elif type_.name == "NVFP4":
        wrong = _first(rows["s"] > _MAX_E4M3)
    if wrong:
        raise CheckpointError(f"{name}: {row_of(wrong)}, block {wrong[-1]} has a scale that is no number", _DAMAGED)
    if type_.name == "TQ2_0" and "u" in rows and (place := _first(rows["u"] == 3)):
        raise CheckpointError(f"{name}: {row_of(place)} has a code that is none of -1, 0 and 1", _DAMAGED)


def _first(bad: torch.Tensor) -> list[int] | None:
    """The place of the first True, or None."""
    return [int(i) for i in bad.nonzero()[0]] if bool(bad.any()) else None


def _quantized(kind: object, codes: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | QTensor:
    """Scales or minima: floats, or codes with scales of their own, if their kind is a scheme."""
    if not isinstance(kind, Scheme):
        return scale
    assert codes is not None
    return QTensor(kind, _signed(codes, kind), scale)


def _signed(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Unsigned bytes of a file -> codes: those of eight bits in two's complement, others less the lowest code."""
    dtype, lowest = codes_dtype(scheme), scheme.levels.lo
    codes = codes.contiguous().view(dtype)
    return codes if scheme.bits == 8 or not lowest else codes + lowest


def _unsigned(q: QTensor) -> torch.Tensor:
    """Inverse of `_signed`."""
    lowest = q.scheme.levels.lo
    codes = q.codes if q.scheme.bits == 8 or not lowest else q.codes - lowest
    return codes.contiguous().view(torch.uint8)
