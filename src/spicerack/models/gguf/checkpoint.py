"""`GgufCheckpoint`: a GGUF file as a checkpoint of transformers: its names, its order of rows, its config.json.

Nothing is converted when a file is opened. A tensor is read when it is asked for: floats as floats, quantized ones as
the bytes that the file has, U8 [.., N, row_bytes], which `storage.formats.gguf` knows to decode. Where rows have
another order here (llama's queries and keys), rows of bytes are moved: quantized numbers are never touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spicerack.errors import CheckpointError
from spicerack.models.gguf import config as configs
from spicerack.models.gguf import rope
from spicerack.models.gguf.family import Family, of_architecture
from spicerack.models.gguf.headers import part_of, row_order, tensors_of, turned
from spicerack.models.gguf.names import Place
from spicerack.storage.gguf.ggml import FLOATS
from spicerack.storage.gguf.metadata import Metadata, Value
from spicerack.storage.gguf.reader import GgufFile
from spicerack.storage.reader import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch

METHOD = "gguf"
"""What config.json says under `quant_method`."""
_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""Of each file in a fingerprint: how many samples, and how long."""
_NEWER = "the file is damaged, or newer than this spicerack"


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file under transformers' names. `folder` is the file itself, in which no side files lie.

    file    as it is
    family  whose names these are
    places  tensor -> what it is in the file, mostly one tensor; those that have none are zeros, which transformers'
            class wants and nobody uses
    """

    file: GgufFile
    family: Family
    places: Mapping[str, tuple[Place, ...]]

    @classmethod
    def open(cls, model: str | Path) -> GgufCheckpoint:
        """The model in a .gguf file, or of all files of a split one, by the first; no weight is read.

        Raises CheckpointError as `GgufFile.open` does, and for architectures, tensors and types that are not known.
        """
        return cls.of(GgufFile.open(model))

    @classmethod
    def of(cls, file: GgufFile) -> GgufCheckpoint:
        """The same of a file that is open."""
        family = _family(file.metadata)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        numbers = {name: _numbers(file, name) for name in rope.TENSORS if name in file.tensors}
        config = configs.to_config(family, file.metadata, shapes, _floats(file), numbers)
        places, tensors = tensors_of(file, family, config)
        types = {
            name.removesuffix(".weight"): file.tensors[place.tensor].type.name
            for name, (place, *_) in places.items()
            if file.tensors[place.tensor].type.name not in FLOATS
        }
        if types:
            config["quantization_config"] = {"quant_method": METHOD, "types": types}
            if turned := [name.removesuffix(".weight") for name, (place, *_) in places.items() if place.turned]:
                config["quantization_config"]["transposed"] = [module for module in turned if module in types]
        missing = _pooler(family, config, tensors)
        notes = tuple(f"{name} is not in the file: zeros, which no embedding of a text depends on" for name in missing)
        return cls(file.path, config, tensors | missing, file.files, (), notes, file=file, family=family, places=places)

    @property
    def metadata(self) -> Metadata:
        """Of the file: its tokenizer is in it, too."""
        return self.file.metadata

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """See `Checkpoint.weight_files`."""
        return tuple(self.file.path.parent / name for name in self.shards)

    def packed(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """See `Checkpoint.packed`."""
        info = self.tensors[name]
        if name not in self.places or info.dtype != "U8":
            return None
        place, *_ = self.places[name]
        type_ = self.file.tensors[place.tensor].type
        shape = (*info.shape[:-1], info.shape[-1] // type_.nbytes * type_.block)
        return type_.name, turned(shape) if place.turned else shape

    def held(self) -> GgufCheckpoint:
        """See `Checkpoint.held`."""
        return dataclasses.replace(self, file=self.file.held())

    def release(self, name: str) -> None:
        """See `Checkpoint.release`. Of what is stacked or fused with others the pages stay: those may be in use."""
        for place in self.places.get(name, ()):
            if place.member is None and place.part is None:
                self.file.release(place.tensor)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU: floats in their type, quantized ones as bytes [.., N, row_bytes]."""
        import torch

        from spicerack.numerics.dtypes import BY_SAFETENSORS

        info = self.tensors[name]
        if name not in self.places:
            return torch.zeros(info.shape, dtype=BY_SAFETENSORS[info.dtype], device="cpu")
        places = self.places[name]
        return self._joined(places, [self._own(place, self.file.read(place.tensor)) for place in places]).reshape(
            info.shape
        )

    def _own(self, place: Place, raw: torch.Tensor) -> torch.Tensor:
        """What lies at a place, [.., rows, columns] or [.., rows] as files have it; raw: bytes of the file's tensor."""
        import torch

        from spicerack.storage.gguf.blocks import decode_floats

        stored = self.file.tensors[place.tensor]
        values = decode_floats(stored.type, raw) if stored.type.name in FLOATS else raw
        if place.member is not None:
            values = values[place.member]
        if place.part is not None:
            start, stop = part_of(place, values.shape[-2 if values.ndim > 1 else -1], self.config)
            values = values[..., start:stop, :] if values.ndim > 1 else values[start:stop]
        if place.rows is not None:
            order = torch.argsort(row_order(place, len(values), self.config))
            values = values.index_select(0, order)
        return values - 1 if adds_one(self.family, place) else values

    def _joined(self, places: Sequence[Place], parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor of a checkpoint that these parts of it are, in the order of its axes."""
        import torch

        (place, *_), (whole, *_) = places, parts
        if place.share is not None:
            axis = whole.ndim + place.axis
            if place.share.alternating:
                whole = torch.stack(list(parts), axis + 1).flatten(axis, axis + 1)
            else:
                whole = torch.cat(list(parts), axis)
        packed = self.file.tensors[place.tensor].type.name not in FLOATS
        return whole.transpose(-1, -2).contiguous() if place.turned and not packed else whole

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Checkpoint.read_rows`; of tensors whose rows lie in another order all are read."""
        info, places = self.tensors[name], self.places.get(name, ())
        if not places or not all(self._in_order(place, len(info.shape)) for place in places):
            return self.read(name)[start:stop]
        parts = [self._own(place, self.file.read_rows(place.tensor, start, stop)) for place in places]
        return self._joined(places, parts).reshape(-1, *info.shape[1:])

    def _in_order(self, place: Place, axes: int) -> bool:
        """Whether rows of a tensor's first axis, experts of a stack, are rows of the file's."""
        if axes < 3 and (place.turned or place.share is not None):
            return False
        return place.member is None and place.part is None and place.rows is None and not adds_one(self.family, place)

    def same(self, a: str, b: str) -> bool:
        """See `Checkpoint.same`."""
        first, second = self.tensors[a], self.tensors[b]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return bool((self.read(a) == self.read(b)).all())

    def fingerprint(self) -> str:
        """sha256 hex over each file's name and size, and 16 samples of 4 KiB spread over all of it."""
        digest = hashlib.sha256()
        for path in self.weight_files:
            size = path.stat().st_size
            digest.update(f"\n{path.name}\n{size}\n".encode())
            with path.open("rb") as file:
                for i in range(_SAMPLES):
                    file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def adds_one(family: Family, place: Place) -> bool:
    """Whether a tensor is stored with 1 added: norms, of families that multiply by 1 + w."""
    return family.plus_one and place.module.endswith("norm")


def _family(metadata: Metadata) -> Family:
    """The family of a file. Raises CheckpointError."""
    architecture = metadata.text("general.architecture")
    if metadata.text("general.type", "model") != "model":
        raise CheckpointError(
            f"{metadata.where} holds {metadata.text('general.type')!r}, not a model", "give the file of the model"
        )
    keys = {
        key.removeprefix(f"{architecture}.")
        for key, entry in metadata.items()
        if not (isinstance(entry, Value) and entry.value == 0)  # no experts, no window
    }
    told = metadata.text(configs.MODEL_TYPE, "") or None
    try:
        return of_architecture(architecture, keys, told)
    except CheckpointError as error:
        raise CheckpointError(f"{metadata.where}: {error.message}", error.hint) from error


def _floats(file: GgufFile) -> str:
    """The float type of the model, as config.json calls it: the narrowest that one of its matrices has."""
    types = {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return _WORDS[next((name for name in ("BF16", "F16") if name in types), "F32")]


def _numbers(file: GgufFile, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The numbers of a small tensor that belongs to the config. Raises CheckpointError if it is none."""
    import numpy as np

    tensor = file.tensors[name]
    if tensor.type.name != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{file.path}: {name} is {tensor.type} {list(tensor.shape)}, not a row of F32", _NEWER)
    numbers = np.frombuffer(file.read(name).numpy().tobytes(), dtype="<f4")
    if not np.isfinite(numbers).all() or (numbers <= 0).any():
        raise CheckpointError(f"{file.path}: {name} has numbers that are not positive", _NEWER)
    return numbers


def _pooler(family: Family, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors of the pooler that transformers' class has, where the file has none: nothing is stored for them."""
    if family.pooler is None or f"{family.pooler}.weight" in tensors:
        return {}
    width = int(config["hidden_size"])
    shapes = {f"{family.pooler}.weight": (width, width), f"{family.pooler}.bias": (width,)}
    return {name: TensorInfo(name, "F32", shape, 0, "") for name, shape in shapes.items()}
