"""spicerack's own container: holds every scheme, for every kind of layer.

The folder is an ordinary safetensors folder, but its config.json says `"model_type": "spicerack"` and nests the model's
own config, so that no other loader takes it for a model it knows and fills in random weights:

    {"model_type": "spicerack",
     "quantized": {"version": 1,
                   "tensors": [{"scheme": "w8", "shape": [256, 64], "role": "embedding", "dtype": "float32",
                                "transposed": false, "modules": ["model.embed_tokens"]}, ...]},
     "config": {"model_type": "llama", ...}}

`config` is absent if the folder holds a plain torch module. Module P has the tensors P.codes, P.scale ... of `packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spicerack.errors import CheckpointError, SchemeError, ShapeError
from spicerack.numerics import packed
from spicerack.numerics.dtypes import SOURCE_BY_WORD
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme, parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage import layouts
from spicerack.storage.files import CONTAINER
from spicerack.storage.format import Contents, Host, Layout, Reading, StoredTensor, checked_input_scale
from spicerack.storage.reader import Checkpoint

VERSION = 1
"""Of the container; a folder of another version is refused."""
_REMEDY = "the folder is damaged, or was written by a newer spicerack"


@dataclass(frozen=True, slots=True)
class SpicerackFormat:
    """Whatever scheme is found again by its name, in any kind of layer. Methods: `storage.format.Format`."""

    name: str = "spicerack"
    rank: int = 1000  # behind all others: it holds whatever they do not
    read_by_others: bool = False
    on_request: bool = False

    def prepared(self, contents: Contents) -> Contents:
        """As they are."""
        return contents

    def obstacles(self, contents: Contents) -> list[str]:
        """Schemes that are no file in `schemes/` and no name of the grammar: nobody could read them again."""
        return [
            f"{p.module}: scheme {p.scheme.name!r} cannot be found again by its name"
            for p in contents.values()
            if not _is_named(p.scheme)
        ]

    def layout(self, stored: StoredTensor) -> Layout:
        """What `layouts.container` says, under the module's name."""
        return stored.laid_out(layouts.container)

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """`packed.pack`, in the order of the layout."""
        tensors = {f"{stored.module}.{key}": tensor for key, tensor in packed.pack(q).items()}
        return {name: tensors[name] for name in self.layout(stored)}

    def relaid(self, _stored: StoredTensor, _u: Undecoded, /) -> dict[str, torch.Tensor] | None:
        """None: there are schemes enough that others do not have."""
        return None

    def stacks(self, _contents: Contents, /) -> Mapping[str, Sequence[str]]:
        """None."""
        return {}

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """`packed.unpack`, with codes that mean nothing refused: a stream of bits holds more than three levels, say."""
        parts = packed.part(tensors, stored.module)
        q = packed.unpack(stored.scheme, stored.shape, parts, stored.transposed)
        levels = stored.scheme.levels
        if levels.hi - levels.lo + 1 < 1 << levels.bits and q.codes.max() > levels.hi:
            raise CheckpointError(f"{stored.module}: a code that is none of {stored.scheme}'s levels", _REMEDY)
        if q.input_scale is not None:
            checked_input_scale(stored.module, q.input_scale)
        return q

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded | None:
        """Of matrices whose codes are one weight's each."""
        if stored.scheme.codes_obstacle is not None or len(stored.shape) != 2:
            return None
        q = packed.undecoded(stored.scheme, stored.shape, packed.part(tensors, stored.module), stored.transposed)
        if q.input_scale is not None:
            checked_input_scale(stored.module, q.input_scale)
        return q

    def reading(self, _config: Mapping[str, Any], _contents: Contents, _host: Host, /) -> Reading:
        """Nothing: nobody else reads it."""
        return Reading()

    def config(self, config: Mapping[str, Any], contents: Contents, _reading: Reading, /) -> dict[str, Any]:
        """Modules that are alike but for their names share an entry of the table."""
        groups: dict[tuple[object, ...], dict[str, Any]] = {}
        for p in contents.values():
            facts = {
                "scheme": p.scheme.name,
                "shape": list(p.shape),
                "role": p.role,
                "dtype": str(p.source_dtype).removeprefix("torch."),
                "transposed": p.transposed,
            }
            key = (p.scheme.name, p.shape, p.role, p.source_dtype, p.transposed)
            group = groups.setdefault(key, {**facts, "modules": []})
            group["modules"].append(p.module)
        written = {"model_type": CONTAINER, "quantized": {"version": VERSION, "tensors": list(groups.values())}}
        return {**written, "config": dict(config)} if config else written

    def beside(self, _config: Mapping[str, Any], /) -> Mapping[str, Mapping[str, Any]]:
        """See `Format.beside`: none."""
        return {}

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """By `model_type`."""
        return config.get("model_type") == CONTAINER

    def float_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The nested config; nothing for a plain torch module."""
        nested = config.get("config", {})
        if not isinstance(nested, dict):
            raise CheckpointError("config.json: 'config' is not an object", _REMEDY)
        return nested

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """What the table says, once the tensors have the types and shapes that it promises."""
        where = str(checkpoint.folder / "config.json")
        table = checkpoint.config.get("quantized")
        if not isinstance(table, dict) or not isinstance(table.get("tensors"), list):
            raise CheckpointError(f"{where}: 'quantized' has no list 'tensors'", _REMEDY)
        if table.get("version") != VERSION:
            raise CheckpointError(f"{where}: version {table.get('version')!r} of the container", "update spicerack")
        contents: dict[str, StoredTensor] = {}
        for group in table["tensors"]:
            for stored in _read_group(group, where):
                self._check(stored, checkpoint)
                contents[stored.module] = stored
        return contents

    def _check(self, stored: StoredTensor, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless the folder has the tensors that the entry needs."""
        for name, (dtype, shape) in self.layout(stored).items():
            info = checkpoint.tensors.get(name)
            if info is None or (info.dtype, info.shape) != (dtype, shape):
                present = f"is {info.dtype} {list(info.shape)}" if info else "is missing"
                wanted = f"{stored.scheme} needs {dtype} {list(shape)}"
                raise CheckpointError(f"{checkpoint.folder}: {name} {present}; {wanted}", _REMEDY)

    def notes(self, contents: Contents, _fused: Sequence[Sequence[str]], _reading: Reading, /) -> list[str]:
        """That nobody else reads it, and which schemes made it so."""
        names = sorted({p.scheme.name for p in contents.values()})
        return [f"only spicerack reads this folder ({', '.join(names)})"]


def _read_group(group: Any, where: str) -> list[StoredTensor]:
    """One entry of the table of config.json -> a StoredTensor for each of its modules.

    group: what JSON holds there, of whatever type. where: what errors begin with. Raises CheckpointError for a scheme
    that is not known, shapes that groups do not tile, and values of other types; every value of a stranger's file is
    checked.
    """
    try:
        if not isinstance(name := group["scheme"], str):
            raise CheckpointError(f"{where}: an entry of 'quantized' has a scheme that is no name: {name!r}", _REMEDY)
        scheme = parse(name)
        shape = tuple(group["shape"])
        role, transposed, modules = group["role"], group["transposed"], group["modules"]
        dtype = SOURCE_BY_WORD[group["dtype"]]
        sound = (
            all(type(size) is int and 0 < size < 1 << 40 for size in shape)
            and isinstance(role, str)
            and isinstance(transposed, bool)
            and isinstance(modules, list)
            and all(isinstance(module, str) for module in modules)
        )
        scheme.check_shape(where, shape)
    except (KeyError, TypeError, SchemeError, ShapeError) as error:
        raise CheckpointError(f"{where}: an entry of 'quantized' is not understood: {error}", _REMEDY) from error
    if not sound:
        raise CheckpointError(f"{where}: an entry of 'quantized' has a wrong shape, role or list of modules", _REMEDY)
    return [StoredTensor(module, scheme, shape, role, dtype, transposed) for module in modules]


def _is_named(scheme: Scheme) -> bool:
    """Whether the scheme's name leads back to it: what is stored is the name, and nothing else of a scheme."""
    try:
        return parse(scheme.name) == scheme
    except SchemeError:
        return False


FORMAT = SpicerackFormat()
