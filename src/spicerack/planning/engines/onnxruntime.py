"""onnxruntime with its generate() API: one device, a cache of the full length.

Sessions that pack weights anew hold them twice while they open (PR 22256: 5.4 GB became 2.7 where packed weights are
stored), so twice the weights are planned with.
"""

from __future__ import annotations

from dataclasses import replace

from spicerack.machine.catalogue import GIB, Device
from spicerack.planning import precisions
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision


def _precisions(_model: Model) -> list[Precision]:
    """float16, and MatMulNBits' groups of 32: in 8 bits its own builder makes them, in 4 it reads GPTQ's files, which
    `export` makes of ours."""
    return [
        precisions.floats("fp16"), replace(precisions.ours("w8g32"), scheme=None), precisions.ours("w4g32z"),
    ]  # fmt: skip


def _terms(_model: Model, _request: Request) -> tuple[Term, ...]:
    return (Term("arena and runtime", GIB, "estimate", GIB // 2),)


def _budget(device: Device, _request: Request) -> int:
    return device.usable


def _flags(_model: Model, precision: Precision, _request: Request, placement: Placement) -> list[str]:
    """Building the graph."""
    kind = "int4" if precision.stored else {16: "fp16", 8: "int8", 4: "int4"}[round(precision.bits)]
    where = "cuda" if placement.shares and placement.shares[0].device.kind == "gpu" else "cpu"
    return [f"python -m onnxruntime_genai.models.builder -m MODEL -o OUT -p {kind} -e {where}"]


ENGINE = Engine(
    name="onnxruntime",
    summary="ONNX graphs with int4 and int8 layers, on one device",
    kinds=frozenset({"cuda", "cuda-old", "cpu", "phone"}),
    precisions=_precisions,
    rule="preallocated",
    cache_bytes={16: 2.0},
    split="none",
    terms=_terms,
    budget=_budget,
    flags=_flags,
    opening=2.0,
    only=frozenset({  # of the builder's source, of 0.18.0; of a quantized folder it takes all but the last two
        "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "qwen2",
        "qwen3", "smollm3", "gpt_oss", "whisper",
    }),
)  # fmt: skip
