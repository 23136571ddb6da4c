"""Names of tensors, both ways: a checkpoint's and those of a GGUF file.

What a file has in one tensor may be several in a checkpoint: experts, stacked along a first axis, and queries, keys and
values (or gate and up), of which some files have the rows behind each other. A `Place` says which part of a file's
tensor a checkpoint's tensor is. The other way round, a checkpoint that has gate and up of all experts in one tensor has
two in a file: then it has two places, each with its `Share` of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spicerack.errors import CheckpointError
from spicerack.models.gguf.family import Family, Rows

FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
"""Module of a file, the last part -> those whose rows it has behind each other, where a family has them apart."""
_SUFFIXES = ("weight", "bias", "scale")
"""What a module of a file may have: `scale` is NVFP4's, of the whole tensor."""


@dataclass(frozen=True, slots=True)
class Share:
    """Those rows of a checkpoint's tensor that lie in one of several tensors of a file.

    number       which of them it is
    count        how many there are
    alternating  rows are dealt to them one by one; else each has as many that lie behind each other
    """

    number: int
    count: int
    alternating: bool

    def of(self, rows: int) -> slice:
        """Which of so many rows these are."""
        if self.alternating:
            return slice(self.number, rows, self.count)
        return slice(rows * self.number // self.count, rows * (self.number + 1) // self.count)


@dataclass(frozen=True, slots=True)
class Place:
    """What a checkpoint's tensor is in a file.

    tensor  the file's
    member  which of those stacked in it; None: it is not stacked
    part    which of the modules that are fused in it, and how many these are; None: it is the only one
    rows    the order that its rows have there
    turned  the checkpoint stores the weight [.., K, N]
    share   which of the checkpoint's rows lie there; None: all
    """

    tensor: str
    member: int | None = None
    part: tuple[int, int] | None = None
    rows: Rows | None = None
    turned: bool = False
    share: Share | None = None

    @property
    def module(self) -> str:
        """The file's module, its last part: "attn_q"."""
        return self.tensor.split(".")[-2]

    def shape(self, stored: tuple[int, ...], *, packed: bool = False) -> tuple[int, ...]:
        """Of what lies there, rows first, by the shape of the checkpoint's tensor; packed ones have rows first."""
        shape = [*stored]
        if self.turned and not packed:
            shape[-2:] = shape[-1], shape[-2]
        if self.share is not None:
            rows = shape[self.axis]
            shape[self.axis] = len(range(rows)[self.share.of(rows)])
        return tuple(shape)

    @property
    def axis(self) -> int:
        """That of the rows in the file's tensor."""
        return -2 if self.tensor.endswith(".weight") else -1


class Names:
    """The names of one family, and of one file or checkpoint, with its numbers put in."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._to_file = {_blank(hf): (hf, gguf) for hf, gguf in family.modules.items()}
        self._to_checkpoint: dict[str, str] = {}
        for hf, gguf in family.modules.items():
            self._to_checkpoint.setdefault(gguf.replace("{i}", "{}"), hf)
        self._whole = {_blank(hf): files for hf, files in family.tensors.items()}
        self._shared = {
            _blank(file): (hf, None if len(files) == 1 else Share(number, len(files), family.alternating))
            for hf, files in family.tensors.items()
            for number, file in enumerate(files)
        }
        self._left_out = [re.compile(pattern) for pattern in family.left_out]

    def left_out(self, name: str) -> bool:
        """Whether a checkpoint's tensor has no place in a file and none is needed."""
        return any(pattern.fullmatch(name) for pattern in self._left_out)

    def places(self, name: str) -> tuple[Place, ...]:
        """Where the tensor `name` of a checkpoint goes, mostly to one place; none where the family has no name for it.

        name: what is packed may have a `.weight` behind it that it has not in a checkpoint.
        """
        for known in (*self._known(name), *self._known(name.removesuffix(".weight"))):
            blank, numbers = _numbered(known)
            if blank in self._whole:
                return tuple(self._own(template, numbers) for template in self._whole[blank])
        place = self._place(name)
        return () if place is None else (place,)

    def _known(self, name: str) -> tuple[str, str, str]:
        """A name as it is, and as classes without and with a head have it."""
        prefix = f"{self.family.prefix}."
        return name, name.removeprefix(prefix), prefix + name

    def _own(self, template: str, numbers: Sequence[str]) -> Place:
        """The place of one of `Family.tensors`, by what its name is in a file, and its numbers."""
        tensor = template.replace("{i}", "".join(numbers))
        return Place(tensor, turned=self._turned(tensor), share=self._shared[_blank(template)][1])

    def _turned(self, tensor: str) -> bool:
        """Whether a checkpoint stores the tensor of a file [.., K, N]."""
        module, _, suffix = tensor.rpartition(".")
        return suffix == "weight" and module.rpartition(".")[2] in self.family.transposed

    def _place(self, name: str) -> Place | None:
        """The place of a module's weight, bias or scale."""
        module, _, suffix = name.rpartition(".")
        if suffix not in _SUFFIXES:
            return None
        for known in self._known(module):
            entry = self._to_file.get(_numbered(known)[0])
            if entry is None:
                continue
            hf, gguf = entry
            numbers = dict(zip(re.findall(r"\{(\w)\}", hf), _numbered(known)[1], strict=True))
            last = gguf.rpartition(".")[2]
            member = int(numbers["e"]) if "e" in numbers else None
            tensor = f"{gguf.replace('{i}', numbers.get('i', ''))}.{suffix}"
            return Place(tensor, member, None, self.family.rows.get(last), self._turned(tensor))
        return None

    def modules(self, tensor: str, members: int) -> list[tuple[str, Place]]:
        """What the tensor of a file is in a checkpoint: names, in its order, and which part each is.

        members: how many are stacked in it, where some are. Raises CheckpointError for a name that the family lacks.
        """
        blank, numbers = _numbered(tensor)
        if blank in self._shared:
            whole, share = self._shared[blank]
            at = Place(tensor, turned=self._turned(tensor), share=share)
            return [(whole.replace("{i}", "".join(numbers)), at)]
        module, _, suffix = tensor.rpartition(".")
        last = module.rpartition(".")[2]
        parts: Sequence[str] = [module.removesuffix(last) + part for part in FUSED.get(last, (last,))]
        if _numbered(parts[0])[0] not in self._to_checkpoint:  # a family that has them in one matrix, too
            parts = (module,)
        result: list[tuple[str, Place]] = []
        for number, part in enumerate(parts):
            hf = self._to_checkpoint.get(_numbered(part)[0])
            if hf is None or suffix not in _SUFFIXES:
                raise CheckpointError(
                    f"tensor {tensor} is not one of {self.family.model_type}'s, as {self.family.architecture} has them",
                    "the file is of another model, or newer than this spicerack",
                )
            own = part.rpartition(".")[2]
            place = Place(tensor, rows=self.family.rows.get(own), turned=own in self.family.transposed)
            if len(parts) > 1:
                place = replace(place, part=(number, len(parts)))
            if suffix != "weight":
                place = replace(place, turned=False)
            if suffix == "scale":  # one number, whatever the rows are
                place = Place(tensor)
            named = hf.replace("{i}", numbers[0] if numbers else "")
            if "{e}" in hf:
                result += [
                    (f"{named.replace('{e}', str(e))}.{suffix}", replace(place, member=e)) for e in range(members)
                ]
            else:
                result.append((f"{named}.{suffix}", place))
        return result


def _blank(template: str) -> str:
    """A name with all its numbers left out."""
    return re.sub(r"\{\w\}", "{}", template)


def _numbered(name: str) -> tuple[str, list[str]]:
    """A name with all its numbers left out, and these."""
    parts = name.split(".")
    blank = ".".join("{}" if part.isdecimal() else part for part in parts)
    return blank, [part for part in parts if part.isdecimal()]
