"""Tokens per second: bytes over bandwidth, and a time for each layer; operations over peak for a prompt.

    decode    t = bytes read / (eta * bandwidth) + layers * tau + cache read / (eta_cache * bandwidth)
    prompt    tokens per second = phi * peak / (2 * numbers read)

Bytes alone are 18 to 32 % off: small models, mixtures and Apple's chips wait for launches. eta and tau are two numbers
for each engine and kind of device, fitted on every other published measurement and judged on the others
(`python -m benchmarks.planning.speed`, which prints this table). An estimate carries that judgement with it.

What is given up: draft models, and batches, whose users share the bytes of the weights here and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spicerack.machine.catalogue import Device
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Share
from spicerack.planning.precisions import Precision

MIXTURE = 1.5
"""Launches of a layer with experts, in those of a dense one: router, choice, gathering and three products by experts
beside attention, where a dense layer has three products: about 24 nodes of llama.cpp's graph for 16."""
_CACHE = 0.7
"""Bandwidth that a cache is read with, in that of weights: .65 / .89 on CUDA at a depth of 32,768 (llama.cpp's
benches/)."""
_REDUCE = 20e-6
"""Seconds that cards need to add up what each has of a layer, twice a layer: 10 to 30 us over NVLink or PCIe."""
_HOST_BANDWIDTH = 60e9
"""Bytes a second of a processor's memory that nothing is known of: two channels of DDR5 at two thirds."""
_LOWEST, _HIGHEST = 0.7, 1.3
"""The range that a prompt's speed is printed with."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What was fitted for an engine on a kind of device.

    eta      share of the bandwidth that weights are read with
    tau      seconds for each layer
    judged   measurements that were not fitted to
    within   how many of them are right within 20 %
    median   of their errors, relative
    """

    eta: float
    tau: float
    judged: int
    within: int
    median: float


CONSTANTS: Mapping[tuple[str, str], Constants] = {
    ("llama.cpp", "cuda"): Constants(0.89, 48e-6, 18, 16, 0.044),
    ("llama.cpp", "cuda-old"): Constants(0.7, 55e-6, 1, 1, 0.06),
    ("llama.cpp", "rocm-rdna"): Constants(0.76, 54e-6, 5, 5, 0.069),
    ("llama.cpp", "rocm-cdna"): Constants(0.66, 143e-6, 1, 1, 0.016),
    ("llama.cpp", "vulkan"): Constants(0.95, 43e-6, 2, 1, 0.299),
    ("llama.cpp", "metal-2023"): Constants(0.88, 159e-6, 15, 15, 0.036),
    ("llama.cpp", "metal"): Constants(0.89, 114e-6, 5, 5, 0.066),
    ("mlx", "metal"): Constants(0.9, 76e-6, 2, 2, 0.01),
}
"""(engine, kind of device) -> what was fitted; printed by the benchmark. metal-2023 is of builds from before 2024, and
is there because half of what is published is from them."""
PROMPT: dict[str, tuple[str, float]] = {
    "cuda": ("int8_tops", 0.231), "metal": ("fp32_tflops", 0.616), "rocm-rdna": ("fp16_tflops", 0.3),
    "rocm-cdna": ("fp16_tflops", 0.181),
}  # fmt: skip
"""Kind of device -> which peak a prompt is bound by, and the share of it that is reached; fitted and judged in the same
way (median errors of 3 to 13 %, worst 43 %). Of older cards two are published, with no peak in common: nothing is
said."""
FLOATS: dict[str, tuple[str, float]] = {"cuda": ("fp16_tflops", 0.5)}
"""The same of floats in 16 bits, where another peak bounds them; the share is a guess."""
PROCESSOR = Constants(0.85, 0.0, 0, 0, 0.0)
"""Of processors: our kernels read weights at .8 to .95 of the measured bandwidth, and launches cost nothing that shows
below eight threads."""
OURS = Constants(0.85, 550e-6, 0, 0, 0.0)
"""Of our runtime there: modules in Python take half a millisecond a layer (stdlib-lm of four layers and 3 MB writes 449
tokens a second in README's table)."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What is expected, in tokens a second.

    decode   of each user, with an empty cache;  full: with a full context
    prompt   tokens of a prompt a second, lowest and highest; None where the device's peak is not known
    first    seconds to the first token of a full prompt, lowest and highest
    basis    where the constants are from and how often they are right, for people
    """

    decode: float
    full: float
    prompt: tuple[float, float] | None
    first: tuple[float, float] | None
    basis: str


def kind_of(device: Device) -> str:
    """What a device computes with: cuda (Ampere and later), cuda-old, rocm-rdna, rocm-cdna, vulkan, metal, cpu, phone,
    watch, memory."""
    if device.kind in ("memory", "phone", "watch"):
        return device.kind
    arch = device.arch
    if arch.startswith("sm") and arch[2:].isdecimal():
        return "cuda" if int(arch[2:]) >= 80 else "cuda-old"
    if arch.startswith("gfx"):
        return "rocm-cdna" if arch.startswith("gfx9") else "rocm-rdna"
    if arch.startswith("xe"):
        return "vulkan"
    return "metal" if device.apple else "cpu" if device.kind == "cpu" else "memory"


def obstacle(model: Model, engine: Engine, placement: Placement) -> str | None:
    """Why no speed can be said; None where one can."""
    if model.does == "pictures or sound":
        return "it reads no text, and nothing here measures its answers"
    if not model.generates:
        return "it writes no text, token by token: spicerack bench measures it"
    if placement.missing:
        return "it does not fit"
    if placement.disk:
        return "weights are read from the disk for each token: a disk's own speed decides"
    if engine.speed_of is None:
        return f"no measurements of {engine.name} are known"
    for device in (share.device for share in placement.shares):
        if device.bandwidth_gb_s is None:
            return f"no bandwidth is known of {device.name}"
        if constants(engine, device) is None:
            return f"no measurements of {engine.name} on this kind of device are known ({kind_of(device)})"
    return None


def constants(engine: Engine, device: Device) -> Constants | None:
    """The constants for a device, or None."""
    if engine.speed_of is None:
        return None
    kind = kind_of(device)
    if kind == "cpu" and engine.speed_of in ("spicerack", "llama.cpp"):
        return OURS if engine.speed_of == "spicerack" else PROCESSOR
    return CONSTANTS.get((engine.speed_of, kind))


def seconds(nbytes: float, bandwidth: float, layers: float, known: Constants) -> float:
    """Of one token: its bytes at a share of the bandwidth (bytes a second), and a time for each layer."""
    return nbytes / (known.eta * bandwidth) + layers * known.tau


def estimate(
    model: Model, precision: Precision, engine: Engine, request: Request, placement: Placement, measured: bool = False
) -> Speed:
    """Tokens a second of what was placed; to be asked where there is no `obstacle`.

    measured: the device is this machine, whose bandwidth was measured.
    """
    empty = _token(model, engine, placement, 0.0, request.users)
    full = _token(model, engine, placement, 1.0, request.users)
    rate = _prompt(model, precision, placement)
    range_ = None if rate is None else (rate * _LOWEST, rate * _HIGHEST)
    first = None if range_ is None else (request.context / range_[1], request.context / range_[0])
    return Speed(1 / empty, 1 / full, range_, first, _basis(engine, placement, measured))


def _token(model: Model, engine: Engine, placement: Placement, filled: float, users: int) -> float:
    """Seconds of one step for all users. filled: share of the context that is in the cache."""
    stages = [_stage(model, engine, share, filled, users) for share in placement.shares]
    if placement.tensor > 1:  # devices of a group work at once, and add up what each has
        groups = [max(stages[i : i + placement.tensor]) for i in range(0, len(stages), placement.tensor)]
        total = sum(groups) + 2 * _REDUCE * len(model.layers)
    else:
        total = sum(stages)
    if (host := placement.host) is not None and (host.read or host.cached):
        bandwidth = host.device.bandwidth_gb_s * 1e9 if host.device.bandwidth_gb_s else _HOST_BANDWIDTH
        total += (_batch(model, host.read, users) + filled * host.cached) / (PROCESSOR.eta * bandwidth)
    return total


def _stage(model: Model, engine: Engine, share: Share, filled: float, users: int) -> float:
    """Seconds of the layers that one device has."""
    known = constants(engine, share.device)
    assert known is not None and share.device.bandwidth_gb_s is not None, "asked before"
    bandwidth = share.device.bandwidth_gb_s * 1e9
    layers = len(share.layers) * (MIXTURE if model.experts else 1)
    cached = filled * share.cached / (_CACHE * known.eta * bandwidth)
    return seconds(_batch(model, share.read, users), bandwidth, layers, known) + cached


def _batch(model: Model, read: int, users: int) -> float:
    """Bytes that a step reads: once for all users, but that each may be sent to other experts."""
    if users == 1 or not model.experts:
        return float(read)
    reached = 1 - (1 - model.used) ** users  # of experts that are chosen evenly
    return read * min(users, reached / model.used)


def _prompt(model: Model, precision: Precision, placement: Placement) -> float | None:
    """Tokens of a prompt a second: devices compute one after the other, or each its share."""
    if placement.host is not None and placement.host.read:
        return None  # bound by the link, or by the processor
    total = 0.0
    layers = max(len(model.layers), 1)
    for share in placement.shares:
        bound = _bound(share.device, precision)
        if bound is None:
            return None
        part = len(share.layers) / layers / placement.tensor
        total += part * 2 * model.read / bound
    total /= placement.tensor  # they work at once
    return 1 / total if total else None


def _bound(device: Device, precision: Precision) -> float | None:
    """Operations a second that a prompt reaches; None where the device's peak is not known."""
    kind = kind_of(device)
    bounds = PROMPT | FLOATS if precision.bits == 16 else PROMPT
    peak, share = bounds.get(kind, ("", 0.0))
    peaks = {"int8_tops": device.int8_tops, "fp32_tflops": device.fp32_tflops, "fp16_tflops": device.fp16_tflops}
    most = peaks.get(peak)
    return None if most is None else share * most * 1e12


def _basis(engine: Engine, placement: Placement, measured: bool) -> str:
    """Where it is from and how good it is, in a sentence."""
    if measured:
        return "from this machine's own memory bandwidth, measured now"
    kinds = {kind_of(share.device): constants(engine, share.device) for share in placement.shares}
    said = []
    for kind, known in kinds.items():
        if known is None:
            continue
        if not known.judged:
            said.append(f"{kind}: from the peak bandwidth, compared with no measurement")
            continue
        whose = "" if engine.speed_of == engine.name else f", all of {engine.speed_of}"
        said.append(f"right within 20 % for {known.within} of {known.judged} known cases ({kind}{whose})")
    if placement.host is not None and placement.host.read:
        said.append(f"RAM: {_HOST_BANDWIDTH / 1e9:g} GB/s assumed, compared with no measurement")
    return "; ".join(said)
