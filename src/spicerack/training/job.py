"""What a run is asked to do: everything that is knowable before a text is read or a weight is computed with.

    TrainOptions (names and paths) -> prepare -> Job (opened, checked) -> run

What cannot be, or would have no effect, is refused here by name, before anything is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from spicerack._version import __version__
from spicerack.errors import UsageError
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import recipe
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.storage.reader import Checkpoint
from spicerack.training.qat.start import QATConfig, Stored
from spicerack.training.settings import Settings
from spicerack.training.start import Start, Twin, find_start, find_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What a run is asked to do with a model, as somebody says it: names and paths, nothing opened or checked yet.

    data         text to learn from, as for calibration: a file, JSON lines, a folder, a dataset
    scheme, rules, config   as for `prepare_qat`; without a scheme a float model trains in float, to compare with
    settings     steps, rates, batch ...
    teacher      a folder or hub id whose predictions are learned; None: the text alone
    predictions  a folder to keep these in, for other runs too; None: they are not kept
    held_out     text to measure on; None: one row of `data` in a hundred is held out
    tokenizer    folder, for a config.json; None: that of the config
    twin         turns a Llama into BitNet's classes; None: it stays what it is
    scales_only  of a quantized folder: no code changes
    """

    data: str | Path
    scheme: str | Scheme | Recipe | None = None
    rules: Iterable[str | Rule] = ()
    config: QATConfig
    settings: Settings
    teacher: str | Path | None = None
    predictions: str | Path | None = None
    held_out: str | Path | None = None
    tokenizer: str | Path | None = None
    twin: Twin | None = None
    scales_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, fully named and checked. Raises UsageError for what contradicts itself or would have no effect.

    output        folder that the trained model becomes
    recipe        which layers are rounded, and to what; None: as `start` is, quantized or float
    start         the model that it begins with
    teacher       whose predictions are learned; None: the text alone
    settings      how it trains
    config        how weights are rounded, as given: what type scales are stored in is `rounding`'s to say
    scales_only   of a quantized model: no code changes
    data, held_out   text to learn from and to measure on; None: a part of `data`
    predictions   folder to keep the teacher's predictions in; None: they are not kept
    """

    output: Path
    recipe: Recipe | None
    start: Start
    teacher: Checkpoint | None
    settings: Settings
    config: QATConfig
    scales_only: bool
    data: str | Path
    held_out: str | Path | None
    predictions: Path | None

    def __post_init__(self) -> None:
        if self.scales_only:
            self._check_scales_only()
        # where codes stay, or all is float, nothing of a QATConfig could have an effect
        rounds_anew = self.recipe is not None or (self.start.packed and not self.scales_only)
        if not rounds_anew and dataclasses.replace(self.config, stored=None) != QATConfig():
            raise UsageError(
                "nothing is rounded anew, however it is configured", "name a scheme, or train weights as well"
            )
        longest, length = self.start.longest, self.settings.length
        if longest is not None and length > longest:
            raise UsageError(f"length {length}: the model has {longest} positions", f"use {longest} or less")
        if self.teacher is None and self.predictions is not None:
            raise UsageError("there is no teacher whose predictions are kept", "name one")

    def _check_scales_only(self) -> None:
        """Codes stay, so they must be there, and nothing but scales has a rate."""
        if not self.start.packed:
            raise UsageError(f"{self.start.name} is not quantized: its scales cannot train alone", "quantize it first")
        if self.settings.embedding_lr is not None:
            raise UsageError("embeddings do not train where scales do alone", "leave embedding_lr out")

    @property
    def quantizes(self) -> bool:
        """Whether what comes out is quantized; a run in float is a control, to tell training's gain from the text's."""
        return self.start.packed or self.recipe is not None

    @property
    def stored(self) -> Stored:
        """Float type that the folder's float tensors and scales are stored in: as asked for, else as the source's."""
        return self.settings.dtype or self.start.dtype

    @property
    def rounding(self) -> QATConfig:
        """How weights are rounded while they train, with scales in the type that they are stored in."""
        return dataclasses.replace(self.config, stored=self.stored)

    def identity(self, processes: int) -> dict[str, Any]:
        """What must be the same for a run to continue, as JSON: all that its bytes depend on.

        Texts are named and not hashed: what was packed of them is kept, and is what a resumed run reads.
        """
        return {
            "model": self.start.identity,
            "recipe": None if self.recipe is None else self.recipe.as_dict(),
            "qat": asdict(self.rounding) | {"scales_only": self.scales_only},
            "settings": asdict(self.settings),
            "data": str(self.data),
            "held_out": None if self.held_out is None else str(self.held_out),
            "teacher": None if self.teacher is None else self.teacher.fingerprint(),
            "processes": processes,
            "versions": {
                "spicerack": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def prepare(model: str | Path, output: Path, options: TrainOptions) -> Job:
    """The job of training `model` as asked: the model's and the teacher's headers are read, the recipe is made.

    model: a folder or hub id, or a config.json, for random weights. output: the folder that the trained model becomes.
    Raises UsageError and its kinds (RecipeError, SchemeError, CheckpointError) for what cannot be found or done.
    """
    start = find_start(model, tokenizer=options.tokenizer, twin=options.twin)
    return Job(
        output=output,
        recipe=None if options.scheme is None else recipe.of(options.scheme, options.rules),
        settings=options.settings,
        config=options.config,
        start=start,
        teacher=None if options.teacher is None else find_teacher(options.teacher, start),
        scales_only=options.scales_only,
        data=options.data,
        held_out=options.held_out,
        predictions=None if options.predictions is None else Path(options.predictions),
    )
