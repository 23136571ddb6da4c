"""`quantize` with a budget in place of a scheme: from a model and a text to the folder of the mix that it buys.

    prepare    what is quantized, in which units and schemes; the text for calibration and that for judging
    known      what every unit loses in every scheme: measured, or taken over from a folder beside the output
    search     rounds of mixes that are written and measured
    publish    the best becomes the output, with `sensitivity.json` and the budget in its ledger

Everything on the way lies in `OUT.budget`, beside the output: blocks that are estimated, what is known, mixes that are
written. The same command goes on there. Estimates depend on model, text, method and schemes, and not on the budget: a
run with another one takes them from any folder beside its output that has them, and is done in the time that mixes
take to write.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spicerack._version import __version__
from spicerack.errors import CheckpointError, OutputError, UsageError
from spicerack.evaluation.encoder import Pooling
from spicerack.evaluation.folder import pooling_of
from spicerack.models.blocks.find import find
from spicerack.models.kind import kind_of
from spicerack.planning import sensitivity
from spicerack.planning.mix import units
from spicerack.planning.mix.estimate import Losses, estimate
from spicerack.planning.mix.fisher import TOKENS, Fisher, fisher
from spicerack.planning.mix.judge import Judge, split
from spicerack.planning.mix.search import Chosen, Fixed, Hands, Mixer, Sizes, Written, kind, search, solved
from spicerack.planning.mix.units import Choices
from spicerack.planning.sensitivity import Budget, Option, Sensitivity, Unit
from spicerack.quantization import job as jobs
from spicerack.quantization import run as quantizing
from spicerack.quantization.calibration.chunks import Text
from spicerack.quantization.calibration.targets import tensors_of
from spicerack.quantization.decisions import Source
from spicerack.quantization.job import Job
from spicerack.quantization.recipe import Recipe, decided
from spicerack.quantization.rotation import original
from spicerack.quantization.run import Summary
from spicerack.quantization.stream import Means, plan
from spicerack.quantization.watch import Watch
from spicerack.runtime.load import load_apart
from spicerack.storage import ledger
from spicerack.storage.durable import json_bytes, locked, read_json, sync, write_atomically
from spicerack.storage.files import LEDGER, RUN, SENSITIVITY
from spicerack.storage.writer import SHARD_BYTES, header_bytes, refuse_place
from spicerack.text.calibration import Calibration

_SIBLINGS = 1000
"""Folders beside the output that are looked into for estimates."""
_SWAPPED = 48
"""Units above which a few of each kind are measured around a mix, and the others get their kind's factor."""
_DEPTHS = 3
"""Of each kind that are then measured: the first, the middle one and the last."""

_OTHER = "choose another output folder, or remove that one"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for.

    model        folder, or hub id
    output       folder to write
    budget       in place of a scheme
    recipe       rules, method, range and engine; its scheme is of no account
    effort       what may be spent on codes where no method is named
    text         calibration text; a quarter of it at most judges
    means        what the run may use
    shard_bytes  the largest file to write
    """

    model: str | Path
    output: Path
    budget: Budget
    recipe: Recipe
    effort: str
    text: Calibration
    means: Means
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before a weight is read.

    order     what was asked for
    listing   what would be quantized, in whatever scheme
    choices   units and their schemes
    fixed     what rules quantize beside them
    text      for calibration
    judge     with the text that nothing else sees
    notes     what a person should know
    """

    order: Order
    listing: Job
    choices: Choices
    fixed: Fixed
    text: Calibration
    judge: Judge
    notes: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """Facts that estimates depend on."""
        recipe = self.listing.recipe
        assert recipe.method is not None, "decided before work starts"
        parts = [[*unit.tensors, *(scheme.name for scheme in unit.schemes)] for unit in self.choices.units]
        return {
            "version": sensitivity.VERSION,
            "source": self.listing.source.fingerprint(),
            "calibration": {"text": self.text.sha256, "tokens": self.text.fingerprint},
            "method": str(recipe.method),
            "range": recipe.range_,
            "units": hashlib.sha256(json_bytes(parts)).hexdigest(),
            "versions": {"spicerack": __version__, "torch": torch.__version__},
        }  # fmt: skip

    def job(self, chosen: Chosen) -> Job:
        """A mix, decided. Raises UsageError of all kinds for what the engine does not compute."""
        recipe = units.recipe_of(self.order.recipe, self.choices, chosen)
        whole = dataclasses.replace(recipe, method=self.listing.recipe.method)
        return jobs.prepare(self.order.model, whole, with_text=True, shard_bytes=self.order.shard_bytes)

    def sizes(self, chosen: Chosen) -> Sizes:
        """What a mix weighs."""
        job = self.job(chosen)
        headers = sum(len(header_bytes(shard)) for shard in job.shards)
        return Sizes(job.bytes_after + headers, job.bytes_after, job.sizes().bits_per_weight)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: the run's summary, and all that is known of the model's parts."""

    summary: Summary
    known: Sensitivity

    def as_dict(self) -> dict[str, Any]:
        """By the names of the command line's contract: the summary's, and `budget`."""
        return {**self.summary.as_dict(), "budget": _record(self.known)}


def prepare(order: Order) -> Prepared:
    """All that can be refused before weights are read.

    Raises UsageError for a bound on KL of an encoder, several processes, an output that cannot be made, or a model
    without a choice; what `job.prepare` raises; TextError for a text that is too short.
    """
    if order.means.ranks.count > 1:
        raise UsageError("a budget is searched for by one process", "run it without torchrun, or name a scheme")
    refuse_place(order.output)
    whole = decided(units.listing(order.recipe), True, order.effort)
    listing = jobs.prepare(order.model, whole, with_text=True, shard_bytes=order.shard_bytes)
    source = original(listing.source)
    encoder = kind_of(source.config, source.folder) == "encoder"
    if encoder and order.budget.kind == "max_kl":
        raise UsageError(
            f"{source.folder} is an encoder: it predicts nothing that a KL could be of",
            "--max-loss bounds what its embeddings lose, 1 - cosine",
        )
    text, held_out = split(order.text)
    model, experts = load_apart(source)
    reached = [target.tensor for block in tensors_of(find(model), experts, listing) for target in block.targets]
    census = Source.of(listing.source).census
    choices = units.choices(listing, census.shared_inputs, reached, order.recipe.for_)
    pooling: Pooling | None = pooling_of(source.folder) if encoder else None
    count, length = held_out.ids.shape
    notes = (
        *choices.notes, *text.notes,
        f"judged on {count} of the text's sequences, {length} tokens each, which nothing else sees",
    )  # fmt: skip
    judge = Judge(source.folder, held_out, pooling, order.means.device)
    prepared = Prepared(order, listing, choices, _fixed(listing, choices), text, judge, notes)
    _refuse_small(prepared)
    return prepared


def _refuse_small(prepared: Prepared) -> None:
    """Raise UsageError for a budget of bytes or bits below the smallest mix, and where the engine does not take it."""
    budget = prepared.order.budget
    known = _unknown(prepared, {})
    mixer = Mixer(known, prepared.fixed)
    prepared.job(mixer.cheapest())
    if budget.kind in ("size", "bits"):
        solved(mixer, budget, prepared.sizes)


def run(prepared: Prepared, watch: Watch, tell: Tell) -> Outcome:
    """Estimate, search and publish. watch: of every stage that runs a model. tell: is called with sentences.

    Raises what a run raises; UsageError for a bound that no mix keeps; OutputError for an output that is there and is
    another run's. KeyboardInterrupt where the watch asks for it; the same call goes on there.
    """
    order, identity = prepared.order, prepared.identity
    if order.output.exists():
        return _already_there(prepared, watch)
    with _workshop(order.output, identity) as workshop:
        known = _known(prepared, identity, workshop, watch, tell)
        hands = _hands(prepared, workshop, watch, tell)
        known, best = search(known, prepared.fixed, order.budget, hands)
        known.write(best.folder)
        summary = _publish(prepared, known, best, watch)
    return Outcome(summary, known)


# ---- what is known ---------------------------------------------------------------------------------------------------


def _known(prepared: Prepared, identity: Mapping[str, Any], workshop: Path, watch: Watch, tell: Tell) -> Sensitivity:
    """Estimates of all units: those of a folder beside the output, or made now."""
    for folder in (workshop, *_beside(prepared.order.output)):
        try:
            there = sensitivity.read(folder)
        except CheckpointError:  # somebody else's, or damaged: it is made anew
            continue
        if there is not None and dict(there.identity) == dict(identity):
            tell(f"sensitivity is that of {folder}" if folder != workshop else "sensitivity is known already")
            return _estimates(there)
    losses = _measured(prepared, workshop, watch, tell)
    known = _unknown(prepared, losses)
    known.write(workshop)
    return known


def _beside(output: Path) -> Iterator[Path]:
    """Folders beside the output that have estimates."""
    parent = output.absolute().parent
    names = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())[:_SIBLINGS] if parent.is_dir() else []
    return (parent / name for name in names)


def _estimates(there: Sensitivity) -> Sensitivity:
    """What a pass found, without what a budget made of it."""
    found = tuple(
        dataclasses.replace(unit, chosen="", schemes={
            name: dataclasses.replace(option, loss=option.estimate) for name, option in unit.schemes.items()
        })
        for unit in there.units
    )  # fmt: skip
    return dataclasses.replace(there, units=found, budget=None, curve=(), rounds=())


def _measured(prepared: Prepared, workshop: Path, watch: Watch, tell: Tell) -> Losses:
    """One pass for what the output minds, and one for what codes lose."""
    order, listing = prepared.order, prepared.listing
    model, experts = load_apart(original(listing.source))
    stack = find(model)
    tensors = tensors_of(stack, experts, listing)
    folder = workshop / "estimates"
    folder.mkdir(exist_ok=True)
    device = order.means.device
    minds = _read_fishers(folder)
    if minds is None:
        tell(f"one pass backwards through the float model, {TOKENS:,} tokens")
        minds = fisher(
            stack, tensors, prepared.text, folder, device, prepared.judge.pooling, lambda _what, _share: None
        )
        _write_fishers(folder, minds)
    count = max(len(unit.schemes) for unit in prepared.choices.units)
    tell(f"what {len(prepared.choices.units)} units lose in up to {count} schemes: each is solved for every layer")
    text = Text(prepared.text, plan(listing, prepared.text, order.means.memory).sequences)
    losses = estimate(
        listing, stack, tensors, prepared.choices.units, minds, text, folder, device, order.means.workers, watch
    )
    shutil.rmtree(folder)
    return losses


def _write_fishers(folder: Path, minds: list[Fisher]) -> None:
    record = [{path: values.tolist() for path, values in block.items()} for block in minds]
    write_atomically(folder / "fisher.json", json_bytes(record))


def _read_fishers(folder: Path) -> list[Fisher] | None:
    record = read_json(folder / "fisher.json")
    if record is None:
        return None
    return [
        {path: torch.tensor(values, dtype=torch.float32, device="cpu") for path, values in block.items()}
        for block in record
    ]


def _unknown(prepared: Prepared, losses: Losses) -> Sensitivity:
    """The units with these losses, 0 where there are none."""
    choices, found = prepared.choices, []
    for unit in choices.units:
        options = {}
        for scheme in unit.schemes:
            loss = sum(losses.get(tensor, {}).get(scheme.name, 0.0) for tensor in unit.tensors)
            options[scheme.name] = Option(choices.nbytes[unit.name][scheme.name], unit.bits(scheme), loss, loss)
        found.append(Unit(unit.name, unit.tensors, unit.weights, options))
    own = {tensor for unit in choices.units for tensor in unit.tensors}
    fixed = sum(t.nbytes for action in prepared.listing.actions if action.info.name not in own for t in action.tensors)
    metric: sensitivity.Metric = "kl" if prepared.judge.pooling is None else "cosine"
    return Sensitivity(metric, prepared.identity, fixed, tuple(found))


def _fixed(listing: Job, choices: Choices) -> Fixed:
    """What rules quantize, and the largest float that one could."""
    own = {tensor for unit in choices.units for tensor in unit.tensors}
    ruled = [a.stored for a in listing.actions if a.stored is not None and a.info.name not in own]
    floats = [a for a in listing.actions if a.stored is None and a.role in ("embedding", "head") and a.tensors]
    largest = max(floats, key=lambda action: action.info.nbytes, default=None)
    return Fixed(
        sum(one.scheme.stored_bits(one.shape) for one in ruled),
        sum(torch.Size(one.shape).numel() for one in ruled),
        None if largest is None else (largest.info.name.removesuffix(".weight"), largest.info.nbytes),
    )


# ---- what is written -------------------------------------------------------------------------------------------------


def _hands(prepared: Prepared, workshop: Path, watch: Watch, tell: Tell) -> Hands:
    """Those that write into the workshop."""

    def write(chosen: Chosen) -> Path:
        job = prepared.job(chosen)
        folder = workshop / f"mix-{hashlib.sha256(json_bytes(job.recipe.as_dict())).hexdigest()[:12]}"
        _write(prepared, job, folder, watch)
        return folder

    def swaps(folder: Path) -> Mapping[str, float] | None:
        method = prepared.listing.recipe.method
        if method is not None and (method.transforms or method.rotation):  # a layer alone has other weights then
            return None
        few = dataclasses.replace(prepared.text, ids=prepared.text.ids[: _sequences(prepared)])
        if prepared.text.mask is not None:
            few = dataclasses.replace(few, mask=prepared.text.mask[: len(few.ids)])
        some = _some(prepared.choices)
        tell(f"expected and measured differ: {len(some)} units are measured around the mix")
        return prepared.judge.swaps(folder, some, few, lambda _: None)

    return Hands(prepared.sizes, write, lambda folder: prepared.judge.measure(folder, lambda _: None), swaps, tell)


def _write(prepared: Prepared, job: Job, folder: Path, watch: Watch) -> Summary:
    """Write a mix, or find it written."""
    order = prepared.order
    notes = (*prepared.notes, *quantizing.notes(job, prepared.text, order.recipe, order.effort))
    summary = quantizing.execute(job, folder, calibration=prepared.text, means=order.means, watch=watch, notes=notes)
    assert summary is not None, "this is the only process"
    return summary


def _sequences(prepared: Prepared) -> int:
    """Of the calibration text, on which swaps are measured: as many tokens as the pass backwards had."""
    return max(TOKENS // prepared.text.ids.shape[1], 1)


def _some(choices: Choices) -> list[units.Choice]:
    """Units that are measured: all of a small model, of a large one a few of each kind."""
    if len(choices.units) <= _SWAPPED:
        return list(choices.units)
    kinds: dict[str, list[units.Choice]] = {}
    for unit in choices.units:
        kinds.setdefault(kind(unit.name), []).append(unit)
    some: dict[str, units.Choice] = {}
    for kind_ in kinds.values():
        places = {round(i * (len(kind_) - 1) / (_DEPTHS - 1)) for i in range(_DEPTHS)}
        some |= {kind_[place].name: kind_[place] for place in places}
    return list(some.values())


def _publish(prepared: Prepared, known: Sensitivity, best: Written, watch: Watch) -> Summary:
    """Let the best mix appear as the output, and remove the others."""
    output = prepared.order.output
    summary = _write(prepared, prepared.job(best.chosen), best.folder, watch)
    written = ledger.read(best.folder)
    assert written is not None, "quantized just now"
    write_atomically(best.folder / LEDGER, dataclasses.replace(written, budget=_record(known)).content())
    record = read_json(best.folder / RUN)
    record = {**(record if isinstance(record, dict) else {}), "output": str(output)}
    write_atomically(best.folder / RUN, json_bytes(record))
    sync(best.folder)
    best.folder.replace(output)
    sync(output.absolute().parent)
    return dataclasses.replace(
        summary, output=output, already_there=False, seconds=record.get("seconds", summary.seconds),
        output_error=record.get("output_error"), output_error_rounded=record.get("output_error_rounded"),
    )  # fmt: skip


def _record(known: Sensitivity) -> dict[str, Any]:
    """What the ledger says of a budget."""
    assert known.budget is not None, "searched for"
    return {
        **dataclasses.asdict(known.budget), "metric": known.metric,
        "rounds": [dataclasses.asdict(one) for one in known.rounds],
    }  # fmt: skip


def _already_there(prepared: Prepared, watch: Watch) -> Outcome:
    """The outcome of an earlier call of the same. Raises OutputError for an output that is anything else."""
    output = prepared.order.output
    there = sensitivity.read(output)
    same = there is not None and dict(there.identity) == prepared.identity and there.budget == prepared.order.budget
    if there is None or not same:
        raise OutputError(
            f"{output} is there, from another command", "choose another output folder, or remove that one"
        )
    job = prepared.job({unit.name: unit.chosen for unit in there.units})
    return Outcome(_write(prepared, job, output, watch), there)


@contextmanager
def _workshop(output: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """The folder beside the output where all of it lies until then; removed behind a run that came to its end.

    What another model, text or method left there is removed first; another budget's mixes are of use. Raises
    OutputError while another process works there.
    """
    workshop = output.with_name(f"{output.name}.budget")
    try:
        workshop.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{workshop} cannot be made: {error.strerror}", "choose another output folder") from error
    lock = locked(workshop)
    try:
        if read_json(workshop / "identity.json") != identity:
            for entry in workshop.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
            (workshop / SENSITIVITY).unlink(missing_ok=True)
            write_atomically(workshop / "identity.json", json_bytes(dict(identity)))
        yield workshop
        shutil.rmtree(workshop)
    finally:
        os.close(lock)
