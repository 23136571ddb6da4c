"""The check behind `quantize`: what the folder that was just written lost, on a few thousand tokens, in a tenth of the
time that the run took.

The text is what calibration left of its own, else `heldout.txt` in the model's folder, else `check.txt`, which comes
with the package and was written for it; of encoders the built-in sentences. What is measured is what `eval` measures,
in the same way, on less text.

What is given up. In a tenth of a short run a large model is not even loaded: then nothing is measured, and what would
measure it is said. The float model has to be in memory in float32, which calibration avoids; where there is no room it
is left out as well. A check never fails a run: the folder is finished before it begins.
"""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spicerack.errors import SpicerackError, UsageError
from spicerack.evaluation.evaluate import HELDOUT, EvaluationOptions, Sides, compared
from spicerack.evaluation.figures import obstacle as obstacle_of
from spicerack.evaluation.folder import common_tokenizer
from spicerack.evaluation.reference import Pace, Text
from spicerack.evaluation.report import lens
from spicerack.machine.memory import anonymous_bytes, available_bytes
from spicerack.models.kind import kind_of, obstacle
from spicerack.models.opening import open_model, open_stored
from spicerack.storage import ledger
from spicerack.text.calibration import SPARE_LENGTH, SPARE_TOKENS

SHARE, LEAST_SECONDS = 0.1, 5.0
"""Of the run's time that a check may take, and seconds that it may take of the shortest run: the project's own model is
then read in full."""
_OURS = Path(__file__).with_name("check.txt")
_LOADED = 0.8e9
"""Bytes of float32 that are loaded in a second: .8 to 1.7 GB of a model of 400 M parameters in bfloat16 in the page
cache of a Cooper Lake machine of two cores."""
_BESIDE = 512 << 20
"""Bytes beside the weights: 8 million logits in float64 of two models, activations of a window, what malloc keeps."""
_FAILURES = (ImportError, MemoryError, OSError, RuntimeError, SpicerackError, TypeError, ValueError)
"""What a stranger's model may raise: the folder is written, and a check that fails must not look like a failed run."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a check measured, or why it did not.

    figures   those of `eval --json`, None where nothing was measured
    reason    why nothing was, a sentence without its end; None where it was
    command   what measures it, or more of it; None where nothing here does
    notes     what has to be said of the figures
    seconds   that it took
    """

    figures: Mapping[str, Any] | None
    reason: str | None
    command: str | None
    notes: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """By the names of the command line's contract."""
        told = {"skipped": self.reason} if self.figures is None else {**self.figures, "notes": list(self.notes)}
        return {**told, "command": self.command, "seconds": self.seconds}


def check(
    out: Path,
    source: Path,
    *,
    seconds: float,
    spare: torch.Tensor | None = None,
    memory: int | None = None,
    device: str = "cpu",
    kept: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Check:
    """Measure what the folder `out` lost, and keep it in its ledger; nothing is raised but what is nobody's.

    out, source   the folder that was just written, and the float model's
    seconds       that the run took, of which this may take a tenth, and 5 s at least
    spare         tokens of the calibration text that were not used, as `Calibration` has them
    memory        bytes that the process must not exceed; None: what the machine has
    device        where both models run
    kept          whether what an earlier check left in the ledger will do
    progress      called with what is being done and the share of it, 0 to 1
    """
    written = ledger.read(out) if kept else None
    if written is not None and written.check is not None and obstacle_of(written.check) is None:
        return Check(written.check, None, _command(out, source), (), 0.0)
    begin = time.monotonic()
    end = begin + max(SHARE * seconds, LEAST_SECONDS)
    figures, reason = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            lens.keep(out, source)  # which a page shows of every kind of model
            figures = _measured(out, source, end, spare, memory, device, progress or (lambda _doing, _share: None))
        except _FAILURES as error:
            reason = error.message if isinstance(error, SpicerackError) else str(error).strip().split("\n")[0]
            reason = reason or type(error).__name__
    if figures is not None:
        ledger.keep_check(out, figures)
    notes = tuple(str(warning.message) for warning in caught if warning.category is UserWarning)
    return Check(figures, reason, _command(out, source), notes, round(time.monotonic() - begin, 3))


def _measured(
    out: Path,
    source: Path,
    end: float,
    spare: torch.Tensor | None,
    memory: int | None,
    device: str,
    progress: Callable[[str, float], None],
) -> dict[str, Any]:
    """The figures; the rest is as `check` has it. Raises whatever `_FAILURES` names, UsageError where it cannot be."""
    kind = kind_of(open_stored(source).config, source)
    _refuse(out, source, end, memory, device)
    tokenizer = common_tokenizer(out, source, trust_remote_code=False)
    name, text = _text(source, spare) if kind == "decoder" else (None, None)
    sides = Sides(kind, out, source, tokenizer, text)
    options = EvaluationOptions(max_tokens=SPARE_TOKENS, device=device)
    figures = compared(sides, options, progress, pace=Pace(end, SPARE_LENGTH)).as_dict()
    return figures if name is None else {**figures, "text": name}


def _refuse(out: Path, source: Path, end: float, memory: int | None, device: str) -> None:
    """Raises UsageError where the float model has no room in memory, or would not be loaded in half of the time."""
    numbers = sum(info.numel for info in open_model(source).tensors.values())
    stored = sum(path.stat().st_size for path in open_stored(out).weight_files)
    needed = 4 * numbers + max(2 * numbers, stored) + _BESIDE
    room = _room(memory, device)
    if needed > room:
        raise UsageError(
            f"both models need {needed / 1e9:.1f} GB of memory, the original in float32, and there are "
            f"{room / 1e9:.1f}", "evaluate it on a larger machine",
        )  # fmt: skip
    loading, left = (6 * numbers + stored) / _LOADED, end - time.monotonic()
    if loading > left / 2:
        raise UsageError(
            f"a tenth of the run's time, {LEAST_SECONDS:.0f} s at least, is not enough: loading both models takes "
            f"{loading:.0f} s", "evaluate it apart",
        )  # fmt: skip


def _room(memory: int | None, device: str) -> float:
    """Bytes that there are for both models."""
    where = torch.device(device)
    if where.type == "cuda":
        return float(torch.cuda.mem_get_info(where)[0])
    free = available_bytes()
    return free if memory is None else min(free, memory - (anonymous_bytes() or 0))


def _text(source: Path, spare: torch.Tensor | None) -> tuple[str, Text]:
    """What a decoder reads, and what that is called."""
    if spare is not None and len(spare) > 1:
        return "what calibration left of its text", spare
    if (source / HELDOUT).is_file():
        return HELDOUT, source / HELDOUT
    return "the text that comes with spicerack", _OURS


def _command(out: Path, source: Path) -> str | None:
    """What measures all of it; None where `eval` would refuse the kind of model."""
    config = open_stored(source).config
    if obstacle(config) is not None:
        return None
    own = (source / HELDOUT).is_file() or kind_of(config, source) == "encoder"
    return shlex.join(["spicerack", "eval", str(out), "--against", str(source), *([] if own else ["--text", "FILE"])])
