"""transformers 5.24 with accelerate: layers over devices one after the other, the rest in RAM or on disk.

Our folders it reads by decoding them, on a processor at the first forward: there they take what floats take. So small
numbers here are bitsandbytes', which it makes while it loads.
"""

from __future__ import annotations

from spicerack.machine.catalogue import GIB, Device
from spicerack.planning import buffers, precisions
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Term
from spicerack.planning.precisions import Precision

_NESTED = "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16"
"""Scales in 8 bits, without which nf4 takes 4.5 bits and not 4.127; products in 16 bits, which are in 32 otherwise."""


def _precisions(_model: Model) -> list[Precision]:
    """Floats, and bitsandbytes': int8 with a scale of a row, nf4 with scales of 64 that are quantized themselves."""
    return [
        precisions.floats(),
        precisions.bitsandbytes("bnb int8", 8, 8.0),
        precisions.bitsandbytes("bnb nf4", 4, 4.127),
    ]


def _terms(model: Model, request: Request) -> tuple[Term, ...]:
    """A whole prompt runs at once."""
    nbytes = buffers.forward(model, request.context * request.users, 2)
    checked = not model.experts and not model.recurrent
    context = Term("libraries and their workspaces", GIB // 2, "estimate", GIB // 4)
    return Term("activations of a full prompt", nbytes, "formula" if checked else "estimate"), context


def _budget(device: Device, _request: Request) -> int:
    return device.usable


def _flags(model: Model, precision: Precision, _request: Request, placement: Placement) -> list[str]:
    """The call that loads it so, by the class that config.json names where it is no causal language model."""
    named = model.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    of = "AutoModelForCausalLM" if model.does == "text" or not first.isidentifier() else first
    words = ["dtype=torch.bfloat16", 'device_map="auto"']
    if precision.name.startswith("bnb"):
        four = precision.name.endswith("nf4")
        kind = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", {_NESTED}' if four else "load_in_8bit=True"
        words.append(f"quantization_config=BitsAndBytesConfig({kind})")
    if placement.disk:
        words.append('offload_folder="offload"')
    limits = [f'{i}: "{share.budget / GIB:.1f}GiB"' for i, share in enumerate(placement.shares)]
    if placement.host is not None:
        limits.append(f'"cpu": "{placement.host.budget / GIB:.1f}GiB"')
    if len(limits) > 1:
        words.append(f"max_memory={{{', '.join(limits)}}}")
    return [f"{of}.from_pretrained(MODEL, {', '.join(words)})"]


ENGINE = Engine(
    name="transformers",
    summary="every model, in Python; the rest in RAM or on disk",
    kinds=frozenset({"cuda", "cuda-old", "rocm-cdna", "rocm-rdna", "metal", "cpu"}),
    precisions=_precisions,
    rule="transformers",
    cache_bytes={16: 2.0},
    split="layers",
    terms=_terms,
    budget=_budget,
    flags=_flags,
    offload=True,
)
