"""A checkpoint whose residual stream is rotated: the same function, other weights, read like any other.

    embedding E -> E R,  readers W -> W diag(gain) R,  writers W -> R^T W, b -> R^T b,  gains -> 1,  head like a reader

A head that is tied to the embedding gets a tensor of its own, because the last gain is in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from spicerack.algorithms.transforms import hadamard
from spicerack.errors import RecipeError
from spicerack.models.families.folds import FOLDS
from spicerack.models.families.residual import RESIDUAL, Residual
from spicerack.storage.reader import Checkpoint


@dataclass(frozen=True)
class Rotated(Checkpoint):
    """parts: module -> "reader", "writer" or "norm", and the norm whose gain it takes. embedding: what an untied head
    was."""

    base: Checkpoint | None = None
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)
    embedding: str = ""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, rotated, in its stored type."""
        assert self.base is not None
        module, _, parameter = name.rpartition(".")
        kind, norm = self.parts.get(module, ("", ""))
        w = self.base.read(name if name in self.base.tensors else self.embedding)
        if not kind:
            return w
        if kind == "norm":
            return torch.ones_like(w)
        if kind == "writer":
            turned = hadamard.rotate(w.float() if parameter == "bias" else w.float().t())
            return (turned if parameter == "bias" else turned.t()).to(w.dtype).contiguous()
        if parameter == "bias":
            return w
        gain = self.base.read(f"{norm}.weight").float() if norm else 1.0
        return hadamard.rotate(w.float() * gain).to(w.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def fingerprint(self) -> str:
        """That of the checkpoint that is rotated; the recipe says that it is."""
        assert self.base is not None
        return self.base.fingerprint()

    def turn(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the original, rotated."""
        return hadamard.rotate(hidden)


def original(source: Checkpoint) -> Checkpoint:
    """What was rotated, or `source` itself."""
    if not isinstance(source, Rotated):
        return source
    assert source.base is not None
    return source.base


def rotate(base: Checkpoint) -> Rotated:
    """`base` with its residual stream rotated. Raises RecipeError for families whose stream is not known."""
    family = base.config.get("model_type")
    found = RESIDUAL.get(family) if isinstance(family, str) else None
    classes = base.config.get("architectures") or [""]
    if found is None or not str(classes[0]).endswith("ForCausalLM") or f"{found.embedding}.weight" not in base.tensors:
        raise RecipeError(
            f"hadamard: the residual stream of {classes[0] or family} is not known",
            f"language models of {', '.join(sorted(RESIDUAL))} can be rotated",
        )
    parts = dict(_parts(base, found))
    tensors, config = dict(base.tensors), dict(base.config)
    head = f"{found.head}.weight"
    embedding = f"{found.embedding}.weight"
    if head not in tensors:
        tensors[head] = replace(base.tensors[embedding], name=head)
    config["tie_word_embeddings"] = False
    return Rotated(
        base.folder, config, tensors, base.shards, base.side_files, base.notes,
        base=base, parts=parts, embedding=embedding,
    )  # fmt: skip


def _parts(base: Checkpoint, names: Residual) -> list[tuple[str, tuple[str, str]]]:
    found = [(names.embedding, ("reader", "")), (names.norm, ("norm", "")), (names.head, ("reader", names.norm))]
    prefix = f"{names.blocks}."
    blocks = {name.removeprefix(prefix).split(".")[0] for name in base.tensors if name.startswith(prefix)}
    for block in blocks:
        path = f"{names.blocks}.{block}"
        found += [(f"{path}.{writer}", ("writer", "")) for writer in names.writers]
        for norm, readers in FOLDS[base.config["model_type"]]:
            if not norm.endswith("norm"):
                continue
            found.append((f"{path}.{norm}", ("norm", "")))
            found += [(f"{path}.{reader}", ("reader", f"{path}.{norm}")) for reader in readers]
    return found
