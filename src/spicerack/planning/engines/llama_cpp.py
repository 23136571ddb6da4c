"""llama.cpp b11549: GGUF, layers over devices one after the other, experts or layers in the processor's memory."""

from __future__ import annotations

import shlex
from pathlib import Path

from spicerack.machine.catalogue import Device
from spicerack.planning import buffers, precisions
from spicerack.planning.engine import DryRun, Engine, Request
from spicerack.planning.engines import _llama_fit
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision

_CACHE_TYPES = {8: "q8_0", 4: "q4_0"}
_MIXTURES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def _precisions(model: Model) -> list[Precision]:
    """Its mixtures; gpt-oss as it is distributed, too."""
    released = [precisions.mixture("MXFP4")] if model.family == "gpt_oss" else []
    return [*map(precisions.mixture, _MIXTURES[:2]), *released, *map(precisions.mixture, _MIXTURES[2:])]


def _terms(model: Model, request: Request) -> tuple[Term, ...]:
    """The compute buffer of llama-server, which keeps a row of logits for each sequence.

    The formula was compared with dense models, mixtures, MLA and hybrids; of pure state spaces with none.
    """
    nbytes = buffers.llama_cpp(model, request.context, outputs=request.users)
    return (Term("compute buffer", nbytes, "estimate" if model.recurrent else "formula"),)


def _budget(device: Device, _request: Request) -> int:
    """What is usable: the context of CUDA, .25 to .46 GiB, is not in it."""
    return device.usable


def _flags(model: Model, precision: Precision, request: Request, placement: Placement) -> list[str]:
    """llama-server with what was planned."""
    file = shlex.quote(model.name) if precision.stored == "gguf" else f"MODEL-{precision.name}.gguf"
    words = ["llama-server", "-m", file, *_sizes(request)]
    if model.does == "embeddings":
        words.append("--embeddings")
    words += _places(placement)
    if placement.disk:
        words.append("--mmap")
    return [" ".join(words)]


def _sizes(request: Request) -> list[str]:
    """Options for tokens, sequences and the cache."""
    words = ["-c", str(request.context * request.users), "-np", str(request.users)]
    if kind := _CACHE_TYPES.get(request.cache_bits):
        words += ["-fa", "on", "-ctk", kind, "-ctv", kind]
    return words


def _places(placement: Placement) -> list[str]:
    """Options for what lies on cards and what does not; none where there are no cards."""
    words = []
    cards = [share for share in placement.shares if share.device.kind not in ("cpu", "phone", "watch")]
    if cards:
        # the head counts as one more layer, the last of all, and goes to a card first
        counts = [len(share.layers) for share in placement.shares]
        in_ram = placement.host is not None and bool(placement.host.layers)
        words += ["-ngl", str(sum(counts) + 1 if in_ram else 99)]
        if len(cards) > 1:
            words += ["-sm", "layer", "-ts", ",".join(map(str, (*counts[:-1], counts[-1] + 1)))]
    elif placement.host is not None and placement.host.layers:
        words += ["-ngl", "0"]
    if placement.experts_in_ram:
        everything = placement.experts_in_ram == placement.experts_layers
        words += ["--cpu-moe"] if everything else ["--n-cpu-moe", str(placement.experts_in_ram)]
    return words


def _dry_run(file: Path, model: Model, request: Request, placement: Placement | None) -> DryRun:
    """llama-fit-params on the file. It makes room for logits of a whole batch, as llama-cli does.

    Weights in an order of a processor's own, which take the same room, it would leave out: they are told to stay. Where
    no card is planned for it takes none, though it may find one that nobody knows here.
    """
    places = [] if placement is None else _places(placement)
    options = ["--no-repack", *_sizes(request), *(places or ["-dev", "none"])]
    planned = buffers.llama_cpp(model, request.context)
    return _llama_fit.ask(file, options, planned)


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
    families={
        "whisper": "does not run Whisper (whisper.cpp does)",
        "rwkv": "runs RWKV from its version 6 on",
    },
    does=frozenset({"text", "embeddings"}),  # llama-server has no encoder-decoders, and pictures are for a second file
    table_in_ram=True,
    towers=False,
    offload=True,
    speed_of="llama.cpp",
    dry_run=_dry_run,
    most_users=256,  # LLAMA_MAX_SEQ: more slots are refused when it starts
)
