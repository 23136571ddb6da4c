"""AWQ: what transformers (with gptqmodel), vLLM, SGLang and mlx-lm read as `quant_method` "awq", in the order of its
GEMM kernel.

Linear P [N, K], codes of 4 bits, groups of g inputs. (Facts: gptqmodel 7.6's torch_awq, run.)

    P.qweight   I32 [K, N / 8]      code + 8; bits 4j.. of word w are of output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[j]
    P.qzeros    I32 [K / g, N / 8]  zero + 8, in the same order
    P.scales    F16 [K / g, N]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spicerack.errors import CheckpointError
from spicerack.numerics import native
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.format import Contents, Layout, MethodFormat, Reading, StoredTensor
from spicerack.storage.formats import _uniform
from spicerack.storage.formats._uniform import DAMAGED, SCALES
from spicerack.storage.reader import Checkpoint

WIDTHS = (4,)
"""Bits of a code."""
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in each half byte of a word, the lowest first."""
_STRIP = 64
"""Rows of words that are turned at a time: half a megabyte of a layer of 4096 inputs stays in the cache."""
Words = npt.NDArray[np.uint32]
_MIDDLE = 8
"""What is added to codes and zero points, so that none is negative."""


@dataclass(frozen=True, slots=True)
class AWQ(MethodFormat):
    """Integers of 4 bits with float16 scales, of linear layers. Methods: `storage.format.Format`."""

    method = "awq"
    name: str = "awq"
    rank: int = 31
    read_by_others: bool = True
    on_request: bool = True

    def prepared(self, contents: Contents) -> dict[str, StoredTensor]:
        """All in one scheme."""
        return _uniform.common(contents)

    def obstacles(self, contents: Contents) -> list[str]:
        """What AWQ has not, for each module that needs it; then what is not like most."""
        reasons = [(p, _uniform.obstacle(p, WIDTHS)) for p in contents.values()]
        lacking = [f"{p.module}: awq has no {reason}" for p, reason in reasons if reason]
        return lacking or _uniform.mixture(self.name, contents)

    def layout(self, stored: StoredTensor) -> Layout:
        """Inputs first, outputs packed."""
        (n, k), module = stored.shape, stored.module
        groups = k // (stored.scheme.group_columns or k)
        return {
            f"{module}.qweight": ("I32", (k, n // 8)),
            f"{module}.qzeros": ("I32", (groups, n // 8)),
            f"{module}.scales": ("F16", (groups, n)),
        }

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """Codes and zero points moved by 8; zero points of none are that itself."""
        words = native.pack(q.codes, stored.scheme.bits, offset=_MIDDLE)
        return self._tensors(stored, words, q.plain_scale, q.zero)

    def relaid(self, stored: StoredTensor, u: Undecoded) -> dict[str, torch.Tensor] | None:
        """Words of streams, eight rows of which become eight columns."""
        return self._tensors(stored, u.data, u.plain_scale, u.zero) if u.order == "stream" else None

    def _tensors(
        self, stored: StoredTensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Of codes as words of a stream [N, K / 8], scales and zero points [N, G]."""
        module = stored.module
        zeros = torch.zeros(scale.shape, dtype=torch.int8, device="cpu") if zero is None else zero
        return {
            f"{module}.qweight": _interleaved(words),
            f"{module}.qzeros": _pack(zeros),
            f"{module}.scales": scale.t().contiguous(),
        }

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """Every code is a level here; shapes were checked with the folder's contents."""
        if (u := self.undecoded(stored, tensors)) is not None:
            return u.qtensor()
        codes = _unpack(tensors[f"{stored.module}.qweight"])
        return QTensor(stored.scheme, codes, *_scales(stored, tensors))

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded | None:
        """Words of a stream, of as many inputs as fill them."""
        (n, k), words = stored.shape, tensors[f"{stored.module}.qweight"]
        if k % 8:
            return None
        return Undecoded(stored.scheme, (n, k), "stream", _streams(words), *_scales(stored, tensors))

    def config(self, config: Mapping[str, Any], contents: Contents, reading: Reading) -> dict[str, Any]:
        """`modules_to_not_convert`: the linear layers that stay float."""
        scheme = next(iter(contents.values())).scheme
        section = {
            "quant_method": self.method,
            "bits": scheme.bits,
            "group_size": scheme.group_columns or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(reading.floats) or None,
        }
        return {**config, "quantization_config": section}

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """Modules by the names of their tensors, which tell as well what `modules_to_not_convert` says."""
        section, where = checkpoint.config["quantization_config"], f"{checkpoint.folder}: config.json"
        version = section.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise CheckpointError(f"{where} has the version {version!r}: another order of codes", "gemm is read")
        _uniform.width(section, where, WIDTHS)
        modules = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
        if not modules:
            raise CheckpointError(f"{checkpoint.folder} has no packed weights", DAMAGED)
        return {module: _stored(module, checkpoint) for module in modules}

    def notes(self, contents: Contents, _fused: Sequence[Sequence[str]], _reading: Reading, /) -> list[str]:
        """Who reads it."""
        return ["transformers reads it with gptqmodel"]


def _scales(stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points [N, G] of a module. Raises CheckpointError."""
    scale = _uniform.turned(_uniform.finite(stored.module, tensors[f"{stored.module}.scales"]))
    return scale, _unpack(tensors[f"{stored.module}.qzeros"]) if stored.scheme.zero else None


def _interleaved(words: torch.Tensor) -> torch.Tensor:
    """Words of streams int32 [N, K / 8] -> int32 [K, N / 8] in the kernel's order: no code is taken out of its word."""
    n, count = words.shape
    eights = words.numpy().view(np.uint32).reshape(n // 8, 8, count)
    out = np.empty((n // 8, count, 8), np.uint32)
    for start in range(0, n // 8, _STRIP):
        part = eights[start : start + _STRIP]
        for place, row in enumerate(_turned([part[:, output] for output in _ORDER])):
            out[start : start + _STRIP, :, place] = row
    return torch.from_numpy(out.reshape(n // 8, 8 * count).view(np.int32)).t().contiguous()


def _streams(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `_interleaved`."""
    k, eighth = words.shape
    eights = words.t().contiguous().numpy().view(np.uint32).reshape(eighth, k // 8, 8)
    out = np.empty((eighth, 8, k // 8), np.uint32)
    for start in range(0, eighth, _STRIP):
        part = eights[start : start + _STRIP]
        for output, row in zip(_ORDER, _turned([part[..., place] for place in range(8)]), strict=True):
            out[start : start + _STRIP, output] = row
    return torch.from_numpy(out.reshape(8 * eighth, k // 8).view(np.int32))


def _turned(rows: list[Words]) -> list[Words]:
    """Eight words of eight half bytes each: half byte j of word i becomes half byte i of word j.

    Squares of 1, 2 and 4 half bytes change places: three steps of a few operations for 64 codes.
    """
    turned = list(rows)
    for step, mask in ((1, 0x0F0F0F0F), (2, 0x00FF00FF), (4, 0x0000FFFF)):
        shift = np.uint32(4 * step)
        for low in (i for i in range(8) if not i & step):
            swap = ((turned[low] >> shift) ^ turned[low + step]) & np.uint32(mask)
            turned[low + step] = turned[low + step] ^ swap
            turned[low] = turned[low] ^ swap << shift
    return turned


def _pack(values: torch.Tensor) -> torch.Tensor:
    """int8 [N, C] around 0 -> int32 words [C, N / 8]: eight outputs to a word, in the kernel's order."""
    eights = (values + _MIDDLE).view(torch.uint8).reshape(-1, 8, values.shape[1])
    # two half bytes at a time, then bytes are put side by side: a fourth of the work that shifting words would be
    pairs = [eights[:, _ORDER[j]] | eights[:, _ORDER[j + 1]] << 4 for j in range(0, 8, 2)]
    return torch.stack(pairs, dim=-1).view(torch.int32)[..., 0].t().contiguous()


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `_pack`."""
    c, count = words.shape
    octets = words.t().reshape(-1).view(torch.uint8).reshape(count, c, 4)
    values = torch.empty((count, 8, c), dtype=torch.uint8, device="cpu")
    for place in range(4):
        octet = octets[..., place]
        values[:, _ORDER[2 * place]] = octet & 15
        values[:, _ORDER[2 * place + 1]] = octet >> 4
    return values.reshape(8 * count, c).view(torch.int8).sub_(_MIDDLE)


def _stored(module: str, checkpoint: Checkpoint) -> StoredTensor:
    """`module` as a StoredTensor. Raises CheckpointError for a tensor that is missing, or of another type or shape."""
    weight = _uniform.part(checkpoint, module, "qweight", ("I32",))
    zeros = _uniform.part(checkpoint, module, "qzeros", ("I32",))
    scales = _uniform.part(checkpoint, module, "scales", tuple(SCALES))
    (k, words), (groups, n) = weight.shape, scales.shape
    if n != 8 * words or zeros.shape != (groups, words) or k % groups:
        shapes = f"qweight {list(weight.shape)}, qzeros {list(zeros.shape)}, scales {list(scales.shape)}"
        raise CheckpointError(f"{checkpoint.folder}: {module}: shapes do not belong together: {shapes}", DAMAGED)
    scheme = _uniform.scheme_of(4, k, groups, _unpack(checkpoint.read(zeros.name)))
    return StoredTensor(module, scheme, (n, k), source_dtype=SCALES[scales.dtype])


FORMAT = AWQ()
