"""compressed-tensors: the interchange format that transformers and vLLM read. (Facts: compressed-tensors 0.20.)

Linear P [N, K], b-bit codes, groups of g inputs (a row is a group of K):

    pack-quantized    P.weight_packed      I32 [N, ceil(K b / 32)]   code + 2^(b-1), the stream of `bits` along K
                      P.weight_scale       float [N, K/g]
                      P.weight_zero_point  I32 [ceil(N b / 32), K/g] zero + 2^(b-1), the stream along N (schemes with z)
                      P.weight_shape       I64 [2]                   N, K
    int-quantized     P.weight             I8 [N, K]                 w8a8, w8a8s
                      P.weight_scale       float [N, 1]
                      P.input_scale        F32 [1]                   w8a8s

Reading looks at the tensors themselves, with config.json for what they cannot tell. Regular expressions in a stranger's
config are never run. What config.json says lies in `_config_groups`, both ways; here are the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spicerack.errors import CheckpointError
from spicerack.numerics import native
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage import layouts
from spicerack.storage.format import (
    Contents,
    Host,
    Layout,
    MethodFormat,
    Reading,
    StoredTensor,
    checked_input_scale,
    names_of,
)
from spicerack.storage.formats import _config_groups, _rehearsal
from spicerack.storage.formats._config_groups import DAMAGED, ELSEWHERE
from spicerack.storage.reader import Checkpoint

_SOURCES = {"F32": torch.float32, "F16": torch.float32, "BF16": torch.bfloat16}
"""Type of scales -> the source that has such: float16 is what the scales of float32 weights are stored in, too."""


@dataclass(frozen=True, slots=True)
class CompressedTensors(MethodFormat):
    """Integers with float scales of rows or groups in them, of linear layers. Methods: `storage.format.Format`."""

    method = "compressed-tensors"
    name: str = "compressed_tensors"
    rank: int = 10
    read_by_others: bool = True
    on_request: bool = False

    def obstacles(self, contents: Contents) -> list[str]:
        """What compressed-tensors does not have, a sentence for each module that needs it.

        It has integers of the full range of 2 to 8 bits, a float scale for each row or group of a row, an integer zero
        point beside it, and int8 activations with w8; embeddings, experts in one tensor and convolutions are left to
        other formats.
        """
        reasons = ((p, layouts.compressed_obstacle(p.matrix)) for p in contents.values())
        return [f"{p.module}: compressed-tensors has no {reason}" for p, reason in reasons if reason]

    def layout(self, stored: StoredTensor) -> Layout:
        """Codes as int8 where activations are int8 too, else as a stream of bits."""
        return stored.laid_out(layouts.compressed)

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """The tensors of one module, in the layout's order.

        q: codes [N, K]. Zero points are packed along the output rows, as the format wants them, and not along the
        groups.
        """
        module, scheme, scale = stored.module, stored.scheme, q.plain_scale
        if scheme.activations:
            integers = {f"{module}.weight": q.codes, f"{module}.weight_scale": scale}
            return integers if q.input_scale is None else {**integers, f"{module}.input_scale": q.input_scale}
        return _streams(stored, _pack(q.codes, scheme.bits), scale, q.zero)

    def relaid(self, stored: StoredTensor, u: Undecoded) -> dict[str, torch.Tensor] | None:
        """Words of streams are ours."""
        packed = u.order == "stream" and stored.scheme.activations is None
        return _streams(stored, u.data, u.plain_scale, u.zero) if packed else None

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """Every code is a level here; shapes were checked with the folder's contents."""
        return self.undecoded(stored, tensors).qtensor()

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded:
        """Scales that others wrote as [N] become [N, 1]."""
        module, scheme, (rows, columns) = stored.module, stored.scheme, stored.shape
        shape, scale = (rows, columns), tensors[f"{module}.weight_scale"].reshape(rows, -1)
        if scheme.activations:
            fixed = tensors.get(f"{module}.input_scale")
            fixed = None if fixed is None else checked_input_scale(module, fixed)
            return Undecoded(scheme, shape, "bytes", tensors[f"{module}.weight"], scale, input_scale=fixed)
        zero = None
        if scheme.zero:
            zero = _unpack(tensors[f"{module}.weight_zero_point"].t(), scheme.bits, rows).t().contiguous()
        return Undecoded(scheme, shape, "stream", tensors[f"{module}.weight_packed"], scale, zero)

    def reading(self, config: Mapping[str, Any], contents: Contents, host: Host, /) -> Reading:
        """Names as `names_of` has them, and whether transformers must decode the weights while it loads them.

        It decodes them at the first forward else. Told to it is where it reads no other way: zero points, encoders
        (sentence-transformers calls `forward` past the hook that decodes), and models whose code looks at weights
        before. What it does is found by rehearsing it.
        """
        names = names_of(host)
        if not contents:
            return names
        groups = _config_groups.groups(contents, names)
        zero = any(group.scheme.zero for group in groups)
        if not _config_groups.experts_agree(groups):
            return replace(names, obstacle="it takes one scheme for all experts, and these have several")
        decodable = _config_groups.decodable(groups)
        if zero and not decodable:
            return replace(names, obstacle="it reads zero points by decoding, for which it takes one scheme for all")
        decoded_first = decodable and (zero or _config_groups.is_encoder(config))
        ways = ([True] if zero else [True, False] if decoded_first else [False, True]) if decodable else [False]
        if host.model is None:
            return replace(names, decodes=ways[0])
        packed = {module: (stored, self.layout(stored)) for module, stored in contents.items()}
        way, obstacle = _rehearsal.choose(host.model, host.tensors, packed, host.paths, ways)
        return replace(names, decodes=way, obstacle=obstacle)

    def config(self, config: Mapping[str, Any], contents: Contents, reading: Reading) -> dict[str, Any]:
        """A group of `config_groups` for each scheme; linear layers that stay float are under `ignore`."""
        return {**config, "quantization_config": _config_groups.section(self.method, contents, reading)}

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """Modules by the names of their tensors, each with the scheme of config.json that fits their shapes."""
        schemes = _config_groups.schemes(checkpoint)
        contents: dict[str, StoredTensor] = {}
        for name, info in checkpoint.tensors.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight_packed" or (kind == "weight" and f"{module}.weight_scale" in checkpoint.tensors):
                if kind == "weight" and info.dtype != "I8":
                    raise CheckpointError(f"{checkpoint.folder}: {name} is {info.dtype}; only int8 is read", DAMAGED)
                contents[module] = self._match(module, kind == "weight", schemes, checkpoint)
        return contents

    def _match(self, module: str, integer: bool, schemes: Iterable[Scheme], checkpoint: Checkpoint) -> StoredTensor:
        """The one scheme of config.json that the tensors of `module` are shaped for, as a StoredTensor; the first where
        they are the same numbers, as a group of 128 and a row are in 128 columns.

        integer: its codes are int8 and not packed. schemes: of config.json's groups. Raises CheckpointError where none
        fits, or several do, for permuted columns and for a scale that is missing.
        """
        tensors = checkpoint.tensors
        if f"{module}.weight_g_idx" in tensors:
            raise CheckpointError(f"{checkpoint.folder}: {module} has permuted columns (weight_g_idx)", ELSEWHERE)
        rows, columns = _shape(module, integer, checkpoint)
        scale = tensors.get(f"{module}.weight_scale")
        source = _SOURCES.get(scale.dtype if scale else "")
        if scale is None or source is None:
            raise CheckpointError(f"{checkpoint.folder}: {module}.weight_scale is missing or not a float", DAMAGED)
        fits = []
        for scheme in schemes:
            stored = StoredTensor(module, scheme, (rows, columns), source_dtype=source)
            if integer != (scheme.activations is not None) or columns % (scheme.group_columns or columns):
                continue
            wanted = {name: shape for name, (_, shape) in self.layout(stored).items()}
            optional = {f"{module}.{part}" for part in ("weight_zero_point", "input_scale", "input_zero_point")}
            if optional & tensors.keys() == optional & wanted.keys() and all(
                name in tensors and tensors[name].shape == shape for name, shape in wanted.items()
            ):
                fits.append(stored)
        if len({_numbers(stored) for stored in fits}) != 1:
            parts = (f"{module}.weight", f"{module}.input_")
            shapes = {n: list(tensors[n].shape) for n in tensors if n.startswith(parts)}
            raise CheckpointError(
                f"{checkpoint.folder}: {module} [{rows}, {columns}] fits {len(fits)} schemes of config.json: {shapes}",
                "before 0.18 compressed-tensors packed 3, 5, 6 and 7 bits differently: quantize the float model again",
            )
        return fits[0]

    def notes(self, contents: Contents, fused: Sequence[Sequence[str]], reading: Reading, /) -> list[str]:
        """What transformers, vLLM and older readers make of this folder, where it is less than everything."""
        schemes = {p.scheme for p in contents.values()}
        notes = []
        if reading.obstacle is not None:
            notes.append(
                f"spicerack reads this folder, and vLLM if it has the model; transformers does not: {reading.obstacle}"
            )
        elif any(s.zero for s in schemes):
            notes.append(
                "zero points: transformers decodes all weights while loading (dequantize); vLLM reads them as they are"
            )
        elif len(schemes) > 1 and not reading.decodes:
            notes.append("several schemes: dequantize=True in transformers takes one for all and gives wrong weights")
        uneven = sorted({s.bits for s in schemes} & {3, 5, 6, 7})
        if uneven:
            notes.append(f"{uneven[0]} bits: unreadable before compressed-tensors 0.18, which packs them differently")
        for group in fused:
            kinds = {contents[m].scheme.name if m in contents else "float" for m in group}
            if len(kinds) > 1:
                notes.append(f"{', '.join(group)} are {' and '.join(sorted(kinds))}: vLLM fuses them and refuses")
                break
        return notes


def _streams(
    stored: StoredTensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of a module whose codes are packed, in the layout's order."""
    module = stored.module
    tensors = {f"{module}.weight_packed": words, f"{module}.weight_scale": scale}
    if zero is not None:
        tensors[f"{module}.weight_zero_point"] = _pack(zero.t(), stored.scheme.bits).t().contiguous()
    tensors[f"{module}.weight_shape"] = torch.tensor(stored.shape, dtype=torch.int64, device="cpu")
    return tensors


def _pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """int8 codes [..., C] of `width` bits -> int32 words [..., ceil(C width / 32)], moved by 2^(b-1) so that none is
    negative."""
    return native.pack(codes, width, offset=2 ** (width - 1))


def _unpack(words: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """Inverse of `_pack`."""
    return native.unpack(words, width, columns, offset=2 ** (width - 1)).view(torch.int8)


def _numbers(stored: StoredTensor) -> Scheme:
    """Its scheme without the name, a row as a group of all columns: alike for those that decode alike."""
    scheme, columns = stored.scheme, stored.shape[-1]
    return replace(scheme, name="", group=(scheme.group[0], scheme.group[1] or columns))


def _shape(module: str, integer: bool, checkpoint: Checkpoint) -> tuple[int, int]:
    """N and K of a module: of its codes, or of the tensor that says so where they are packed, because padding hides K.

    Raises CheckpointError for a tensor that is missing, or holds anything but two numbers above 0.
    """
    if integer:
        shape: Sequence[int] = checkpoint.tensors[f"{module}.weight"].shape
    else:
        info = checkpoint.tensors.get(f"{module}.weight_shape")
        if info is None or info.shape != (2,) or info.dtype not in ("I64", "I32"):
            raise CheckpointError(f"{checkpoint.folder}: {module}.weight_shape is not two integers", DAMAGED)
        shape = checkpoint.read(info.name).tolist()
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"{checkpoint.folder}: {module} has shape {list(shape)}, not [N, K]", DAMAGED)
    return shape[0], shape[1]


FORMAT = CompressedTensors()
