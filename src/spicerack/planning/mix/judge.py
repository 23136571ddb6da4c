"""What a written folder really loses, on text that is not calibrated with.

That is `heldout.txt` where it lies in the model's folder, as `spicerack eval` takes it; else a part of the calibration
text, which is kept from calibration. Windows are spread over all of the text.

The folder computes as it ships, in its own type and with its own kernels; the float model in float32. Intervals are
over windows of a language model's text, and over an encoder's sentences.

`swaps` goes further, for a mix whose loss was predicted wrongly: each unit in turn is float again, all others stay as
they are written, and what the model then loses less is the unit's own share, measured where the mix is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.errors import TextError
from spicerack.evaluation import language
from spicerack.evaluation.encoder import Pooling, embed
from spicerack.evaluation.evaluate import HELDOUT
from spicerack.evaluation.intervals import Interval, mean_interval
from spicerack.models.architecture import destinations
from spicerack.numerics import codec
from spicerack.planning.mix.units import Choice
from spicerack.runtime.folder import Folder
from spicerack.runtime.load import load
from spicerack.text.calibration import Calibration
from spicerack.text.windows import Window, windows

HELD_OUT = 32
"""Sequences that are kept from calibration, or a quarter of them if that is fewer: 16,384 tokens of 512 give an
interval of a tenth of the loss."""
_FEWEST = 8
"""Sequences of a text that is judged on, or split: of fewer no interval is worth its name."""
_LOOKED_AT = 4096
"""Windows of a text that some are chosen from, at most."""
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """What a folder loses.

    loss     mean KL in nats per token, or 1 - cosine of sentences, with its interval
    tokens   that it is of
    rise     of -log p of the tokens that came, in nats, with its interval; None of encoders
    """

    loss: Interval
    tokens: int
    rise: Interval | None

    def bounded(self, of_rise: bool) -> float:
        """The upper end of what a bound is about."""
        interval = self.rise if of_rise and self.rise is not None else self.loss
        return interval.mean if interval.hi is None else interval.hi


def with_held_out(samples: int, folder: Path) -> int:
    """Sequences to ask for, so that about `samples` are left for calibration of the model in `folder`."""
    return samples if (folder / HELDOUT).is_file() else samples + min(HELD_OUT, max(samples // 3, _FEWEST // 4))


def beside(folder: Path, tokenizer: PreTrainedTokenizerBase, window: int) -> Calibration | None:
    """Windows of the text in a model's folder that it was not trained on; None where there are not enough."""
    if not (folder / HELDOUT).is_file():
        return None
    try:
        found = [one.ids for one in islice(windows(folder / HELDOUT, tokenizer, window), _LOOKED_AT)]
    except TextError:
        return None
    if len(found) < _FEWEST:
        return None
    ids = torch.stack([found[place] for place in _spread(len(found), min(HELD_OUT, len(found)))])
    return Calibration(ids, None, "", 0.0, str(folder / HELDOUT))


def split(text: Calibration) -> tuple[Calibration, Calibration]:
    """The text for calibration, and the text for judging, a quarter of its sequences at most.

    Raises TextError for fewer than eight sequences.
    """
    count = len(text.ids)
    if count < _FEWEST:
        raise TextError(
            f"{text.source} has {count} sequences; a budget is judged on a quarter of them, and needs {_FEWEST}",
            "give a longer text, or shorter sequences: --length",
        )
    mine = torch.zeros(count, dtype=torch.bool, device="cpu")
    mine[_spread(count, min(HELD_OUT, count // 4))] = True

    def of(rows: torch.Tensor) -> Calibration:
        return dataclasses.replace(text, ids=text.ids[rows], mask=None if text.mask is None else text.mask[rows])

    return of(~mine), of(mine)


def _spread(count: int, some: int) -> list[int]:
    """So many of `count` places, at even distances."""
    return [(2 * i + 1) * count // (2 * some) for i in range(some)]


@dataclass(frozen=True, slots=True)
class Judge:
    """The float model and the text that folders are judged on.

    source    folder of the float model
    text      sequences that nothing else looks at
    pooling   how an encoder makes one vector of a sentence; None for a decoder
    device    where both models run
    """

    source: Path
    text: Calibration
    pooling: Pooling | None
    device: torch.device

    def measure(self, folder: Path, progress: Callable[[float], None]) -> Measured:
        """What a folder loses as it ships. Raises LoadError, and SpicerackError for logits that are not finite."""
        reference = load(self.source, device=self.device, dtype=torch.float32)
        return self._compared(reference, load(folder, device=self.device), self.text, progress)

    @torch.no_grad()
    def swaps(
        self, folder: Path, units: Sequence[Choice], text: Calibration, progress: Callable[[float], None]
    ) -> dict[str, float] | None:
        """How much less the folder loses with one unit in float, by its name, and what it loses as it is, under "".

        units: that are measured. text: another one than is judged on. None where transformers puts tensors of a unit
        together with others, so that none can be put in its place.
        """
        reference, mixed = (load(self.source, device=self.device, dtype=torch.float32) for _ in range(2))
        opened = Folder.open(folder)
        parameters = _parameters(mixed, opened)
        wanted = {tensor.removesuffix(".weight") for unit in units for tensor in unit.tensors}
        if not wanted <= parameters.keys():
            return None
        for module, parameter in parameters.items():
            stored = opened.contents[module]
            decoded = codec.decode(opened.packed(stored))
            mixed.get_parameter(parameter).copy_(decoded.transpose(-1, -2) if stored.transposed else decoded)
            opened.release(stored)
        whole = self._compared(reference, mixed, text, lambda _: None).loss.mean
        losses = {"": whole}
        for number, unit in enumerate(units):
            progress(number / len(units))
            names = [parameters[tensor.removesuffix(".weight")] for tensor in unit.tensors]
            kept = {name: mixed.get_parameter(name).clone() for name in names}
            for name in names:
                mixed.get_parameter(name).copy_(reference.get_parameter(name))
            losses[unit.name] = whole - self._compared(reference, mixed, text, lambda _: None).loss.mean
            for name, value in kept.items():
                mixed.get_parameter(name).copy_(value)
        return losses

    def _compared(
        self, reference: PreTrainedModel, other: PreTrainedModel, text: Calibration, progress: Callable[[float], None]
    ) -> Measured:
        if self.pooling is not None:
            pairs = zip(self._vectors(reference, text), self._vectors(other, text), strict=True)
            lost = torch.cat([1 - torch.cosine_similarity(a, b, dim=-1) for a, b in pairs])
            tokens = text.ids.numel() if text.mask is None else int(text.mask.sum())
            return Measured(mean_interval(lost.cpu()), tokens, None)
        count = len(text.ids)
        read = (Window(ids, 0, (i + 1) / count) for i, ids in enumerate(text.ids))
        compared = language.compare(reference, other, read, progress=progress)
        return Measured(compared.kl_interval, compared.tokens, mean_interval(compared.nll - compared.nll_reference))

    @torch.no_grad()
    def _vectors(self, model: PreTrainedModel, text: Calibration) -> Iterator[torch.Tensor]:
        """Vectors of sentences, a few at a time."""
        assert self.pooling is not None, "of encoders"
        mask = torch.ones_like(text.ids) if text.mask is None else text.mask.long()
        for ids, real in zip(text.ids.split(_BATCH), mask.split(_BATCH), strict=True):
            yield embed(model, ids, real, self.pooling)


def _parameters(model: PreTrainedModel, folder: Folder) -> Mapping[str, str]:
    """Module of a quantized tensor -> its parameter in the float model, of those that are one as they are."""
    places = destinations(model, [f"{module}.weight" for module in folder.contents])
    return {name.removesuffix(".weight"): place.parameter for name, place in places.items() if not place.operations}
