"""How quantized tensors lie on disk: the `Format` interface, and the choice between formats before a weight is read.

A format is one file in `formats/`, which says all about itself: nothing else names it. `Contents` says what a folder
holds, the format says in which tensors, and both directions go through `QTensor`, so no format knows how codes were
chosen. What a folder holds is the same data on the way out, where a recipe made it, and on the way in, where the format
read it off the folder (`Format.contents`).

Which format a folder gets is not asked for but follows from its contents: of the formats, in the order of their ranks,
the first that holds every tensor exactly. Those that others read come first, and spicerack's own container, which holds
every scheme, comes last; what that costs in portability is said before work starts. Formats of one engine each (files
of GGUF, say) are read like all others, and written by those who ask for them by name (`Format.on_request`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from spicerack import plugins
from spicerack.errors import CheckpointError, SchemeError
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.layouts import Matrix, Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spicerack.storage.reader import Checkpoint

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors type, shape), in the order of writing."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor that is quantized on disk, or will be.

    module        the checkpoint's name without `.weight`
    scheme        what its numbers are
    shape         [N, K] or [E, N, K]: output rows first, whatever the checkpoint's order
    role          what the tensor is for: a role of `models.census` ("experts": one tensor of all), or of a module that
                  was saved the kind of layer (`nn.kinds`; K is all that an output reads). Told to those who read; what
                  loads the tensor goes by the layer that it is for
    source_dtype  the float type it had, which decides that of scales
    transposed    the float checkpoint stores [..., K, N]
    bias          the layer has one; told to those who write
    inverse_scale the folder stores 1 / scale; told by those who read
    variant       which of its format's layouts the tensor has, in the format's own word; "" where there is one
    """

    module: str
    scheme: Scheme
    shape: tuple[int, ...]
    role: str = "linear"
    source_dtype: torch.dtype = torch.float32
    transposed: bool = False
    bias: bool = False
    inverse_scale: bool = False
    variant: str = ""

    @property
    def matrix(self) -> Matrix:
        """What its layout depends on."""
        expert = "experts" in self.module.split(".")
        source = safetensors_dtype(self.source_dtype)
        return Matrix(self.scheme, self.shape, source, self.role, self.transposed, self.bias, expert)

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Of the float tensor in the checkpoint, whose last two axes are the other way round where it is transposed."""
        *leading, n, k = self.shape
        return (*leading, k, n) if self.transposed else self.shape

    def laid_out(self, layout: Callable[[Scheme, tuple[int, ...], str], Parts]) -> Layout:
        """Its tensors by their full names, as one of the functions of `layouts` lays them out."""
        parts = layout(self.scheme, self.shape, safetensors_dtype(self.source_dtype))
        return {f"{self.module}.{part}": placed for part, placed in parts.items()}


Contents = Mapping[str, StoredTensor]
"""What is quantized in a folder: module -> StoredTensor."""


@dataclass(frozen=True, slots=True)
class Host:
    """The float model that is quantized, and how transformers would build it: others find its modules by their names.

    linears   modules of the checkpoint that are linear layers and stay float
    tensors   those of the checkpoint, before anything is quantized
    model     transformers' own, on the meta device; None where it knows none
    paths     module of the checkpoint -> path of the layer in `model` whose weight it becomes as it is; others (stacked
              experts, embeddings under another name) have none
    """

    linears: Sequence[str] = ()
    tensors: Layout = field(default_factory=dict)
    model: PreTrainedModel | None = None
    paths: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """How others read a folder.

    floats     linear layers that stay float, by every name that a reader may know them by, sorted
    paths      module of the checkpoint -> its path in transformers' model, where that is another
    decodes    transformers is told to decode the weights as it loads them, rather than at the first forward
    obstacle   why transformers cannot load the folder, as the end of a sentence; None if nothing speaks against it
    """

    floats: Sequence[str] = ()
    paths: Mapping[str, str] = field(default_factory=dict)
    decodes: bool = False
    obstacle: str | None = None


class Format(Protocol):
    """Two directions between QTensors and named tensors, and a config.json that says which tensor is what.

    Methods are pure: they change nothing that they are given, and read no file but through a Checkpoint. `layout`
    promises before a weight is read what `encode` then makes, so that files can be planned and headers written first.
    `decode` of what `encode` made is the same QTensor, codes and scales bit for bit.
    """

    @property
    def name(self) -> str:
        """The file's name in `formats/`, by which `get` finds it and ledgers record it."""

    @property
    def rank(self) -> int:
        """Where the format comes among those that hold a folder exactly: the lowest is taken. Ranks differ."""

    @property
    def read_by_others(self) -> bool:
        """Whether other programs read its folders: if not, a person is told why none of theirs was taken."""

    @property
    def on_request(self) -> bool:
        """Whether it is written only where it is asked for by name: then it is read, and `choose` passes it over."""

    def prepared(self, contents: Contents, /) -> Contents:
        """The contents as they are laid out where the format is asked for: what it decides over all tensors at once.

        Every tensor holds exactly what it held: other schemes are those that say the same in more bits.
        """

    def obstacles(self, contents: Contents, /) -> list[str]:
        """Why this format cannot hold `contents` exactly, a sentence each beginning with the module; empty if it
        can."""

    def layout(self, stored: StoredTensor, /) -> Layout:
        """What `encode` will write for a tensor: names, types and shapes in the order of writing, known before any
        weight is read."""

    def stacks(self, contents: Contents, /) -> Mapping[str, Sequence[str]]:
        """Modules whose tensors are written as one each: the stack's name -> they, in order, all of one layout.

        Those who read give them back one by one (`storage.stacks`).
        """

    def encode(self, stored: StoredTensor, q: QTensor, /) -> dict[str, torch.Tensor]:
        """The tensors that `layout` promised, in that order."""

    def relaid(self, stored: StoredTensor, u: Undecoded, /) -> dict[str, torch.Tensor] | None:
        """What `encode` makes of the same tensor, from codes as they lie in another folder: words that both formats
        have are moved and not taken apart. None where they have to be decoded."""

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor], /) -> QTensor:
        """Inverse of `encode`, from a stranger's folder too.

        tensors: those of the folder by name, of the types and shapes that `contents` checked. Raises CheckpointError
        for numbers that make no sense: codes that are no level, scales that are not finite.
        """

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor], /) -> Undecoded | None:
        """What `decode` makes, with its codes as they lie in the folder; None for what has no such form.

        Raises CheckpointError as `decode` does, but for codes, which are not looked at: where one is no level, `decode`
        says so.
        """

    def reading(self, config: Mapping[str, Any], contents: Contents, host: Host, /) -> Reading:
        """What will be told to those who read the folder, and whether transformers can.

        config: the float model's. contents: what is quantized. host: the model that it is quantized in.
        """

    def config(self, config: Mapping[str, Any], contents: Contents, reading: Reading, /) -> dict[str, Any]:
        """The new config.json for a folder whose old one was `config`; nothing in `config` is changed.

        contents: what is quantized. reading: as `reading` has it for them.
        """

    def beside(self, config: Mapping[str, Any], /) -> Mapping[str, Mapping[str, Any]]:
        """Files that some readers look for beside the config.json that `config` made: name -> what JSON has there."""

    def recognizes(self, config: Mapping[str, Any], /) -> bool:
        """Whether `config` is of a folder in this format."""

    def float_config(self, config: Mapping[str, Any], /) -> dict[str, Any]:
        """Inverse of `config`: what the model's config.json says without quantization."""

    def contents(self, checkpoint: Checkpoint, /) -> dict[str, StoredTensor]:
        """What is quantized in a folder, and how: module -> StoredTensor, from headers and config.json.

        Raises CheckpointError, naming tensor and rule, for a variant that is not read, and where both do not agree.
        """

    def notes(self, contents: Contents, fused: Sequence[Sequence[str]], reading: Reading, /) -> list[str]:
        """What `contents` in this format cost in portability, in plain sentences.

        fused: modules that engines merge into one matrix, which then need one scheme. reading: as `reading` has it.
        """


class MethodFormat:
    """What formats have in common that transformers tells apart by the `quant_method` in config.json.

    The model's own config stays as it was, with a section `quantization_config` beside it.
    """

    __slots__ = ()
    method: ClassVar[str]

    def recognizes(self, config: Mapping[str, Any], /) -> bool:
        """See `Format.recognizes`."""
        section = config.get("quantization_config")
        return isinstance(section, dict) and section.get("quant_method") == self.method

    def prepared(self, contents: Contents, /) -> Contents:
        """See `Format.prepared`: every tensor is laid out on its own."""
        return contents

    def relaid(self, _stored: StoredTensor, _u: Undecoded, /) -> dict[str, torch.Tensor] | None:
        """See `Format.relaid`: there is no such way."""
        return None

    def stacks(self, _contents: Contents, /) -> Mapping[str, Sequence[str]]:
        """See `Format.stacks`: none."""
        return {}

    def reading(self, _config: Mapping[str, Any], _contents: Contents, host: Host, /) -> Reading:
        """See `Format.reading`: names alone."""
        return names_of(host)

    def beside(self, _config: Mapping[str, Any], /) -> Mapping[str, Mapping[str, Any]]:
        """See `Format.beside`: none."""
        return {}

    def float_config(self, config: Mapping[str, Any], /) -> dict[str, Any]:
        """See `Format.float_config`."""
        return {key: value for key, value in config.items() if key != "quantization_config"}


def get(name: str) -> Format:
    """The format in `formats/<name>.py`; KeyError if there is no such file."""
    declared: Format = plugins.get("storage.formats", name, "FORMAT")
    return declared


def ranked() -> list[Format]:
    """All formats, those first that are taken first: those that others read, then our own container, which holds
    everything."""
    return sorted(map(get, plugins.names("storage.formats")), key=lambda fmt: fmt.rank)


def choose(contents: Contents) -> Format:
    """The first of the `ranked` formats that holds every tensor of `contents` exactly. Raises SchemeError if none does.

    The error is the last one's, which holds every scheme that can be found again by its name.
    """
    obstacles: list[str] = []
    for fmt in (fmt for fmt in ranked() if not fmt.on_request):
        obstacles = fmt.obstacles(contents)
        if not obstacles:
            return fmt
    raise SchemeError(obstacles[0], "schemes are read back by name: give it a file in schemes/")


def names_of(host: Host) -> Reading:
    """Names that readers know the modules of a model by: the checkpoint's own, which is what vLLM asks for, and those
    of transformers' modules.

    Under transformers' names is every layer whose class is torch's Linear or one derived from it, but those that are
    packed: also what the checkpoint holds in another shape (q, k and v as one matrix), or under no name at all.
    """
    if host.model is None:
        return Reading(sorted(set(host.linears)))
    from torch import nn

    packed = {id(host.model.get_submodule(path)) for path in host.paths.values()}
    floats = {
        path
        for path, layer in host.model.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear) and id(layer) not in packed
    }
    taken = {*host.paths, *host.paths.values()}  # a name that two modules have is the one's that is packed
    renamed = {module: path for module, path in host.paths.items() if module != path}
    return Reading(sorted((floats | set(host.linears)) - taken), renamed)


def portability(contents: Contents, fused: Sequence[Sequence[str]], reading: Reading) -> list[str]:
    """What the choice for `contents` costs in portability, in plain sentences; the last one is the reason for it.

    fused: modules that engines merge into one matrix. reading: of the format that is chosen.
    """
    chosen = choose(contents)
    notes = chosen.notes(contents, fused, reading)
    if chosen.read_by_others:
        return notes
    obstacles = [fmt.obstacles(contents) for fmt in ranked() if fmt.read_by_others and not fmt.on_request]
    return [*notes, f"the reason: {min(obstacles, key=len)[0]}"]


def checked_input_scale(module: str, stored: torch.Tensor) -> torch.Tensor:
    """A static scale of activations as it was read, of any float type and shape of one number -> float32 [1].

    Raises CheckpointError, naming `module`, for one that is not positive and finite.
    """
    scale = stored.float().reshape(1)
    if not 0 < float(scale) < math.inf:
        raise CheckpointError(f"{module}: a scale of activations of {float(scale)}", "the folder is damaged")
    return scale


def of_folder(checkpoint: Checkpoint) -> Format | None:
    """The format of a folder, by its config.json; None if it is an ordinary float model.

    Raises CheckpointError for folders that another tool quantized in a way that is not read, naming that tool's method.
    """
    for fmt in ranked():
        if fmt.recognizes(checkpoint.config):
            return fmt
    other = checkpoint.config.get("quantization_config")
    if isinstance(other, dict):
        raise CheckpointError(
            f"{checkpoint.folder}: quantized with {other.get('quant_method')!r}, which is not read",
            "load it with transformers",
        )
    return None
