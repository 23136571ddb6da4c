"""Releases in 8 and 4 bits as float checkpoints: tensors are decoded one at a time, as they are read.

    fp8       X.weight in FP8, X.weight_scale_inv for blocks [N / rows, K / columns] or the tensor   DeepSeek-V3, Qwen
    float-    X.weight in FP8, X.weight_scale for the tensor or each row                    compressed-tensors' folders
    mxfp4     X_blocks, X_scales: [.., G, 16] bytes of two codes, a power of two for 32              gpt-oss

A weight is its code times its scale, in float32, rounded once to the model's type. That is exact where the scale is a
power of two or of eight bits and the type wide enough, and elsewhere what these models' own code computes. FP8 is the
form in which they were trained or released, and there is nothing finer to start from; whoever has the float model
starts from that. What is stored of activations is left out: a scheme here says anew how they are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from spicerack.errors import CheckpointError, counted
from spicerack.storage.reader import BITS, Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

Coding = Literal["fp8", "mxfp4"]
_FP8 = "F8_E4M3"
_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_MXFP4_BLOCK = 16
"""Bytes of a block: 32 codes."""
_MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What a code of four bits stands for (OCP MX specification v1.0, E2M1)."""
_PIECE = 1 << 24
"""Weights that are decoded at once: 64 MB of float32 beside the tensor itself."""
_REMEDY = "fetch the files again, or start from the float model"


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor that lies in the folder as codes and scales.

    coding   how
    codes    the tensor that holds its codes
    scale    the tensor that holds its scales
    block    [rows, columns] of the last two axes that share a scale, of fp8
    """

    coding: Coding
    codes: TensorInfo
    scale: TensorInfo
    block: tuple[int, int] = (1, 1)

    @property
    def told(self) -> str:
        """For the ledger: what the tensor was decoded from."""
        if self.coding == "mxfp4":
            return "decoded from MXFP4"
        return f"decoded from {self.codes.dtype} with a scale for {self.block[0]} x {self.block[1]} weights"


@dataclass(frozen=True, kw_only=True)
class Released(Checkpoint):
    """A checkpoint whose tensors are those of `base`, decoded.

    base    the folder as it is
    coded   tensor -> how it lies there; others are as they are
    """

    base: Checkpoint
    coded: Mapping[str, Coded]

    def held(self) -> Released:
        """See `Checkpoint.held`."""
        return replace(self, base=self.base.held())

    def release(self, name: str) -> None:
        """See `Checkpoint.release`."""
        coded = self.coded.get(name)
        for part in (name,) if coded is None else (coded.codes.name, coded.scale.name):
            self.base.release(part)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, decoded, on the CPU, in the model's type."""
        coded = self.coded.get(name)
        if coded is None:
            return self.base.read(name)
        return self._decoded(name, self.base.read(coded.codes.name), self.base.read(coded.scale.name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1 of its first axis; only their codes are read."""
        coded = self.coded.get(name)
        if coded is None:
            return self.base.read_rows(name, start, stop)
        stop = min(stop, self.tensors[name].shape[0])
        codes = self.base.read_rows(coded.codes.name, start, stop)
        scale = self.base.read(coded.scale.name)
        if len(self.tensors[name].shape) == 2:  # rows of a matrix share scales; those of a stack have their own
            scale = scale if scale.numel() == 1 else _spread(scale.reshape(_grid(coded)), coded.block[0], 0)[start:stop]
            return _fp8(codes, scale, (1, coded.block[1]), _torch_type(self.tensors[name]))
        return self._decoded(name, codes, scale if scale.numel() == 1 else scale[start:stop])

    def told(self, name: str) -> tuple[str, ...]:
        """See `Checkpoint.told`."""
        return (self.coded[name].told,) if name in self.coded else ()

    @property
    def stored_bytes(self) -> int:
        """See `Checkpoint.stored_bytes`."""
        return self.base.stored_bytes

    def fingerprint(self) -> str:
        """That of the folder."""
        return self.base.fingerprint()

    def _decoded(self, name: str, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """All of these codes, [.., N, K] of fp8 or [.., R, G, 16] of mxfp4."""
        coded, dtype = self.coded[name], _torch_type(self.tensors[name])
        if coded.coding == "mxfp4":
            return _mxfp4(codes, scale, dtype)
        grid = scale if scale.numel() == 1 else scale.reshape(*codes.shape[:-2], *_grid(coded))
        return _fp8(codes, grid, coded.block, dtype)


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The float checkpoint that a release in FP8 or MXFP4 stands for; any other checkpoint as it is.

    No weight is read. Raises CheckpointError for codes without scales, and for scales whose shape does not fit.
    """
    section = checkpoint.config.get("quantization_config")
    if not isinstance(section, dict) or (find := _finder(section)) is None:
        return checkpoint
    coded = dict(find(checkpoint, section))
    if not coded:
        return checkpoint
    dtype = _TYPES.get(str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), "BF16")
    parts = {part: name for name, how in coded.items() for part in (how.codes.name, how.scale.name)}
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        of = parts.get(name)
        if of is not None and coded[of].codes.name == name:
            shape = _shape(coded[of])
            nbytes = math.prod(shape) * BITS[dtype] // 8
            tensors[of] = TensorInfo(of, dtype, shape, nbytes, info.file, info.begin)
        elif of is None and not _of_activations(name, coded):
            _refuse_codes(checkpoint, info)
            tensors[name] = info
    kind = "MXFP4" if section.get("quant_method") == "mxfp4" else "FP8"
    stored, whole = (sum(info.nbytes for info in infos.values()) for infos in (checkpoint.tensors, tensors))
    note = (
        f"{counted(len(coded), 'tensor')} in {kind}, decoded as they are read: what was lost there stays lost; the "
        f"files hold {stored / 1e9:.3g} GB, sizes before are {whole / 1e9:.3g} GB, decoded"
    )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Released(
        checkpoint.folder, config, tensors, checkpoint.shards, checkpoint.side_files, (*checkpoint.notes, note),
        base=checkpoint, coded=coded,
    )  # fmt: skip


# ---- how they lie ----------------------------------------------------------------------------------------------------


def _finder(section: Mapping[str, Any]) -> Any:
    """What finds the coded tensors of a folder whose config.json has this section; None for one that is not read so."""
    method = section.get("quant_method")
    if method == "fp8":
        return _find_fp8
    if method == "mxfp4":
        return _find_mxfp4
    if method == "compressed-tensors" and section.get("format") == "float-quantized":
        return _find_float_quantized
    return None


def _find_fp8(checkpoint: Checkpoint, section: Mapping[str, Any]) -> Iterator[tuple[str, Coded]]:
    """FP8 weights with the inverse of what they were divided by, for blocks or the tensor."""
    given = section.get("weight_block_size")
    if given is not None and not (
        isinstance(given, list) and len(given) == 2 and all(type(size) is int and size > 0 for size in given)
    ):
        raise CheckpointError(f"{checkpoint.folder}: config.json: weight_block_size is {given!r}", _REMEDY)
    for name, info in checkpoint.tensors.items():
        if info.dtype == _FP8 and (scale := checkpoint.tensors.get(f"{name}_scale_inv")) is not None:
            block = _matrix(checkpoint, info) if given is None or math.prod(scale.shape) == 1 else (given[0], given[1])
            yield name, _checked(checkpoint, Coded("fp8", info, scale, block))


def _find_float_quantized(checkpoint: Checkpoint, _section: Mapping[str, Any]) -> Iterator[tuple[str, Coded]]:
    """FP8 weights of compressed-tensors, with a scale for the tensor, for each row, or for blocks."""
    for name, info in checkpoint.tensors.items():
        if info.dtype == _FP8 and (scale := checkpoint.tensors.get(f"{name}_scale")) is not None:
            n, k = _matrix(checkpoint, info)
            rows, groups = (1, 1) if math.prod(scale.shape) == 1 else (*scale.shape[-2:], 1)[:2]
            fits = 0 < rows <= n and 0 < groups <= k and n % rows == 0 and k % groups == 0
            block = (n // rows, k // groups) if fits else (1, 1)
            yield name, _checked(checkpoint, Coded("fp8", info, scale, block))


def _find_mxfp4(checkpoint: Checkpoint, _section: Mapping[str, Any]) -> Iterator[tuple[str, Coded]]:
    """Stacks of experts in MXFP4, outputs first."""
    for name, info in checkpoint.tensors.items():
        stem = name.removesuffix("_blocks")
        scale = checkpoint.tensors.get(f"{stem}_scales")
        if stem == name or scale is None:
            continue
        shape = info.shape
        if (
            len(shape) != 4 or shape[-1] != _MXFP4_BLOCK or 0 in shape
            or scale.shape != shape[:-1] or (info.dtype, scale.dtype) != ("U8", "U8")
        ):  # fmt: skip
            raise _unfit(checkpoint, info, scale, "[experts, outputs, blocks, 16] bytes, and one for each block")
        yield stem, Coded("mxfp4", info, scale)


def _matrix(checkpoint: Checkpoint, info: TensorInfo) -> tuple[int, int]:
    """N and K of a tensor [.., N, K]. Raises CheckpointError for one that is no matrix."""
    if len(info.shape) < 2 or 0 in info.shape:
        raise CheckpointError(f"{checkpoint.folder}: {info.name}: FP8 codes {[*info.shape]} are no matrix", _REMEDY)
    return info.shape[-2], info.shape[-1]


def _checked(checkpoint: Checkpoint, coded: Coded) -> Coded:
    """`coded`, if there is a scale for each block. Raises CheckpointError otherwise."""
    _matrix(checkpoint, coded.codes)
    scale, wanted = coded.scale, math.prod(coded.codes.shape[:-2]) * math.prod(_grid(coded))
    whole = math.prod(scale.shape) == 1
    shaped = whole or (math.prod(scale.shape) == wanted and scale.shape[-2:] == _grid(coded))
    if not shaped or scale.dtype not in ("F32", "BF16", "F16"):
        grid = [*coded.codes.shape[:-2], *_grid(coded)]
        raise _unfit(checkpoint, coded.codes, scale, f"float scales {grid}, or one")
    return coded


def _grid(coded: Coded) -> tuple[int, int]:
    """Blocks of a matrix, down and across; those at the edges may be smaller."""
    (n, k), (rows, columns) = coded.codes.shape[-2:], coded.block
    return -(-n // rows), -(-k // columns)


def _shape(coded: Coded) -> tuple[int, ...]:
    """Of the decoded tensor: gpt-oss's code has inputs first, its files outputs."""
    if coded.coding == "mxfp4":
        experts, outputs, blocks, size = coded.codes.shape
        return experts, blocks * size * 2, outputs
    return coded.codes.shape


def _of_activations(name: str, coded: Mapping[str, Coded]) -> bool:
    """Whether a tensor is the scale of what a decoded layer was given."""
    stem, _, last = name.rpartition(".")
    return last in ("input_scale", "activation_scale", "weight_zero_point") and f"{stem}.weight" in coded


def _refuse_codes(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """Raise CheckpointError for FP8 codes whose scales are nowhere."""
    if info.dtype == _FP8:
        raise CheckpointError(f"{checkpoint.folder}: {info.name} is in FP8, and its scales are missing", _REMEDY)


def _unfit(checkpoint: Checkpoint, codes: TensorInfo, scale: TensorInfo, wanted: str) -> CheckpointError:
    """What is raised for scales that are not those of their codes."""
    given = f"{codes.dtype} {[*codes.shape]}, {scale.name} is {scale.dtype} {[*scale.shape]}"
    return CheckpointError(f"{checkpoint.folder}: {codes.name} is {given}: not {wanted}", _REMEDY)


# ---- what they stand for ---------------------------------------------------------------------------------------------


def _torch_type(info: TensorInfo) -> torch.dtype:
    from spicerack.numerics.dtypes import BY_SAFETENSORS

    return BY_SAFETENSORS[info.dtype]


def _spread(scale: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """One scale for each of `size` neighbours along an axis."""
    return scale.repeat_interleave(size, dim=axis) if size > 1 else scale


def _fp8(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """codes [.., N, K] times scale, one or [.., blocks down, blocks across], some rows at a time."""
    import torch

    *_, n, k = codes.shape
    rows = codes.reshape(-1, k)
    out = torch.empty(rows.shape, dtype=dtype, device="cpu")
    if scale.numel() > 1:
        across, one = scale.shape[-1], scale.reshape(-1, scale.shape[-2], scale.shape[-1])
        scale = _spread(one, block[0], 1)[:, :n].reshape(-1, across)
    step = max(_PIECE // k, 1)
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        factor = scale.float().reshape(1, 1) if scale.numel() == 1 else scale[some].float()
        factor = factor if factor.shape[1] == 1 else _spread(factor, block[1], 1)[:, :k]
        out[some] = rows[some].float() * factor
    return out.reshape(codes.shape)


def _mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks [E, R, G, 16], scales [E, R, G] -> [E, 32 G, R], an expert at a time; a byte has its low half first."""
    import torch

    experts, outputs, groups, size = blocks.shape
    levels = torch.tensor(_MXFP4, dtype=torch.float32, device="cpu")
    out = torch.empty((experts, groups * size * 2, outputs), dtype=dtype, device="cpu")
    step = max(_PIECE // (groups * size * 2), 1)
    for expert in range(experts):
        for start in range(0, outputs, step):
            some = slice(start, start + step)
            codes = torch.stack((blocks[expert, some] & 15, blocks[expert, some] >> 4), -1).flatten(-2)
            power = scales[expert, some].to(torch.int32)[..., None] - 127
            values = torch.ldexp(levels[codes.to(torch.int32)], power)
            out[expert, :, some] = values.flatten(1).t().to(dtype)
    return out
