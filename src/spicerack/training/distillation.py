"""Knowledge distillation: what a teacher predicts, and how far a student is from it.

A teacher's predictions can be kept on disk, the largest of each position and what is left over: the second run with
the same teacher and text, or the second time through the text, needs no teacher any more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from spicerack.errors import UsageError
from spicerack.storage.durable import json_bytes, read_json, refuse_other, write_atomically

TOP = 64
"""Predictions that are kept of each position."""
_LEAST = 1e-9
"""Of what is left over, so that its logarithm exists in float32."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a teacher says of each of T positions: log-probabilities float32 [T, V], or with ids [T, K] of these.

    With ids the rest of the vocabulary is one outcome.
    """

    logs: torch.Tensor
    ids: torch.Tensor | None = None


def divergence(logits: torch.Tensor, wanted: Predictions, temperature: float) -> torch.Tensor:
    """t^2 KL(teacher || student) in nats, mean over positions, at temperature t (Hinton et al. 2015, arXiv:1503.02531).

    logits: the student's, [T, V]. Between the kept outcomes and the rest it is never more than between all.
    """
    logs = F.log_softmax(logits.float() / temperature, -1)
    if wanted.ids is None:
        return temperature**2 * F.kl_div(logs, wanted.logs, reduction="batchmean", log_target=True)
    kept = logs.gather(-1, wanted.ids)
    both = (torch.cat((some, _rest(some)), -1) for some in (kept, wanted.logs))
    found, target = both
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum(exp(logs))) [T, 1]."""
    return (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=_LEAST).log()


class Teacher(Protocol):
    """Who predicts."""

    def predict(self, numbers: Sequence[int] | None, ids: torch.Tensor) -> Predictions:
        """Of rows `ids` [B, L], all positions but each row's last. numbers: theirs in the text, None for other rows."""
        ...


class Live:
    """A model that predicts when it is asked."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        self.model, self.temperature = model.eval().requires_grad_(False), temperature

    @torch.no_grad()
    def predict(self, numbers: Sequence[int] | None, ids: torch.Tensor) -> Predictions:
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return Predictions(F.log_softmax(logits.float() / self.temperature, -1))


class Cached:
    """A teacher whose predictions are kept in `folder`, for `rows` rows of `length` tokens.

    identity: what they depend on, beside this. Several processes may share the folder; a row counts once all of it is
    there. Raises OutputError for a folder of another teacher or text.
    """

    def __init__(
        self, teacher: Teacher, folder: Path, *, rows: int, length: int, identity: dict[str, Any], top: int = TOP
    ) -> None:
        self.teacher, self.top = teacher, top
        identity = {**identity, "rows": rows, "length": length, "kept": top}
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "predictions.json"
        before = read_json(record)
        if before is None:
            if any(folder.glob("*.bin")):
                raise UsageError(f"{folder} has predictions, but not whose", "remove it, or use another folder")
            write_atomically(record, json_bytes(identity))
        else:
            refuse_other(folder, before, identity)
        self._logs = _mapped(folder / "logs.bin", np.float16, (rows, length - 1, top))
        self._ids = _mapped(folder / "ids.bin", np.int32, (rows, length - 1, top))
        self._done = _mapped(folder / "done.bin", np.uint8, (rows,))

    def predict(self, numbers: Sequence[int] | None, ids: torch.Tensor) -> Predictions:
        if numbers is None:
            return self.teacher.predict(None, ids)
        missing = [place for place, number in enumerate(numbers) if not self._done[number]]
        if missing:
            made = self.teacher.predict([numbers[place] for place in missing], ids[missing])
            top = made.logs.topk(self.top, -1)
            where = [numbers[place] for place in missing]
            shape = (len(missing), -1, self.top)
            self._logs[where] = top.values.reshape(shape).half().cpu().numpy()
            self._ids[where] = top.indices.reshape(shape).int().cpu().numpy()
            self._logs.flush()
            self._ids.flush()
            self._done[where] = 1
        logs, places = (torch.from_numpy(part[list(numbers)]).flatten(0, 1) for part in (self._logs, self._ids))
        return Predictions(logs.float().to(ids.device), places.long().to(ids.device))


def _mapped(file: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """`file`, made with zeros if it is not there, as an array that is written through."""
    size = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(descriptor).st_size == 0:
            os.ftruncate(descriptor, size)
        if os.fstat(descriptor).st_size != size:
            raise UsageError(f"{file} is damaged: it does not have {size} bytes", "remove its folder")
    finally:
        os.close(descriptor)
    return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def check_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel, name: Path) -> None:
    """Raises UsageError where a teacher predicts over other tokens than the student."""
    ours, theirs = student.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
    if ours != theirs:
        raise UsageError(
            f"the teacher {name} predicts {theirs} tokens, the model {ours}",
            "a teacher must have the model's tokenizer and vocabulary",
        )
