"""vLLM 0.33: safetensors folders on cards, a share of each layer on each; what it takes is a share of the card.

What a forward needs is measured by it at start, and differs between versions: 1 to 2 GiB of activations for text, .1
to 1.8 of what is not torch's (1.79 on an H100, twice that for two, PR 10511; .07 on a B200, PR 21489), .4 to .7 of
graphs (logs of 2026). So its figures are ranges, of which the middle is planned with.
"""

from __future__ import annotations

import math

from spicerack.machine.catalogue import GIB, Device
from spicerack.numerics.scheme import parse
from spicerack.planning import precisions
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision

UTILIZATION = 0.92
"""Share of a card that it takes unless told otherwise."""
_SCHEMES = ("w8", "w4g32", "w4g128z", "w4g128")
"""Ours that its kernels read: 4 and 8 bits; others it refuses."""

_CUT = frozenset({"o_proj", "down_proj", "out_proj", "wo", "w2", "fc2", "c_proj", "dense_4h_to_h"})
"""Layers whose inputs lie on several cards, a part on each (RowParallelLinear)."""
_TILES = (128, 64)
"""Channels of an input that Marlin multiplies at a time, of layers and of routed experts (utils/marlin_utils.py:
verify_marlin_supports_shape, check_moe_marlin_supports_layer)."""


def _precisions(model: Model) -> list[Precision]:
    """Floats and ours; gpt-oss as it is distributed, too."""
    released = [precisions.experts_in_mxfp4()] if model.family == "gpt_oss" else []
    return [precisions.floats(), precisions.ours(_SCHEMES[0]), *released, *map(precisions.ours, _SCHEMES[1:])]


def _terms(model: Model, _request: Request) -> tuple[Term, ...]:
    """On each card."""
    pictures = any(weight.place == "tower" for weight in model.weights)
    activations = Term("activations, profiled", (2 if pictures else 1) * GIB, "estimate", GIB)
    other = Term("outside of torch", round(0.9 * GIB), "estimate", round(0.85 * GIB))
    return activations, other, Term("CUDA graphs", round(0.5 * GIB), "estimate", round(0.2 * GIB))


def _budget(device: Device, request: Request) -> int:
    """Its share of what the driver reports."""
    return int(device.reported * (request.utilization or UTILIZATION))


def _whole_parts(model: Model, precision: Precision, parts: int) -> bool:
    """Whether each card's part of what reads a cut row is one that Marlin multiplies, groups and tiles whole."""
    if precision.scheme is None:
        return True
    group = parse(precision.scheme).group_columns or 1
    for weight in model.weights:
        if weight.layer is None or weight.entry.module.rpartition(".")[2] not in _CUT:
            continue
        if weight.entry.matrix_shape[-1] % (parts * math.lcm(group, _TILES[weight.routed])):
            return False
    return True


def _flags(_model: Model, _precision: Precision, request: Request, placement: Placement) -> list[str]:
    """vllm serve with what was planned."""
    words = ["vllm serve OUT", f"--max-model-len {request.context}", f"--max-num-seqs {request.users}"]
    if placement.tensor > 1:
        words.append(f"--tensor-parallel-size {placement.tensor}")
    if placement.pipeline > 1:
        words.append(f"--pipeline-parallel-size {placement.pipeline}")
    if request.cache_bits == 8:
        words.append("--kv-cache-dtype fp8")
    if request.utilization is not None:
        words.append(f"--gpu-memory-utilization {request.utilization:g}")
    return [" ".join(words)]


ENGINE = Engine(
    name="vllm",
    summary="many users on cards; a share of each layer on each card",
    kinds=frozenset({"cuda", "cuda-old", "rocm-cdna", "rocm-rdna"}),
    precisions=_precisions,
    rule="vllm",
    cache_bytes={16: 2.0, 8: 1.0},
    split="tensor",
    terms=_terms,
    budget=_budget,
    flags=_flags,
    families={"t5": "no longer runs T5", "rwkv": "does not run RWKV"},
    does=frozenset({"text", "embeddings", "sequences"}),
    speed_of="llama.cpp",
    whole_parts=_whole_parts,
)
