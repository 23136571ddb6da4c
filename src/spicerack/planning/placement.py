"""Layers over devices, as engines split them: one device after the other, or a share of each layer on each.

Layer by layer devices are filled by the same part of what each may hold, so that cards of different sizes get what they
can carry; a card that cannot even hold a layer is left out. What does not fit lies in the processor's memory where the
engine can do that and the person has some: routed experts of the first layers first, because a token reads few of them,
then whole layers from the first on; and what is left of that on the disk, if that was allowed.

Shares of each layer need as many devices as divide the heads of queries, and the smallest of them decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spicerack.machine.catalogue import Device
from spicerack.planning import cache
from spicerack.planning.engine import Engine, Request
from spicerack.planning.model import Model
from spicerack.planning.places import Placement, Share, Term
from spicerack.planning.precisions import Block, Precision, Weighed, weighed

_FRACTIONS = 24
"""Bisections of the part that devices are filled by: 2^-24 of a device is a few kilobytes."""


@dataclass(frozen=True, slots=True)
class Host:
    """The memory and disk of the processor beside the devices.

    ram    bytes that a model may have there
    disk   whether weights may be read from the disk for each token
    """

    ram: int = 0
    disk: bool = False


ALONE = Host()
"""Nothing beside the devices."""


@dataclass(frozen=True, slots=True)
class _Load:
    """What has to be placed: bytes of each block's weights and cache, and of what stands before and behind them."""

    blocks: tuple[Block, ...]
    caches: tuple[int, ...]
    first: int
    last: int
    table: int
    read_last: int
    used: float


def place(
    model: Model, precision: Precision, engine: Engine, request: Request, devices: Sequence[Device], host: Host
) -> Placement:
    """Where the model's parts lie, for what is requested; `missing` says how much fits nowhere.

    devices: in the order that layers follow. host: memory beside cards; of devices that share the processor's there is
    none.
    """
    weights = weighed(model, precision)
    load = _load(model, weights, engine, request, devices)
    terms = engine.terms(model, request)
    budgets = [engine.budget(device, request) for device in devices]
    if engine.split == "tensor" and len(devices) > 1:
        return _tensor(model, precision, engine, load, terms, devices, budgets)
    if engine.split == "none":
        best = max(range(len(devices)), key=lambda i: budgets[i])
        devices, budgets = [devices[best]], [budgets[best]]
    whole = _spread(load, terms, devices, budgets, 0, 0)
    beside = host if engine.offload and all(device.kind in ("gpu", "memory") for device in devices) else ALONE
    if whole is not None:
        return _with_table(whole, load, beside)
    if beside.ram or beside.disk:
        return _offloaded(load, terms, devices, budgets, beside)
    return _forced(load, terms, devices, budgets)


def _load(model: Model, weights: Weighed, engine: Engine, request: Request, devices: Sequence[Device]) -> _Load:
    """Bytes to place, under the engine's rules."""
    own = engine.rule == "spicerack"  # it computes, and keeps tokens, in the type of the files
    floats = float(model.float_bytes) if own else 2.0
    room = cache.Room(
        tokens=request.context,
        sequences=request.users,
        bytes=floats if own and request.cache_bits == 16 else engine.cache_bytes[request.cache_bits],
        float_bytes=floats,
        batch=2048 if engine.rule == "vllm" else 512,
        source=model.source_tokens,
    )
    caches = tuple(round(cache.nbytes(layer, room, engine.rule, model.family)) for layer in model.layers)
    factor = engine.opening
    blocks = tuple(Block(round(b.dense * factor), round(b.routed * factor)) for b in weights.blocks)
    in_ram = engine.table_in_ram and not any(device.shares_memory for device in devices)
    tower = weights.tower if engine.towers else 0
    # a table that is the head, too, lies on the card for that, and once more in RAM where tokens are looked up there
    head = weights.output + (weights.input if model.tied else 0)
    table = weights.input if in_ram else 0
    first = (0 if in_ram or model.tied else weights.input) + tower + weights.encoder
    return _Load(blocks, caches, round(first * factor), round(head * factor), table, head, model.used)


def _spread(
    load: _Load, terms: tuple[Term, ...], devices: Sequence[Device], budgets: Sequence[int], begin: int, lean: int
) -> Placement | None:
    """Layers from `begin` on over devices that are all filled by the same part; None where they do not fit.

    lean: layers, from the first on, whose routed experts lie elsewhere.
    """
    fixed = sum(term.nbytes for term in terms)
    low, high = 0.0, 1.0
    runs = _runs(load, budgets, fixed, begin, lean, 1.0)
    if runs is None:
        return None
    for _ in range(_FRACTIONS if len(devices) > 1 else 0):
        middle = (low + high) / 2
        tried = _runs(load, budgets, fixed, begin, lean, middle)
        low, high, runs = (low, middle, tried) if tried is not None else (middle, high, runs)
    used = [i for i, run in enumerate(runs) if run]
    shares = []
    for i in used:
        run = runs[i]
        first = load.first if i == used[0] else 0
        last = load.last if i == used[-1] else 0
        shares.append(_share(load, terms, devices[i], budgets[i], run, lean, first, last))
    return Placement(
        tuple(shares), experts_in_ram=_experts(load, lean), experts_layers=_experts(load, len(load.blocks))
    )


def _runs(
    load: _Load, budgets: Sequence[int], fixed: int, begin: int, lean: int, part: float
) -> list[list[int]] | None:
    """Layers of each device, filled one after the other by `part` of its budget; None where some are left."""
    runs: list[list[int]] = []
    layer, count = begin, len(load.blocks)
    pending = load.first
    for budget in budgets:
        room = budget * part - fixed - pending
        run: list[int] = []
        while layer < count:
            needed = _block(load, layer, lean)
            # the last layer takes the head along, which stands behind it
            if needed + (load.last if layer == count - 1 else 0) > room:
                break
            room -= needed
            run.append(layer)
            layer += 1
        pending = 0 if run else pending
        runs.append(run)
    return runs if layer == count and (count == begin or any(runs)) else None


def _block(load: _Load, layer: int, lean: int) -> int:
    """Bytes of a layer with its cache; of a lean one without routed experts."""
    block = load.blocks[layer]
    return (block.dense if layer < lean else block.total) + load.caches[layer]


def _experts(load: _Load, until: int) -> int:
    """Layers with routed experts, of the first `until`."""
    return sum(block.routed > 0 for block in load.blocks[:until])


def _share(
    load: _Load, terms: tuple[Term, ...], device: Device, budget: int, run: Sequence[int], lean: int, first: int,
    last: int,
) -> Share:  # fmt: skip
    """What a device holds. run: its layers. first, last: bytes that stand before and behind all layers, if it has
    them."""
    weights = sum(load.blocks[i].dense if i < lean else load.blocks[i].total for i in run) + first + last
    kept = sum(load.caches[i] for i in run)
    read = sum(load.blocks[i].dense + (0 if i < lean else round(load.blocks[i].routed * load.used)) for i in run)
    read += load.read_last if last else 0
    parts = (Term("weights", weights, "exact"), Term("cache", kept, "exact"), *terms)
    return Share(device, tuple(run), parts, read, kept, budget)


def _ram(ram: int) -> Device:
    """The processor's memory, as a place."""
    gib = ram / (1 << 30)
    return Device("RAM", "cpu", gib or 1, gib, note="beside the cards")


def _with_table(placement: Placement, load: _Load, host: Host) -> Placement:
    """The same with the table of tokens in the processor's memory, where the engine keeps it there."""
    if not load.table:
        return placement
    share = Share(_ram(host.ram), (), (Term("table of tokens", load.table, "exact"),), 0, 0, max(host.ram, load.table))
    return Placement(
        placement.shares, share, experts_in_ram=placement.experts_in_ram, experts_layers=placement.experts_layers
    )


def _offloaded(
    load: _Load, terms: tuple[Term, ...], devices: Sequence[Device], budgets: Sequence[int], host: Host
) -> Placement:
    """The fewest experts, else the fewest layers, in the processor's memory so that the rest fits on the devices."""
    count = len(load.blocks)
    lean = count if _experts(load, count) else 0
    if lean:
        least = next((n for n in range(1, count + 1) if _spread(load, terms, devices, budgets, 0, n)), None)
        if least is not None:
            on_cards = _spread(load, terms, devices, budgets, 0, least)
            assert on_cards is not None
            return _beside(on_cards, load, host, 0, least)
    begin = next((n for n in range(1, count) if _spread(load, terms, devices, budgets, n, lean)), count)
    on_cards = _spread(load, terms, devices, budgets, begin, lean) if begin < count else Placement(())
    assert on_cards is not None
    return _beside(on_cards, load, host, begin, lean)


def _beside(on_cards: Placement, load: _Load, host: Host, begin: int, lean: int) -> Placement:
    """What is left for the processor: layers before `begin`, routed experts of the lean ones, the table of tokens."""
    layers = range(begin)
    head = 0 if on_cards.shares else load.last + load.first
    experts = sum(load.blocks[i].routed for i in range(begin, min(lean, len(load.blocks))))
    weights = sum(load.blocks[i].total for i in layers) + experts + head + load.table
    kept = sum(load.caches[i] for i in layers)
    read = sum(load.blocks[i].dense + round(load.blocks[i].routed * load.used) for i in layers)
    read += round(experts * load.used) + (load.read_last if head else 0)
    lacking = max(weights + kept - host.ram, 0)
    disk = min(lacking, weights) if host.disk else 0  # a cache is written to, and stays in memory
    parts = (Term("weights", weights - disk, "exact"), Term("cache", kept, "exact"))
    share = Share(_ram(host.ram), tuple(layers), parts, read, kept, host.ram)
    return Placement(
        on_cards.shares, share, disk, lacking - disk, experts_in_ram=_experts(load, lean),
        experts_layers=_experts(load, len(load.blocks)),
    )  # fmt: skip


def _forced(load: _Load, terms: tuple[Term, ...], devices: Sequence[Device], budgets: Sequence[int]) -> Placement:
    """Everything over all devices although it does not fit: by their sizes, to say what each would hold."""
    sizes, count = [max(budget, 1) for budget in budgets], len(load.blocks)
    ends = [round(count * sum(sizes[: i + 1]) / sum(sizes)) for i in range(len(sizes))]
    runs = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    used = [i for i, run in enumerate(runs) if run] or [0]
    shares = tuple(
        _share(
            load, terms, devices[i], budgets[i], runs[i], 0, load.first if i == used[0] else 0,
            load.last if i == used[-1] else 0,
        )
        for i in used
    )  # fmt: skip
    lacking = sum(share.total for share in shares) - sum(share.budget for share in shares)
    worst = max((-share.spare for share in shares), default=0)
    placement = Placement(shares, missing=max(lacking, worst, 1), experts_layers=_experts(load, count))
    return placement if not load.table else Placement(
        shares, _with_table(placement, load, ALONE).host, missing=placement.missing,
        experts_layers=placement.experts_layers,
    )  # fmt: skip


def _tensor(
    model: Model,
    precision: Precision,
    engine: Engine,
    load: _Load,
    terms: tuple[Term, ...],
    devices: Sequence[Device],
    budgets: Sequence[int],
) -> Placement:
    """A share of each layer on each of the largest devices that divide the heads, and what the engine computes with;
    groups of them one after the other.

    The widest cut that fits; where none does, the one that lacks least. Keys and values of a head are repeated where
    there are more devices than heads of them, a latent vector on each.
    """
    order = sorted(range(len(devices)), key=lambda i: -budgets[i])
    chosen: list[Placement] = []
    for tensor in range(len(devices), 0, -1):
        whole = engine.whole_parts is None or engine.whole_parts(model, precision, tensor)
        if tensor > 1 and not (whole and _divides(model, tensor)):
            continue
        for pipeline in range(1, len(devices) // tensor + 1):
            used = order[: tensor * pipeline]
            placement = _cut(model, load, terms, [devices[i] for i in used], min(budgets[i] for i in used), tensor)
            if placement.fits:
                return placement
            chosen.append(placement)
    return min(chosen, key=lambda placement: placement.missing)


def _divides(model: Model, tensor: int) -> bool:
    """Whether each device gets whole heads, of queries, and of keys or repeated ones."""
    if model.recurrent or model.config.get("is_encoder_decoder"):
        return tensor == 1 or model.fields.hidden % tensor == 0
    heads, kept = model.fields.heads, model.fields.kv_heads
    return heads % tensor == 0 and (kept % tensor == 0 or tensor % kept == 0)


def _cut(
    model: Model, load: _Load, terms: tuple[Term, ...], devices: Sequence[Device], budget: int, tensor: int
) -> Placement:
    """Layers in as many runs as there are groups of `tensor` devices, each cut into as many parts."""
    groups, count = len(devices) // tensor, len(load.blocks)
    latent = bool(model.fields.get("kv_lora_rank"))
    copies = 1 if latent else min(tensor, 1 if model.recurrent else model.fields.kv_heads)
    ends = [round(count * (i + 1) / groups) for i in range(groups)]
    shares = []
    for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        run = range(begin, end)
        first, last = (load.first if group == 0 else 0), (load.last if group == groups - 1 else 0)
        weights = (sum(load.blocks[i].total for i in run) + first + last) / tensor
        kept = sum(load.caches[i] for i in run) / copies
        read = sum(load.blocks[i].dense + load.blocks[i].routed * load.used for i in run)
        read = (read + (load.read_last if last else 0)) / tensor
        parts = (Term("weights", round(weights), "exact"), Term("cache", round(kept), "exact"), *terms)
        for device in devices[group * tensor : (group + 1) * tensor]:
            shares.append(Share(device, tuple(run), parts, round(read), round(kept), budget))
    missing = sum(max(-share.spare, 0) for share in shares)
    return Placement(tuple(shares), missing=missing, tensor=tensor, pipeline=groups)
