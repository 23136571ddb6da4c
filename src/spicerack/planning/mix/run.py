"""`quantize` with a budget in place of a scheme: from a model and a text to the folder of the mix that it buys.

    order.prepare   what is quantized, in which units and schemes; the text for calibration and that for judging
    known           what every unit loses in every scheme: measured, or taken over from a folder beside the output
    search          rounds of mixes that are written and measured
    publish         the best becomes the output, with `sensitivity.json` and the budget in its ledger

Everything on the way lies in `OUT.budget`, beside the output: blocks that are estimated, what is known, mixes that are
written. The same command goes on there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spicerack.algorithms import solver as solvers
from spicerack.errors import OutputError, counted
from spicerack.evaluation.report import lens
from spicerack.planning import sensitivity
from spicerack.planning.mix import units
from spicerack.planning.mix.fisher import TOKENS
from spicerack.planning.mix.known import Tell, known
from spicerack.planning.mix.mixer import Chosen
from spicerack.planning.mix.order import Prepared
from spicerack.planning.mix.search import Hands, Written, kind, search
from spicerack.planning.mix.units import Choices
from spicerack.planning.sensitivity import Sensitivity
from spicerack.quantization import run as quantizing
from spicerack.quantization.job import Job
from spicerack.quantization.run import Summary
from spicerack.quantization.watch import Watch
from spicerack.storage import ledger
from spicerack.storage.durable import json_bytes, locked, read_json, sync, write_atomically
from spicerack.storage.files import LEDGER, RUN, SENSITIVITY

_SWAPPED = 48
"""Units above which a few of each kind are measured around a mix, and the others get their kind's factor."""
_DEPTHS = 3
"""Of each kind that are then measured: the first, the middle one and the last."""
_OTHER = "choose another output folder, or remove that one"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: the run's summary, and all that is known of the model's parts."""

    summary: Summary
    known: Sensitivity

    def as_dict(self) -> dict[str, Any]:
        """By the names of the command line's contract: the summary's, and `budget`."""
        return {**self.summary.as_dict(), "budget": _record(self.known)}


def run(prepared: Prepared, watch: Watch, tell: Tell) -> Outcome:
    """Estimate, search and publish. watch: of every stage that runs a model. tell: is called with sentences.

    Raises what a run raises; UsageError for a bound that no mix keeps; OutputError for an output that is there and is
    another run's. KeyboardInterrupt where the watch asks for it; the same call goes on there.
    """
    begin, order, identity = time.monotonic(), prepared.order, prepared.identity
    if order.output.exists():
        return _already_there(prepared, watch)
    with _workshop(order.output, identity) as workshop:
        estimates = known(prepared, identity, workshop, watch, tell)
        hands = _hands(prepared, workshop, watch, tell)
        found, best = search(estimates, prepared.fixed, order.budget, hands)
        found.write(best.folder)
        summary = _publish(prepared, found, best, watch)
    return Outcome(dataclasses.replace(summary, seconds=round(time.monotonic() - begin, 3)), found)


def _hands(prepared: Prepared, workshop: Path, watch: Watch, tell: Tell) -> Hands:
    """Those that write into the workshop."""

    def write(chosen: Chosen) -> Path:
        job = prepared.job(chosen)
        folder = workshop / f"mix-{hashlib.sha256(json_bytes(job.recipe.as_dict())).hexdigest()[:12]}"
        _write(prepared, job, folder, watch)
        return folder

    def swaps(folder: Path) -> Mapping[str, float] | None:
        if prepared.method.transforms:  # a layer alone has other weights then
            return None
        if solvers.get(prepared.method.solver).needs != "nothing":
            # later layers make up for what earlier ones lose, and go on doing so where there is nothing to make up for:
            # by swaps the first blocks hardly matter, and mixes chosen so lose up to twice as much
            return None
        few = dataclasses.replace(prepared.text, ids=prepared.text.ids[: _sequences(prepared)])
        if prepared.text.mask is not None:
            few = dataclasses.replace(few, mask=prepared.text.mask[: len(few.ids)])
        some = _some(prepared.choices)
        tell(f"expected and measured differ: measuring {counted(len(some), 'unit')} around the mix")
        return prepared.judge.swaps(folder, some, few, lambda _: None)

    return Hands(
        prepared.sizes, write, lambda folder: prepared.judge.measure(folder, lambda _: None),
        lambda folder: shutil.rmtree(folder, ignore_errors=True), swaps, tell,
    )  # fmt: skip


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


def _publish(prepared: Prepared, found: Sensitivity, best: Written, watch: Watch) -> Summary:
    """Let the best mix appear as the output, and remove the others."""
    output = prepared.order.output
    summary = _write(prepared, prepared.job(best.chosen), best.folder, watch)
    written = ledger.read(best.folder)
    assert written is not None, "quantized just now"
    write_atomically(best.folder / LEDGER, dataclasses.replace(written, budget=_record(found)).content())
    lens.keep(best.folder, prepared.listing.source.folder)
    record = read_json(best.folder / RUN)
    record = {**(record if isinstance(record, dict) else {}), "output": str(output)}
    write_atomically(best.folder / RUN, json_bytes(record))
    sync(best.folder)
    best.folder.replace(output)
    sync(output.absolute().parent)
    return dataclasses.replace(
        summary, output=output, already_there=False, output_error=record.get("output_error"),
        output_error_rounded=record.get("output_error_rounded"),
    )  # fmt: skip


def _record(found: Sensitivity) -> dict[str, Any]:
    """What the ledger says of a budget."""
    assert found.budget is not None, "searched for"
    return {
        **dataclasses.asdict(found.budget), "metric": found.metric,
        "rounds": [dataclasses.asdict(one) for one in found.rounds],
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
