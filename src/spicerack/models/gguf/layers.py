"""What llama.cpp reads of a packed layer, whatever file it will lie in: the one rule of `export` and of `--for`."""

from __future__ import annotations

from functools import lru_cache

from spicerack.models.gguf.names import Names
from spicerack.numerics.scheme import Scheme
from spicerack.storage.format import StoredTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES, GgmlType

IN_F32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types")
"""Modules, the last part of their names, that llama.cpp computes in F32 and reads in nothing else, beside norms, biases
and whatever has one axis."""
_NEWEST = ("Q1_0", "Q2_0")
"""Types of 2026, which gguf-py 0.19, Ollama and older builds of llama.cpp do not read."""


def types_of(stored: StoredTensor) -> tuple[GgmlType, ...]:
    """The types that hold a packed tensor, the smallest first, by its scheme and shape.

    Types that only the newest readers know come last, but for tensors whose very scheme they are.
    """
    return _types_of(stored.scheme, stored.shape)


@lru_cache(maxsize=256)
def _types_of(scheme: Scheme, shape: tuple[int, ...]) -> tuple[GgmlType, ...]:
    """The same; layers are many, and kinds of them few."""
    types = blocks.types_for(scheme, shape)
    return tuple(sorted(types, key=lambda type_: type_.name in _NEWEST and type_.scheme != scheme.name))


def place_obstacle(names: Names, stored: StoredTensor) -> str | None:
    """Why a layer stays float in files of a family, whatever its numbers are, the end of a sentence; None if not."""
    places = names.places(f"{stored.module}.weight")
    if not places:
        return f"llama.cpp has no such layer in {names.family.architecture}"
    place, *_ = places
    if place.module in IN_F32:
        return "llama.cpp reads it in F32 alone"
    if len(stored.shape) != (3 if place.member is None and place.module.endswith("_exps") else 2):
        return f"it has {len(stored.shape)} axes, and llama.cpp has no such tensor in {names.family.architecture}"
    return None


def scale_obstacle(names: Names, stored: StoredTensor) -> str | None:
    """Why llama.cpp would compute a layer with a place without its scale, the end of a sentence; None if it would not.

    NVFP4 has a scale of the whole tensor in a tensor beside it. llama.cpp reads these in all architectures, and
    multiplies by them where its code of one says so (`Family.scaled`): elsewhere its logits are of another model, or no
    numbers.
    """
    if types_of(stored)[:1] != (TYPES["NVFP4"],):
        return None
    place, *_ = names.places(f"{stored.module}.weight")
    if place.module == "token_embd":
        return "llama.cpp has no place for the scale of an embedding in NVFP4"
    if not names.family.scaled:
        return f"llama.cpp does not multiply by the scales of NVFP4 in {names.family.architecture}"
    return None


def obstacle(names: Names, stored: StoredTensor) -> str | None:
    """Why a packed tensor cannot go into a file as it is, the end of a sentence; None if it can."""
    if (reason := place_obstacle(names, stored) or scale_obstacle(names, stored)) is not None:
        return reason
    if stored.scheme.activations == "static":
        return f"{stored.scheme} has a scale of activations, for which GGUF has no place"
    return None if types_of(stored) else blocks.no_type(stored.scheme, stored.shape)
