"""A checkpoint whose residual stream is rotated: the same function, other weights, read like any other.

    embedding E -> E R,  readers W -> W diag(gain) R,  writers W -> R^T W, b -> R^T b,  gains -> 1,  head like a reader

R is the rotation of a transform. A head that is tied to the embedding gets a tensor of its own, because the last gain
is in it. Nothing is written: tensors are rotated one by one when they are read.

What is given up. Weights are rounded to their stored type once more behind the rotation; a head that was tied is stored
twice; and only families whose stream is known (`models/families/residual.py`) can be turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from spicerack.algorithms import transform
from spicerack.algorithms.transform import Rotation
from spicerack.errors import RecipeError
from spicerack.models.families.folds import FOLDS
from spicerack.models.families.residual import RESIDUAL, Residual
from spicerack.storage.reader import Checkpoint


@dataclass(frozen=True, slots=True)
class Part:
    """What a module has to do with the residual stream.

    kind   whether it reads the stream, writes to it, or scales it by its gains
    norm   of a reader, the norm whose gains move into it; empty where there is none in front of it
    """

    kind: Literal["reader", "writer", "norm"]
    norm: str = ""


@dataclass(frozen=True, kw_only=True)
class Rotated(Checkpoint):
    """A checkpoint whose tensors are those of `base`, rotated.

    base        the folder as it is
    rotation    R, of the transform that did it
    parts       module -> what it has to do with the stream; others stay as they are
    embedding   the tensor that an untied head is made of, which `base` does not have
    """

    base: Checkpoint
    rotation: Rotation
    parts: Mapping[str, Part]
    embedding: str

    def read(self, name: str) -> torch.Tensor:
        """The tensor, rotated in float32, in its stored type."""
        module, _, parameter = name.rpartition(".")
        part = self.parts.get(module)
        w = self.base.read(name if name in self.base.tensors else self.embedding)
        if part is None:
            return w
        if part.kind == "norm":
            return torch.ones_like(w)
        if part.kind == "writer":
            turned = self.turn(w.float() if parameter == "bias" else w.float().t())
            return (turned if parameter == "bias" else turned.t()).to(w.dtype).contiguous()
        if parameter == "bias":
            return w
        gain = self.base.read(f"{part.norm}.weight").float() if part.norm else 1.0
        return self.turn(w.float() * gain).to(w.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the tensor; all of it is read and rotated for them."""
        return self.read(name)[start:stop]

    def told(self, name: str) -> tuple[str, ...]:
        """That of the checkpoint that is rotated."""
        return self.base.told(name)

    def fingerprint(self) -> str:
        """That of the checkpoint that is rotated; the recipe says that it is."""
        return self.base.fingerprint()

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x R, float32, for hidden states of the original (or rows of a weight), [..., H]."""
        return self.rotation.rotate(x)


def original(source: Checkpoint) -> Checkpoint:
    """The checkpoint that was rotated, or `source` itself."""
    return source.base if isinstance(source, Rotated) else source


def rotate(base: Checkpoint, name: str) -> Rotated:
    """`base` with its residual stream rotated by the transform `name`.

    base: a language model's folder. name: of a transform that is a Rotation. Raises RecipeError for families whose
    stream is not known, naming those whose is; no weight is read.
    """
    rotation = transform.get(name)
    assert isinstance(rotation, Rotation), f"{name} rotates nothing"
    family = base.config.get("model_type")
    stream = RESIDUAL.get(family) if isinstance(family, str) else None
    classes = base.config.get("architectures") or [""]
    is_decoder = str(classes[0]).endswith("ForCausalLM")
    if stream is None or not is_decoder or f"{stream.embedding}.weight" not in base.tensors:
        raise RecipeError(
            f"{name}: the residual stream of {classes[0] or family} is not known",
            f"language models of {', '.join(sorted(RESIDUAL))} can be rotated",
        )
    tensors, config = dict(base.tensors), dict(base.config)
    head = f"{stream.head}.weight"
    embedding = f"{stream.embedding}.weight"
    if head not in tensors:
        tensors[head] = replace(base.tensors[embedding], name=head)
    config["tie_word_embeddings"] = False
    return Rotated(
        base.folder, config, tensors, base.shards, base.side_files, base.notes,
        base=base, rotation=rotation, parts=dict(_parts(base, stream)), embedding=embedding,
    )  # fmt: skip


def _parts(base: Checkpoint, stream: Residual) -> Iterator[tuple[str, Part]]:
    """Each module of the checkpoint that has to do with the stream, and what."""
    yield stream.embedding, Part("reader")
    yield stream.norm, Part("norm")
    yield stream.head, Part("reader", stream.norm)
    prefix = f"{stream.blocks}."
    for block in {name.removeprefix(prefix).split(".")[0] for name in base.tensors if name.startswith(prefix)}:
        path = f"{stream.blocks}.{block}"
        yield from ((f"{path}.{writer}", Part("writer")) for writer in stream.writers)
        for norm, readers in FOLDS[base.config["model_type"]]:
            if norm.endswith("norm"):
                yield f"{path}.{norm}", Part("norm")
                yield from ((f"{path}.{reader}", Part("reader", f"{path}.{norm}")) for reader in readers)
