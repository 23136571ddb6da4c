"""GPTQ: the format that transformers (with gptqmodel), vLLM and SGLang read as `quant_method` "gptq".

Linear P [N, K], codes of b = 2, 3, 4 or 8 bits, groups of g inputs. (Facts: gptqmodel 7.6, run.)

    P.qweight   I32 [K b / 32, N]      code + 2^(b-1), the stream of `bits` down the inputs
    P.qzeros    I32 [K / g, N b / 32]  zero + 2^(b-1), the stream along the outputs; "gptq" (v1) has one less than that
    P.scales    F16 [K / g, N]
    P.g_idx     I32 [K]                the group of each input

Written is v1 where no layer has zero points, because older readers have nothing else, and v2 where one has: in v1 a
zero of 0 is stored as 2^b - 1, which gptqmodel's reader adds 1 to, word by word: the carry spoils the neighbour.

Act-order files say in g_idx which group an input belongs to. Where blocks of inputs belong together, however the groups
are ordered, their scales are gathered, and the layer is read exactly. Where every input has a group of its own (most
files with `desc_act`), a layer would need its inputs permuted, for which there is neither a scheme nor a place before
it: the residual stream, which q, k, v, gate and up read, is one order for all layers. That is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spicerack.errors import CheckpointError
from spicerack.numerics import native
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import word_count
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.format import Contents, Layout, MethodFormat, Reading, StoredTensor
from spicerack.storage.formats import _uniform
from spicerack.storage.formats._uniform import DAMAGED, SCALES
from spicerack.storage.reader import Checkpoint

WIDTHS = (2, 3, 4, 8)
"""Bits of a code."""
_V1, _V2 = "gptq", "gptq_v2"
"""What config.json calls the two, as `checkpoint_format`."""
_WITHOUT_INDEX = " without g_idx"
"""Ends the variant of a layer without `g_idx`."""
_SMALLEST = 8
"""Inputs of the smallest group that kernels have: scattered act-order has groups of one, which are floats."""


@dataclass(frozen=True, slots=True)
class GPTQ(MethodFormat):
    """Integers of one width with float16 scales, of linear layers. Methods: `storage.format.Format`.

    A tensor's `variant` is its `checkpoint_format`.
    """

    method = "gptq"
    name: str = "gptq"
    rank: int = 30
    read_by_others: bool = True
    on_request: bool = True

    def prepared(self, contents: Contents) -> dict[str, StoredTensor]:
        """All in one scheme, in v2 where that has zero points."""
        uniform = _uniform.common(contents)
        version = _V2 if any(stored.scheme.zero for stored in uniform.values()) else _V1
        return {module: replace(stored, variant=version) for module, stored in uniform.items()}

    def obstacles(self, contents: Contents) -> list[str]:
        """What GPTQ has not, for each module that needs it; then what is not like most."""
        reasons = [(p, _uniform.obstacle(p, WIDTHS)) for p in contents.values()]
        lacking = [f"{p.module}: gptq has no {reason}" for p, reason in reasons if reason]
        return lacking or _uniform.mixture(self.name, contents)

    def layout(self, stored: StoredTensor) -> Layout:
        """The tensors as they are written; of an act-order layer that is read, only the names hold."""
        (n, k), scheme, module = stored.shape, stored.scheme, stored.module
        groups = k // (scheme.group_columns or k)
        layout: Layout = {
            f"{module}.qweight": ("I32", (word_count(k, scheme.bits), n)),
            f"{module}.qzeros": ("I32", (groups, word_count(n, scheme.bits))),
            f"{module}.scales": ("F16", (groups, n)),
        }
        return layout if stored.variant.endswith(_WITHOUT_INDEX) else {**layout, f"{module}.g_idx": ("I32", (k,))}

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """Codes and zero points moved by 2^(b-1); zero points of none are that itself."""
        width = stored.scheme.bits
        return self._tensors(stored, native.pack(q.codes, width, offset=2 ** (width - 1)), q.plain_scale, q.zero)

    def relaid(self, stored: StoredTensor, u: Undecoded) -> dict[str, torch.Tensor] | None:
        """Words of streams are ours, turned."""
        return self._tensors(stored, u.data, u.plain_scale, u.zero) if u.order == "stream" else None

    def _tensors(
        self, stored: StoredTensor, words: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Of codes as words [N, ..], scales and zero points [N, G]."""
        module, width, columns = stored.module, stored.scheme.bits, stored.shape[1]
        middle = 2 ** (width - 1)
        zero = torch.zeros(scale.shape, dtype=torch.int8, device="cpu") if zeros is None else zeros
        shift = middle - 1 if stored.variant == _V1 else middle
        size = stored.scheme.group_columns or columns
        return {
            f"{module}.qweight": words.t().contiguous(),
            f"{module}.qzeros": native.pack(zero.t().contiguous(), width, offset=shift),
            f"{module}.scales": scale.t().contiguous(),
            f"{module}.g_idx": torch.arange(columns, dtype=torch.int32, device="cpu") // size,
        }

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """Every code is a level here; shapes were checked with the folder's contents."""
        return self.undecoded(stored, tensors).qtensor()

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded:
        """The words, outputs first; scales and zero points of an act-order layer in the order of its inputs."""
        module, (n, k), scheme = stored.module, stored.shape, stored.scheme
        scale = _uniform.turned(_uniform.finite(module, tensors[f"{module}.scales"]))
        zero = _zeros(tensors[f"{module}.qzeros"], scheme.bits, n, stored.variant) if scheme.zero else None
        zero = None if zero is None else _uniform.turned(zero)
        index = tensors.get(f"{module}.g_idx")
        if index is not None:
            order = index[:: scheme.group_columns or k].long()
            scale, zero = scale[:, order], None if zero is None else zero[:, order]
        words = tensors[f"{module}.qweight"].t().contiguous()
        zero = None if zero is None else zero.contiguous()
        return Undecoded(scheme, (n, k), "stream", words, scale.contiguous(), zero)

    def config(self, config: Mapping[str, Any], contents: Contents, reading: Reading) -> dict[str, Any]:
        """What transformers, gptqmodel and vLLM each look for; layers that stay float are excepted by pattern."""
        first = next(iter(contents.values()))
        scheme = first.scheme
        section: dict[str, Any] = {
            "quant_method": self.method,
            "bits": scheme.bits,
            "group_size": scheme.group_columns or -1,
            "desc_act": False,
            "sym": not scheme.zero,
            "checkpoint_format": first.variant,
            "true_sequential": True,
            "damp_percent": 0.01,
            "lm_head": any(stored.role == "head" for stored in contents.values()),
            "pack_dtype": "int32",
        }
        blocks = [name for name in reading.floats if any(part.isdigit() for part in name.split("."))]
        if blocks:  # gptqmodel and vLLM take negative patterns, optimum a list of what is quantized within a block
            section["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in blocks}
            section["modules_in_block_to_quantize"] = [sorted({_within_block(module) for module in contents})]
        return {**config, "quantization_config": section}

    def beside(self, config: Mapping[str, Any], /) -> Mapping[str, Mapping[str, Any]]:
        """The section once more, where AutoGPTQ and its time look for it."""
        return {"quantize_config.json": config["quantization_config"]}

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """Modules by the names of their tensors. Widths and groups are told by shapes, zero points by looking."""
        section, where = checkpoint.config["quantization_config"], f"{checkpoint.folder}: config.json"
        version = section.get("checkpoint_format", _V1)
        if version not in (_V1, _V2):
            raise CheckpointError(f"{where} has the checkpoint_format {version!r}", f"one of {_V1}, {_V2} is read")
        if section.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(f"{where} has the pack_dtype {section['pack_dtype']!r}", "int32 is read")
        width = _uniform.width(section, where, WIDTHS)
        modules = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
        if not modules:
            raise CheckpointError(f"{checkpoint.folder} has no packed weights", DAMAGED)
        return {module: _stored(module, width, version, checkpoint) for module in modules}

    def notes(self, contents: Contents, _fused: Sequence[Sequence[str]], _reading: Reading, /) -> list[str]:
        """Who reads it."""
        notes = ["transformers reads it with gptqmodel and optimum"]
        scheme = next(iter(contents.values())).scheme
        if scheme.zero or scheme.bits not in (4, 8):
            notes.append(f"{scheme}: vLLM reads GPTQ of 4 and 8 bits without zero points only")
        return notes


def _within_block(module: str) -> str:
    """A module's path behind the last number in it: `model.layers.3.mlp.up_proj` -> `mlp.up_proj`."""
    parts = module.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def _zeros(stored: torch.Tensor, width: int, rows: int, variant: str) -> torch.Tensor:
    """qzeros I32 [G, words] -> int8 [G, N], around 0: v1 has one less, modulo 2^b."""
    unsigned = native.unpack(stored, width, rows)
    if variant.startswith(_V1) and not variant.startswith(_V2):
        unsigned = (unsigned + 1) & (2**width - 1)
    return unsigned.to(torch.int16).sub_(2 ** (width - 1)).to(torch.int8)


def _stored(module: str, given: int, version: str, checkpoint: Checkpoint) -> StoredTensor:
    """`module` as a StoredTensor. given: bits that config.json says, for layers without g_idx.

    Raises CheckpointError for a tensor that is missing, of another type or shape, and for scattered act-order.
    """
    weight = _uniform.part(checkpoint, module, "qweight", ("I32",))
    zeros = _uniform.part(checkpoint, module, "qzeros", ("I32",))
    scales = _uniform.part(checkpoint, module, "scales", tuple(SCALES))
    index = checkpoint.tensors.get(f"{module}.g_idx")
    (words, n), groups = weight.shape, scales.shape[0]
    k, width = words * 32 // given, given
    if index is not None:
        if len(index.shape) != 1 or index.dtype not in ("I32", "I64") or not index.shape[0]:
            raise CheckpointError(f"{checkpoint.folder}: {index.name} is {index.dtype} {list(index.shape)}", DAMAGED)
        k = index.shape[0]
        width = words * 32 // k
    wanted = (groups, word_count(n, width)) if width in WIDTHS else None
    if wanted is None or words * 32 != k * width or scales.shape[1] != n or zeros.shape != wanted or k % groups:
        shapes = {name.rpartition(".")[2]: list(info.shape) for name, info in checkpoint.tensors.items()
                  if name.startswith(f"{module}.")}  # fmt: skip
        raise CheckpointError(f"{checkpoint.folder}: {module}: shapes do not belong together: {shapes}", DAMAGED)
    variant = version if index is not None else version + _WITHOUT_INDEX
    zero = _zeros(checkpoint.read(zeros.name), width, n, variant)
    runs = k // groups if index is None else _runs(checkpoint, index.name, groups)
    scheme = _uniform.scheme_of(width, k, k // runs, zero)
    return StoredTensor(module, scheme, (n, k), source_dtype=SCALES[scales.dtype], variant=variant)


def _runs(checkpoint: Checkpoint, name: str, groups: int) -> int:
    """Inputs, neighbours in g_idx, that share a group: the usual number, or fewer where groups come in pieces.

    Raises CheckpointError for groups that there are not, and where the inputs of a group are scattered.
    """
    index = checkpoint.read(name).long()
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(f"{checkpoint.folder}: {name} names groups that there are not", DAMAGED)
    k = len(index)
    borders = (index[1:] != index[:-1]).nonzero()[:, 0] + 1
    size = math.gcd(k, *borders.tolist())
    if size < min(_SMALLEST, k // groups):
        raise CheckpointError(
            f"{checkpoint.folder}: {name.removesuffix('.g_idx')} has its inputs in act-order (desc_act): those of a "
            "group are scattered",
            "no scheme holds that: take a version without desc_act (or with static_groups), or the float model",
        )
    return size


FORMAT = GPTQ()
