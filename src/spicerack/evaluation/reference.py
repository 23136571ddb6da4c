"""The float model of a comparison, and how long one may take: what `eval` and the check behind `quantize` share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.errors import SpicerackError, UsageError, listed
from spicerack.evaluation import encoder, language
from spicerack.evaluation.encoder import EncoderComparison
from spicerack.evaluation.folder import pooling_of
from spicerack.evaluation.language import Comparison
from spicerack.evaluation.sentences import SENTENCES
from spicerack.models.kind import Kind
from spicerack.nn.weight import PackedLayer
from spicerack.storage import ledger
from spicerack.text.windows import Window, sentences, text_hash, windows

_T = TypeVar("_T")
Text = str | Path | torch.Tensor | None
"""What is read: a source of text, its tokens [n, L], or None for the built-in sentences of encoders."""
FLOOR_TOKENS = 8192
"""The noise floor is measured on the beginning of the text: it varies little, and bfloat16 is slow on many CPUs."""
UNKNOWN_LIMIT = 0.01
"""Share of unknown tokens from which on a warning asks whether the model knows the language."""
_SHORT = 64
"""Tokens of a window where there is no time for longer ones, and of the reading that foretells it. A token of so short
a reading takes longer than one of a long reading, so that what is foretold is not optimistic.
"""
_FEWEST = 3
"""Windows that a comparison in a given time has at least: one for the floor, and two that make an interval."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When a comparison has to end.

    end       a moment of `time.monotonic`, behind which no further window is begun; None: all of the text is read
    longest   tokens of a window, where there is an end: more windows in the same time make a narrower interval
    """

    end: float | None = None
    longest: int = 512

    def of_floor(self) -> Pace:
        """The same for the noise floor, which may take a third of what is left."""
        now = time.monotonic()
        return Pace(None if self.end is None else now + (self.end - now) / 3)

    def limit(self, items: Iterable[_T], least: int) -> Iterator[_T]:
        """The items, as long as there is time, and `least` of them whatever the time."""
        for number, item in enumerate(items):
            if self.end is not None and number >= least and time.monotonic() > self.end:
                return
            yield item

    @torch.no_grad()
    def window(self, model: PreTrainedModel, wanted: int) -> int:
        """Tokens of a window: as wanted, or fewer where there is no time for three of them, judged by one read now.

        Raises UsageError where there is no time for three short ones either.
        """
        if self.end is None:
            return wanted
        wanted = min(wanted, self.longest)
        short = min(_SHORT, wanted)
        tokens = torch.zeros(1, short, dtype=torch.int64, device=model.device)
        begin = time.monotonic()
        model.base_model(input_ids=tokens)[0].cpu()  # which waits for a GPU
        now = time.monotonic()
        least = 2 * _FEWEST * (now - begin)  # of two models
        if now + least > self.end:
            left = max(self.end - now, 0.0)
            raise UsageError(
                f"to read a few sentences takes {least:.0f} s, and {left:.0f} s are left of its time",
                "evaluate it apart",
            )
        return wanted if now + least * wanted / short <= self.end else short


@dataclass(frozen=True, slots=True)
class Reference:
    """The float model, and what others read beside it.

    kind        decoder or encoder
    model       in float32
    tokenizer   of both models
    folder      where the model is from: it says how sentences are pooled
    text        what is read
    window      tokens that are read together
    """

    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    text: Text
    window: int

    def floor(
        self, cast: PreTrainedModel, most: int | None, progress: Callable[[float], None], pace: Pace
    ) -> Comparison | EncoderComparison | None:
        """What the cast of the model to another float type costs, on the beginning of the text, a window at least.

        most: tokens, if there is a limit. None, and a warning, where the model does not run in that type, which not
        every family's code does.
        """
        beginning = max(FLOOR_TOKENS, self.window)
        try:
            return self.compare(cast, beginning if most is None else min(beginning, most), progress, pace.of_floor(), 1)
        except UsageError:  # of the text: it is not the type's fault
            raise
        except (RuntimeError, TypeError, ValueError, SpicerackError) as error:
            kind = str(cast.dtype).removeprefix("torch.")
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"there is no noise floor: the model does not run in {kind}: {reason}", stacklevel=3)
            return None

    def compare(
        self,
        other: PreTrainedModel,
        most: int | None,
        progress: Callable[[float], None],
        pace: Pace,
        least: int = _FEWEST - 1,
        step: int | None = None,
    ) -> Comparison | EncoderComparison:
        """How far `other` is from the model on the text.

        most: tokens of it, if there is a limit. pace, least: when to end, behind so many windows at least. step: as in
        `language.compare`.
        """
        if self.kind == "decoder":
            return language.compare(
                self.model, other, pace.limit(self._windows(most), least), progress=progress, step=step
            )
        builtin = ((text, i / len(SENTENCES)) for i, text in enumerate(SENTENCES, start=1))
        return encoder.compare(
            self.model,
            other,
            self.tokenizer,
            pace.limit(builtin if self.text is None else self._sentences(), encoder.BATCH),
            pooling=pooling_of(self.folder),
            length=self.window,
            max_tokens=most,
            progress=progress,
        )

    def _windows(self, most: int | None) -> Iterable[Window]:
        """What a decoder reads."""
        if isinstance(self.text, (str, Path)):
            return windows(self.text, self.tokenizer, self.window, most)
        assert self.text is not None, "decoders have a text"
        length = min(self.window, self.text.shape[1])
        rows = self.text[: None if most is None else max(most // length, 1), :length]
        unknown = self.tokenizer.unk_token_id
        return (
            Window(row, 0 if unknown is None else int((row == unknown).sum()), i / len(rows))
            for i, row in enumerate(rows, start=1)
        )

    def _sentences(self) -> Iterator[tuple[str, float]]:
        """What an encoder reads, where it is no sentence of ours."""
        assert isinstance(self.text, (str, Path)), "tokens are for decoders"
        return sentences(self.text, self.tokenizer)


# ---- what a person should know ---------------------------------------------------------------------------------------


def warn_of_calibration_text(
    text: str | Path | None, tokenizer: PreTrainedTokenizerBase, kind: Kind, out: Path
) -> None:
    """Warn of a text that the ledger of the folder `out` names; one that is missing is told when it is read."""
    written = ledger.read(out)
    if text is None or written is None or written.calibration_text is None:
        return
    if written.calibration_text == text_hash(text, tokenizer, by_line=kind == "encoder"):
        warnings.warn(f"{text} is what {out} was calibrated with: use another text, this one flatters", stacklevel=3)


def warn_of_unreached_layers(model: PreTrainedModel, reached: frozenset[str]) -> None:
    """Warn of quantized layers that text does not reach: vision towers, heads of encoders. Nothing is measured of them.

    reached: paths of the layers of the float model that are called; experts are apart, as a router decides about them.
    """
    packed = [path for path, module in model.named_modules() if isinstance(module, PackedLayer)]
    missed = [path for path in packed if path not in reached and "expert" not in path]
    if missed:
        parts = list(dict.fromkeys(".".join(path.split(".")[:2]) for path in missed))
        warnings.warn(
            f"text does not run {len(missed)} of {len(packed)} quantized layers ({listed(parts, 3)}): "
            "what was lost there is not in these figures",
            stacklevel=3,
        )


def warn_of_unknown_tokens(share: float) -> None:
    """Warn of a text whose tokens the tokenizer does not know: figures on it say little."""
    if share > UNKNOWN_LIMIT:
        unknown = f"{share:.1%} of the text's tokens are unknown to the tokenizer"
        warnings.warn(f"{unknown}: is it in a language that the model knows?", stacklevel=3)
