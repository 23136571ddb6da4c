"""What models are calibrated with and judged on in the benchmarks of quality."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from spicerack.models.bundled import language_model
from spicerack.runtime.load import load
from spicerack.text import calibration, generated
from spicerack.text.calibration import Calibration

_CALIBRATION, _HELDOUT = "calibration.txt", "heldout.txt"
_JUDGED = 256, 2
"""Sequences that a model writes to be judged on, and their seed; 0 is that of calibration."""


def of_decoder(folder: Path, work: Path, samples: int, length: int) -> tuple[Calibration, Path]:
    """Calibration, and another text: those in the folder, or else what the model itself writes, kept in `work`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / _CALIBRATION).is_file():
        found = calibration.read(folder / _CALIBRATION, tokenizer, samples=samples, length=length, seed=0)
        return found, folder / _HELDOUT
    model = load(folder)
    count, seed = _JUDGED
    found, judged = (
        generated.from_model(model, tokenizer, samples=how_many, length=length, seed=drawn)
        for how_many, drawn in ((samples, 0), (count, seed))
    )
    (work / _HELDOUT).write_text("\n".join(tokenizer.batch_decode(judged.ids, skip_special_tokens=True)))
    return found, work / _HELDOUT


def of_encoder(folder: Path, samples: int, length: int) -> Calibration:
    """Lines of the language model's calibration text."""
    return calibration.read(
        language_model() / _CALIBRATION, AutoTokenizer.from_pretrained(folder), samples=samples, length=length, seed=0,
        kind="encoder",
    )  # fmt: skip
