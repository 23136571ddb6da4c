"""What is asked for with a budget, and all of it that is known before a weight is read, with the refusals that are."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spicerack._version import __version__
from spicerack.algorithms.method import Method
from spicerack.errors import UsageError, counted
from spicerack.evaluation.encoder import Pooling
from spicerack.evaluation.evaluate import HELDOUT
from spicerack.evaluation.folder import pooling_of, window_of
from spicerack.models.blocks.find import find
from spicerack.models.inputs import limits
from spicerack.models.kind import kind_of
from spicerack.planning.mix import units
from spicerack.planning.mix.estimate import Losses
from spicerack.planning.mix.judge import Judge, beside, split
from spicerack.planning.mix.mixer import Chosen, Fixed, Mixer, Sizes, solved
from spicerack.planning.mix.units import Choices
from spicerack.planning.sensitivity import VERSION, Budget, Metric, Option, Sensitivity, Unit
from spicerack.quantization import job as jobs
from spicerack.quantization.calibration.targets import tensors_of
from spicerack.quantization.decisions import Source
from spicerack.quantization.job import Job
from spicerack.quantization.recipe import Recipe, decided
from spicerack.quantization.rotation import original
from spicerack.quantization.stream import Means
from spicerack.runtime.load import load_apart
from spicerack.storage.durable import json_bytes
from spicerack.storage.reader import Checkpoint
from spicerack.storage.writer import SHARD_BYTES, header_bytes, refuse_place
from spicerack.text.calibration import Calibration
from spicerack.text.tokenizer import read_tokenizer


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for.

    model        folder, or hub id
    output       folder to write
    budget       in place of a scheme
    recipe       rules, method, range and engine; its scheme is of no account
    effort       what may be spent on codes where no method is named
    text         calibration text; a quarter of it at most judges, where the model's folder has no text for that
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
    method    how codes are chosen, transforms and all
    listing   what would be quantized, in whatever scheme, by the method's solver alone: estimates are of the model as
              it is
    choices   units and their schemes
    fixed     what rules quantize beside them
    text      for calibration
    judge     with the text that nothing else sees
    notes     what a person should know
    """

    order: Order
    method: Method
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
            "version": VERSION,
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
        whole = decided(dataclasses.replace(recipe, method=self.method), True)
        return jobs.prepare(self.order.model, whole, with_text=True, shard_bytes=self.order.shard_bytes)

    def sizes(self, chosen: Chosen) -> Sizes:
        """What a mix weighs."""
        job = self.job(chosen)
        headers = sum(len(header_bytes(shard)) for shard in job.shards)
        return Sizes(job.bytes_after + headers, job.bytes_after, job.sizes().bits_per_weight)


def prepare(order: Order) -> Prepared:
    """All that can be refused before weights are read.

    Raises UsageError for a bound on KL of an encoder, an effort, several processes, an output that cannot be made, or a
    model without a choice; what `job.prepare` raises; TextError for a text that is too short.
    """
    if order.means.ranks.count > 1:
        raise UsageError("a budget is searched for by one process", "run it without torchrun, or name a scheme")
    refuse_place(order.output)
    if order.effort != "normal":
        raise UsageError(
            f"effort {order.effort}: a budget mixes schemes, and no way to learn codes is the best for all",
            "--method signround or blockap learns them",
        )
    whole = decided(units.listing(order.recipe), True)
    method = whole.method or Method()
    alone = dataclasses.replace(whole, method=Method(solver=method.solver))
    listing = jobs.prepare(order.model, alone, with_text=True, shard_bytes=order.shard_bytes)
    source = original(listing.source)
    encoder = kind_of(source.config, source.folder) == "encoder"
    if encoder and order.budget.kind == "max_kl":
        raise UsageError(
            f"{source.folder} is an encoder: it predicts nothing that a KL could be of",
            "--max-loss bounds what its embeddings lose, 1 - cosine",
        )
    model, experts = load_apart(source)
    text, held_out = _texts(order.text, source, model, encoder=encoder)
    reached = [target.tensor for block in tensors_of(find(model), experts, listing) for target in block.targets]
    census = Source.of(listing.source).census
    choices = units.choices(listing, census.shared_inputs, reached, order.recipe.for_)
    pooling: Pooling | None = pooling_of(source.folder) if encoder else None
    count, length = held_out.ids.shape
    notes = (
        *choices.notes, *text.notes,
        f"judged on {counted(count, 'sequence')} of {held_out.source}, {length} tokens each, not calibrated with",
    )  # fmt: skip
    judge = Judge(source.folder, held_out, pooling, order.means.device)
    prepared = Prepared(order, method, listing, choices, _fixed(listing, choices), text, judge, notes)
    _refuse_small(prepared)
    return prepared


def _texts(
    text: Calibration, source: Checkpoint, model: PreTrainedModel, *, encoder: bool
) -> tuple[Calibration, Calibration]:
    """The text for calibration, and that for judging: of a language model the one in its folder, if there is one."""
    folder = source.folder
    if not encoder and (folder / HELDOUT).is_file():
        window = window_of(None, limits(model, model.config), folder)
        apart = beside(folder, read_tokenizer(folder, model.config), window)
        if apart is not None:
            return text, apart
    return split(text)


def _refuse_small(prepared: Prepared) -> None:
    """Raise UsageError for a budget of bytes or bits below the smallest mix, and where the engine does not take it."""
    budget = prepared.order.budget
    known = estimated(prepared, {})
    mixer = Mixer(known, prepared.fixed)
    prepared.job(mixer.cheapest())
    if budget.kind in ("size", "bits"):
        solved(mixer, budget, prepared.sizes)


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


def estimated(prepared: Prepared, losses: Losses) -> Sensitivity:
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
    metric: Metric = "kl" if prepared.judge.pooling is None else "cosine"
    return Sensitivity(metric, prepared.identity, fixed, tuple(found))
