"""spicerack's own runtime: packed weights on the processor, a cache in 16, 8 or 4 bits."""

from __future__ import annotations

from spicerack.machine.catalogue import GIB, Device
from spicerack.planning import buffers, cache, precisions
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision

_SCHEMES = ("w8", "w6", "w5g64", "w4g32z", "w4g128", "w3g64", "w2g32z")


def _precisions(_model: Model) -> list[Precision]:
    """Floats as they are stored, and ours."""
    return [precisions.as_stored(), *map(precisions.ours, _SCHEMES)]


def _terms(model: Model, request: Request) -> tuple[Term, ...]:
    """A whole prompt runs at once. Measured are half the cache once more, whose layers are copied as they grow, and
    28 MB of workspaces; torch and transformers take .4 GiB when imported."""
    nbytes = buffers.ours(model, request.context * request.users)
    room = cache.Room(request.context, request.users, float(model.float_bytes), float(model.float_bytes))
    kept = sum(cache.nbytes(layer, room, "transformers", model.family) for layer in model.layers)
    return (
        Term("activations of a full prompt", nbytes, "estimate", nbytes // 10),
        Term("copies of the cache", round(kept / 2), "estimate", round(kept / 4)),
        Term("workspaces", 28_000_000, "estimate", 10_000_000),
        Term("Python, torch, transformers", round(0.4 * GIB), "estimate", GIB // 8),
    )


def _budget(device: Device, _request: Request) -> int:
    return device.usable


def _flags(model: Model, _precision: Precision, request: Request, _placement: Placement) -> list[str]:
    """Generating with what was planned; what writes no text is loaded from Python."""
    if not model.generates or model.does == "pictures or sound" or "num_mel_bins" in model.config:  # of sound
        return ["python -c 'import spicerack; model = spicerack.load(\"OUT\")'"]
    kept = "" if request.cache_bits == 16 else f" --cache {request.cache_bits}"
    return [f"spicerack generate OUT PROMPT{kept}"]


ENGINE = Engine(
    name="spicerack",
    summary="packed weights on a processor, from Python",
    kinds=frozenset({"cpu"}),
    precisions=_precisions,
    rule="spicerack",
    cache_bytes={16: 2.0, 8: 1.0, 4: 0.5},  # of codes; scales and what stays in float are counted with them
    split="none",
    terms=_terms,
    budget=_budget,
    flags=_flags,
    speed_of="spicerack",
)
