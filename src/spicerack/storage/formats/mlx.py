"""MLX: the folders that mlx-lm writes and reads, on Macs. (Facts: mlx 0.32, mlx-lm 0.32, run.)

Weight P [N, K], codes of b bits, groups of g inputs:

    affine     P.weight  U32 [N, K b / 32]   codes from 0, the stream of `bits` along K       b = 2, 3, 4, 5, 6, 8
               P.scales  float [N, K / g]                                                     g = 32, 64, 128
               P.biases  float [N, K / g]    w = scale * code + bias
    mxfp4      P.weight  U32 [N, K / 8]      E2M1      P.scales  U8 [N, K / 32]   powers of two
    nvfp4      the same                                P.scales  U8 [N, K / 16]   E4M3

config.json says so in a section `quantization`, with an entry for every module that is not like most.

A bias is -zero * scale, of the zero point in the codes from 0. Of symmetric schemes that is a power of two times the
scale, which 16 bits hold; of others it is not, and 32 bits are written, so that nothing is rounded. What others
quantized has biases that are no multiples of scales: such tensors become schemes with minima (`w4g64m`). Which of both
a tensor is, is told by looking at them (`_mlx_biases`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spicerack.errors import CheckpointError
from spicerack.numerics import native
from spicerack.numerics.dtypes import SOURCE_BY_NAME, safetensors_dtype
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme, parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage import stacks
from spicerack.storage.format import Contents, Host, Layout, Reading, StoredTensor, names_of
from spicerack.storage.formats._mlx_biases import multiples, told
from spicerack.storage.reader import Checkpoint, TensorInfo

Mode = Literal["affine", "mxfp4", "nvfp4"]
_WIDTHS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_FLOATS: Mapping[str, Mode] = {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
"""Scheme -> the mode that holds it."""
_SECTIONS = ("quantization", "quantization_config")
"""mlx-lm writes the same into both, and reads the first that is there."""
_DAMAGED = "the folder is damaged, or in a variant of MLX that is not read"


@dataclass(frozen=True, slots=True)
class MLX:
    """Integers with a float minimum, and small floats, of linear layers and embeddings. Methods: see `Format`.

    Only config.json tells MLX's folders from others, and no `quant_method` is there.
    """

    name: str = "mlx"
    rank: int = 32
    read_by_others: bool = True
    on_request: bool = True

    def prepared(self, contents: Contents) -> Contents:
        """As they are: every module may have an entry of its own in config.json."""
        return contents

    def obstacles(self, contents: Contents) -> list[str]:
        """What MLX has not, for each module that needs it."""
        reasons = ((p, _obstacle(p)) for p in contents.values())
        return [f"{p.module}: mlx has no {reason}" for p, reason in reasons if reason] + _uneven(contents)

    def layout(self, stored: StoredTensor) -> Layout:
        """Codes, scales, and biases where the mode has them."""
        (n, k), scheme, module = stored.shape, stored.scheme, stored.module
        groups = (n, k // (scheme.group_columns or k))
        layout: Layout = {f"{module}.weight": ("U32", (n, k * scheme.bits // 32))}
        if scheme.name in _FLOATS:
            return {**layout, f"{module}.scales": ("U8", groups)}
        dtype = safetensors_dtype(_floats(stored))
        return {**layout, f"{module}.scales": (dtype, groups), f"{module}.biases": (dtype, groups)}

    def stacks(self, contents: Contents, /) -> Mapping[str, Sequence[str]]:
        """Experts: mlx-lm has the layers of all of them in one."""
        return stacks.stacks_of(contents)

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """Codes from 0 and what a code of 0 stands for."""
        module, scheme = stored.module, stored.scheme
        words = native.pack(q.codes, scheme.bits, offset=-scheme.levels.lo)
        tensors = {f"{module}.weight": words.view(torch.uint32)}
        if scheme.name in _FLOATS:
            scale = q.scale.codes if isinstance(q.scale, QTensor) else q.scale
            return {**tensors, f"{module}.scales": scale.contiguous().view(torch.uint8)}
        dtype, biases = _floats(stored), _biases(q.plain_scale, q.zero, q.min, scheme)
        return {**tensors, f"{module}.scales": q.plain_scale.to(dtype), f"{module}.biases": biases.to(dtype)}

    def relaid(self, stored: StoredTensor, u: Undecoded) -> dict[str, torch.Tensor] | None:
        """Words of streams are ours."""
        if u.order != "stream":
            return None
        module, dtype = stored.module, _floats(stored)
        return {
            f"{module}.weight": u.data.view(torch.uint32),
            f"{module}.scales": u.plain_scale.to(dtype),
            f"{module}.biases": _biases(u.plain_scale, u.zero, u.min, stored.scheme).to(dtype),
        }

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """With scales in the type that the scheme stores them in."""
        module, scheme, (_, k) = stored.module, stored.scheme, stored.shape
        words = tensors[f"{module}.weight"].view(torch.int32)
        codes = native.unpack(words, scheme.bits, k, offset=-scheme.levels.lo).view(codes_dtype(scheme))
        scales = tensors[f"{module}.scales"]
        if scheme.name == "mxfp4":
            return QTensor(scheme, codes, _finite(module, scales.view(torch.float8_e8m0fnu)))
        if scheme.name == "nvfp4":
            assert isinstance(scheme.scale, Scheme)
            one = torch.ones((1, 1), dtype=torch.float32, device="cpu")
            _finite(module, scales.view(torch.float8_e4m3fn))
            return QTensor(scheme, codes, QTensor(scheme.scale, scales, one))
        return _affine(stored, codes, scales, tensors[f"{module}.biases"])

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded | None:
        """Of plain schemes: the words are ours."""
        if stored.scheme.plain_obstacle is not None:
            return None
        module, (n, k) = stored.module, stored.shape
        words, scales = tensors[f"{module}.weight"].view(torch.int32), tensors[f"{module}.scales"]
        zero = _zeros(stored.scheme, scales, tensors[f"{module}.biases"]) if stored.scheme.zero else None
        return Undecoded(stored.scheme, (n, k), "stream", words, _stored_scale(stored, scales), zero)

    def reading(self, _config: Mapping[str, Any], _contents: Contents, host: Host, /) -> Reading:
        """Names alone: what has no scales is float."""
        return names_of(host)

    def config(self, config: Mapping[str, Any], contents: Contents, _reading: Reading, /) -> dict[str, Any]:
        """The section, twice; modules that are not like most have entries under their names, experts under their
        stack's."""
        names = {module: (stacks.place(module) or (module, 0))[0] for module in contents}
        settings = {names[module]: _settings(stored.scheme) for module, stored in contents.items()}
        counts: dict[str, int] = {}
        for one in settings.values():
            counts[str(one)] = counts.get(str(one), 0) + 1
        most = max(settings.values(), key=lambda one: counts[str(one)])
        section = {**most, **{module: one for module, one in settings.items() if one != most}}
        return {**config, "quantization": section, "quantization_config": section}

    def beside(self, _config: Mapping[str, Any], /) -> Mapping[str, Mapping[str, Any]]:
        """See `Format.beside`: none."""
        return {}

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """By a section that has a group and a width and does not say by which method."""
        section = _section(config)
        return section is not None and "quant_method" not in section and {"group_size", "bits"} <= section.keys()

    def float_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Without both sections."""
        return {key: value for key, value in config.items() if key not in _SECTIONS}

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """Modules with scales beside words; what they are is told by shapes and biases, with config.json's group."""
        section = _section(checkpoint.config)
        assert section is not None, "it was recognized by this"
        modules = [name.removesuffix(".scales") for name in checkpoint.tensors if name.endswith(".scales")]
        if not modules:
            raise CheckpointError(f"{checkpoint.folder} has no packed weights", _DAMAGED)
        return {module: _stored(module, section, checkpoint) for module in modules}

    def notes(self, contents: Contents, _fused: Sequence[Sequence[str]], _reading: Reading, /) -> list[str]:
        """Who reads it; what zero points cost."""
        notes = ["mlx-lm loads it, where it has the family, on Macs and on Linux"]
        if wide := sorted({p.scheme.name for p in contents.values() if _floats(p) == torch.float32}):
            notes.append(f"scales and biases of {', '.join(wide)} are in float32: in 16 bits they would be rounded")
        return notes


def _obstacle(p: StoredTensor) -> str | None:
    """What MLX lacks for `p`, as the end of "mlx has no"; None if it holds it exactly."""
    scheme, integers = p.scheme, p.scheme.levels.integers
    if p.role not in ("linear", "head", "router", "embedding") or p.transposed or len(p.shape) != 2:
        return f"quantized {p.role}"
    if scheme.name == "mxfp4":
        return None
    if scheme.name == "nvfp4":
        return "scale of the tensor beside nvfp4's scales of groups"
    if integers is None or integers.hi - integers.lo + 1 != 2**scheme.bits:
        return f"levels of {scheme.name}"
    if isinstance(scheme.scale, Scheme) or isinstance(scheme.min, Scheme) or scheme.group[0] != 1:
        return f"scales like those of {scheme.name}"
    if scheme.scale == "float32" and scheme.min is None:
        return f"float32 scales without minima ({scheme.name}): it would round products with them"
    if scheme.activations:
        return f"activations in integers ({scheme.name})"
    if scheme.bits not in _WIDTHS:
        return f"{scheme.bits} bits ({scheme.name}), only {', '.join(map(str, _WIDTHS))}"
    if scheme.group_columns not in _GROUPS:
        return f"groups of {scheme.group_columns or 'a row'}, only {', '.join(map(str, _GROUPS))}"
    return None


def _uneven(contents: Contents) -> list[str]:
    """Why experts cannot be one stack, a sentence each."""
    reasons = []
    for stack, modules in stacks.stacks_of(contents).items():
        first = contents[modules[0]]
        places = [at[1] for module in modules if (at := stacks.place(module)) is not None]
        if len(modules) > 1 and places != list(range(len(modules))):
            reasons.append(f"{modules[0]}: mlx has no {stack} of some experts only")
        reasons += [
            f"{module}: mlx has no {stack} of experts that differ ({contents[module].scheme}, {first.scheme})"
            for module in modules
            if (contents[module].scheme, contents[module].shape, _floats(contents[module]))
            != (first.scheme, first.shape, _floats(first))
        ]
    return reasons


def _floats(stored: StoredTensor) -> torch.dtype:
    """The type of scales and biases: float32 where a bias has more bits than the scale that it is a multiple of."""
    integers = stored.scheme.levels.integers
    if stored.scheme.name in _FLOATS:
        return torch.uint8
    if stored.scheme.zero or (integers is not None and integers.half):
        return torch.float32
    return dtype_of(stored.scheme.scale, stored.source_dtype)


def _biases(
    scale: torch.Tensor, zero: torch.Tensor | None, low: torch.Tensor | QTensor | None, scheme: Scheme
) -> torch.Tensor:
    """What a code of 0 stands for, float32 [N, G]: the minimum of the group, or that of levels around the zero."""
    if low is not None:
        assert isinstance(low, torch.Tensor), "quantized minima were refused"
        return low
    lowest = torch.full(scale.shape, scheme.integers.lowest, dtype=torch.float32, device="cpu")
    return (lowest if zero is None else lowest - zero) * scale.float()


def _zeros(scheme: Scheme, scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Zero points int8 [N, G] of biases that are multiples of their scales, around 0."""
    return multiples(scales, biases).sub_(2 ** (scheme.bits - 1)).to(torch.int8)


def _affine(stored: StoredTensor, codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor) -> QTensor:
    """Codes from the lowest, scales and biases as they lie there -> the QTensor."""
    scheme = stored.scheme
    zero = _zeros(scheme, scales, biases) if scheme.zero else None
    minimum = _stored_scale(stored, biases) if scheme.min is not None else None
    return QTensor(scheme, codes, _stored_scale(stored, scales), zero, minimum)


def _stored_scale(stored: StoredTensor, scales: torch.Tensor) -> torch.Tensor:
    """Scales in the type that the scheme stores: whoever looked at the folder knows that it holds them."""
    return _finite(stored.module, scales).to(dtype_of(stored.scheme.scale, stored.source_dtype))


def _finite(module: str, scales: torch.Tensor) -> torch.Tensor:
    """The scales or biases. Raises CheckpointError for NaN and infinities, which a file of a stranger may have."""
    if not bool(torch.isfinite(scales.float()).all()):
        raise CheckpointError(f"{module}.scales: one of them is not finite", _DAMAGED)
    return scales


def _settings(scheme: Scheme) -> dict[str, Any]:
    """What config.json says of a scheme."""
    return {"group_size": scheme.group_columns, "bits": scheme.bits, "mode": _FLOATS.get(scheme.name, "affine")}


# ---- reading ---------------------------------------------------------------------------------------------------------


def _section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section about quantization, of mlx-lm's two names; None for neither."""
    sections = (config.get(name) for name in _SECTIONS)
    return next((section for section in sections if isinstance(section, dict) and section), None)


def _stored(module: str, section: Mapping[str, Any], checkpoint: Checkpoint) -> StoredTensor:
    """`module` as a StoredTensor. Raises CheckpointError, naming tensor and rule, for what does not belong together."""
    weight, scales = (checkpoint.tensors.get(f"{module}.{part}") for part in ("weight", "scales"))
    if weight is None or scales is None or weight.dtype != "U32" or len(weight.shape) != 2 or 0 in weight.shape:
        given = "missing" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise CheckpointError(f"{checkpoint.folder}: {module}.weight is {given}, not U32 [N, words]", _DAMAGED)
    override = section.get(module)
    settings = {**section, **override} if isinstance(override, dict) else section
    (n, words), size, mode = weight.shape, settings["group_size"], settings.get("mode", "affine")
    if mode not in ("affine", *_FLOATS.values()):
        raise CheckpointError(f"{checkpoint.folder}: {module} has the mode {mode!r}", "it is not read: use mlx-lm")
    fits = type(size) is int and 0 < size <= 1 << 16 and len(scales.shape) == 2 and scales.shape[0] == n
    k = size * scales.shape[1] if fits else 0
    if not k or words * 32 % k or words * 32 // k not in _WIDTHS:
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: {list(weight.shape)} words and scales {list(scales.shape)} are no groups "
            f"of {size!r}",
            _DAMAGED,
        )
    width = words * 32 // k
    if mode != "affine":
        return _small_floats(checkpoint, module, scales, (n, k), mode, width)
    biases = checkpoint.tensors.get(f"{module}.biases")
    if biases is None or (biases.dtype, biases.shape) != (scales.dtype, scales.shape):
        raise CheckpointError(f"{checkpoint.folder}: {module}.biases is not like its scales", _DAMAGED)
    if scales.dtype not in SOURCE_BY_NAME:
        raise CheckpointError(f"{checkpoint.folder}: {scales.name} is {scales.dtype}, not a float", _DAMAGED)
    name, dtype = told(checkpoint, scales, biases, f"w{width}g{size}", width)
    return StoredTensor(module, parse(name), (n, k), source_dtype=dtype)


def _small_floats(
    checkpoint: Checkpoint, module: str, scales: TensorInfo, shape: tuple[int, int], mode: str, width: int
) -> StoredTensor:
    """A module in mxfp4 or nvfp4."""
    scheme = parse(mode)
    if scales.dtype != "U8" or width != scheme.bits or shape[1] != scales.shape[1] * (scheme.group_columns or 0):
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: {scales.dtype} scales {list(scales.shape)} are not those of {mode}",
            _DAMAGED,
        )
    return StoredTensor(module, scheme, shape)


FORMAT = MLX()
