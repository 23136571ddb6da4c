"""How quantized tensors lie on disk: the `Format` interface, and the choice between formats before a weight is read.

A format is one file in `formats/`. `Contents` says what a folder holds, the format says in which tensors, and both
directions go through `QTensor`, so no format knows how codes were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from spicerack import plugins
from spicerack.errors import CheckpointError, SchemeError
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme

if TYPE_CHECKING:
    from spicerack.storage.reader import Checkpoint

"""`model_type` of folders that only spicerack reads: no other loader can mistake one and fill in random weights."""

STANDARD = ("compressed_tensors", "bitnet")
"""Formats that others read, by preference."""

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors type, shape), in the order of writing."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor that is quantized on disk, or will be.

    module        the checkpoint's name without `.weight`
    shape         [N, K] or [E, N, K]: output rows first, whatever the checkpoint's order
    role          what the tensor is for: a role of `models.census` ("experts": one tensor of all), or of a module that
                  was saved the kind of layer (`nn.kinds`; K is all that an output reads). Told to those who read; what
                  loads the tensor goes by the layer that it is for
    source_dtype  the float type it had
    transposed    the float checkpoint stores [..., K, N]
    bias          the layer has one; told to those who write
    inverse_scale the folder stores 1 / scale; told by those who read
    """

    module: str
    scheme: Scheme
    shape: tuple[int, ...]
    role: str = "linear"
    source_dtype: torch.dtype = torch.float32
    transposed: bool = False
    bias: bool = False
    inverse_scale: bool = False


Contents = Mapping[str, StoredTensor]
"""Module -> StoredTensor."""


class Format(Protocol):
    """Two directions between QTensors and named tensors, and a config.json that says which tensor is what."""

    @property
    def name(self) -> str:
        """The file's name."""

    def obstacles(self, contents: Contents) -> list[str]:
        """Why this format cannot hold `contents` exactly; empty if it can."""

    def layout(self, stored: StoredTensor) -> Layout:
        """What `encode` will write, known before any weight is read."""

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """The tensors that `layout` promised."""

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """Inverse of `encode`."""

    def config(
        self, config: Mapping[str, Any], contents: Contents, unquantized_linears: Sequence[str], /
    ) -> dict[str, Any]:
        """The new config.json for a folder whose old one was `config`."""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` is of a folder in this format."""

    def float_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of `config`: what the model's config.json says without quantization."""

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """What is quantized in a folder, and how. Raises CheckpointError naming tensor and rule."""

    def notes(self, contents: Contents, fused: Sequence[Sequence[str]], /) -> list[str]:
        """What `contents` in this format costs in portability, in plain sentences."""


def get(name: str) -> Format:
    """The format in `formats/<name>.py`; KeyError if there is no such file."""
    found: Format = plugins.get("storage.formats", name, "FORMAT")
    return found


def choose(contents: Contents) -> Format:
    """The first of `STANDARD` that holds every tensor of `contents` exactly, else spicerack's own container.

    Raises SchemeError if none does.
    """
    for standard in map(get, STANDARD):
        if not standard.obstacles(contents):
            return standard
    own = get("spicerack")
    obstacles = own.obstacles(contents)
    if obstacles:
        raise SchemeError(obstacles[0], "schemes are read back by name: give it a file in schemes/")
    return own


def portability(contents: Contents, fused: Sequence[Sequence[str]]) -> list[str]:
    """What the choice for `contents` costs in portability. fused: modules that engines merge into one matrix."""
    chosen = choose(contents)
    notes = chosen.notes(contents, fused)
    if chosen.name in STANDARD:
        return notes
    fewest = min((get(name).obstacles(contents) for name in STANDARD), key=len)
    return [*notes, f"the reason: {fewest[0]}"]


def checked_input_scale(module: str, stored: torch.Tensor) -> torch.Tensor:
    """float32 [1]: a static scale of activations as it was read. Raises CheckpointError."""
    scale = stored.float().reshape(1)
    if not 0 < float(scale) < math.inf:
        raise CheckpointError(f"{module}: a scale of activations of {float(scale)}", "the folder is damaged")
    return scale


def of_folder(checkpoint: Checkpoint) -> Format | None:
    """The format of a folder; None if it is an ordinary float model.

    Raises CheckpointError for folders that another tool quantized in a way that is not read.
    """
    for name in plugins.names("storage.formats"):
        candidate = get(name)
        if candidate.recognizes(checkpoint.config):
            return candidate
    other = checkpoint.config.get("quantization_config")
    if isinstance(other, dict):
        raise CheckpointError(
            f"{checkpoint.folder}: quantized with {other.get('quant_method')!r}, which is not read",
            "load it with transformers",
        )
    return None
