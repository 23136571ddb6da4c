"""mlx-lm on Apple's chips: groups of 64 with a scale and an offset, tables and heads too.

Over weights and cache it takes .65 to .8 GB at prompts of 2,048 tokens (BENCHMARKS.md of mlx-lm, M4 Max), which are
computed in steps of as many.
"""

from __future__ import annotations

import shlex

from spicerack.machine.catalogue import Device
from spicerack.planning import precisions
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision
from spicerack.storage.engine import find


def _precisions(_model: Model) -> list[Precision]:
    """Floats and its own."""
    return [precisions.floats(), *(precisions.affine(f"{bits}bit", bits) for bits in (8, 6, 4, 3))]


def _terms(_model: Model, _request: Request) -> tuple[Term, ...]:
    return (Term("activations and runtime", 800_000_000, "estimate", 200_000_000),)


def _budget(device: Device, _request: Request) -> int:
    return device.usable


def _flags(model: Model, precision: Precision, request: Request, _placement: Placement) -> list[str]:
    """Converting, and generating; of a folder that is its own already generating alone."""
    kept = "" if request.cache_bits == 16 else f" --kv-bits {request.cache_bits} --quantized-kv-start 0"

    def generate(model: str) -> str:
        return f"mlx_lm.generate --model {model} --prompt PROMPT{kept}"

    if precision.stored:
        return [generate(shlex.quote(model.name))]
    if precision.bits == 16:
        return [generate("MODEL")]
    convert = f"mlx_lm.convert --hf-path MODEL -q --q-bits {precision.bits:g} --q-group-size 64 --mlx-path OUT"
    return [convert, generate("OUT")]


ENGINE = Engine(
    name="mlx",
    summary="Apple's chips",
    kinds=frozenset({"metal"}),
    precisions=_precisions,
    rule="mlx",
    cache_bytes={16: 2.0, 8: 1.0625, 4: 0.5625},
    split="none",
    terms=_terms,
    budget=_budget,
    flags=_flags,
    only=frozenset(find("mlx").reads[0].known or ()),
    does=frozenset({"text"}),
    towers=False,
    speed_of="mlx",
)
