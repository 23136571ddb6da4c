"""llama.cpp b11549: GGUF, layers over devices one after the other, experts or layers in the processor's memory."""

from __future__ import annotations

import shlex
from pathlib import Path

from spicerack.machine.catalogue import Device
from spicerack.planning import buffers, precisions
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision

_CACHE_TYPES = {8: "q8_0", 4: "q4_0"}
_MIXTURES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def _precisions(model: Model) -> list[Precision]:
    """Its mixtures; gpt-oss as it is distributed, too."""
    released = [precisions.experts_in_mxfp4("MXFP4")] if model.family == "gpt_oss" else []
    return [*map(precisions.mixture, _MIXTURES[:2]), *released, *map(precisions.mixture, _MIXTURES[2:])]


def _terms(model: Model, request: Request) -> tuple[Term, ...]:
    """The compute buffer of llama-server, which keeps a row of logits for each sequence.

    The formula was compared with dense models, mixtures, MLA and hybrids; of pure state spaces with none.
    """
    nbytes = buffers.llama_cpp(model, request.context * request.users, request.users, outputs=request.users)
    return (Term("compute buffer", nbytes, "estimate" if model.recurrent else "formula"),)


def _budget(device: Device, _request: Request) -> int:
    """What is usable: the context of CUDA, .25 to .46 GiB, is not in it."""
    return device.usable


def _flags(model: Model, precision: Precision, request: Request, placement: Placement) -> list[str]:
    """llama-server with what was planned."""
    there = precision.stored == "gguf"
    file = shlex.quote(Path(model.name).name) if there else f"MODEL-{precision.name}.gguf"
    words = [f"llama-server -m {file}", f"-c {request.context * request.users}"]
    words.append(f"-np {request.users}")
    if model.does == "embeddings":
        words.append("--embeddings")
    cards = [share for share in placement.shares if share.device.kind not in ("cpu", "phone", "watch")]
    if cards:
        # the head counts as one more layer, the last of all, and goes to a card first
        counts = [len(share.layers) for share in placement.shares]
        in_ram = placement.host is not None and bool(placement.host.layers)
        words.append(f"-ngl {sum(counts) + 1 if in_ram else 99}")
        if len(cards) > 1:
            words.append("-sm layer -ts " + ",".join(map(str, (*counts[:-1], counts[-1] + 1))))
    elif placement.host is not None and placement.host.layers:
        words.append("-ngl 0")
    if placement.experts_in_ram:
        everything = placement.experts_in_ram == placement.experts_layers
        words.append("--cpu-moe" if everything else f"--n-cpu-moe {placement.experts_in_ram}")
    if kind := _CACHE_TYPES.get(request.cache_bits):
        words.append(f"-fa on -ctk {kind} -ctv {kind}")
    if placement.disk:
        words.append("--mmap")
    return [" ".join(words)]


ENGINE = Engine(
    name="llama.cpp",
    summary="GGUF on nearly everything; experts or layers may stay in RAM",
    kinds=frozenset({"cuda", "cuda-old", "rocm-rdna", "rocm-cdna", "vulkan", "metal", "cpu", "phone"}),
    precisions=_precisions,
    rule="llama.cpp",
    cache_bytes={16: 2.0, 8: 34 / 32, 4: 18 / 32},
    split="layers",
    terms=_terms,
    budget=_budget,
    flags=_flags,
    families={"whisper": "does not run Whisper (whisper.cpp does)"},
    does=frozenset({"text", "embeddings"}),  # llama-server has no encoder-decoders, and pictures are for a second file
    table_in_ram=True,
    towers=False,
    offload=True,
    speed_of="llama.cpp",
    most_users=256,  # LLAMA_MAX_SEQ: more slots are refused when it starts
)
