"""Knowledge distillation: what a teacher predicts, and how far a student is from it.

    loss = (1 - kl) cross-entropy + kl t^2 KL(teacher || student)          both softened by the temperature t

A teacher's predictions can be kept on disk, the largest of each position and what is left over: the second run with
the same teacher and text, or the second time through the text, needs no teacher any more. What is given up is how the
teacher divides that rest among the thousands of tokens that it hardly expects, and the last digits of the others, which
are kept in float16.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
"""Predictions that are kept of each position: six bytes each, a logarithm in float16 and a token in int32."""
_LEAST = 1e-9
"""Probability that what is left over has at least, so that its logarithm exists: float32 sums of 64 probabilities may
reach 1, or go beyond it by their rounding."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a teacher says of each of T positions, softened by the temperature already.

    logs   log-probabilities float32 [T, V]; with ids [T, K] of these tokens
    ids    int64 [T, K], the tokens that are kept; None: all of the vocabulary

    With ids the rest of the vocabulary is one outcome.
    """

    logs: torch.Tensor
    ids: torch.Tensor | None = None


def divergence(logits: torch.Tensor, wanted: Predictions, temperature: float) -> torch.Tensor:
    """t^2 KL(teacher || student) in nats, mean over positions, at temperature t (Hinton et al. 2015, arXiv:1503.02531).

    logits: the student's, [T, V], in any float type; wanted: the teacher's, of the same positions. t^2 keeps the
    gradient's size where t changes, as the paper has it. Between the kept outcomes and the rest it is never more than
    between all: to merge outcomes only takes differences away.
    """
    logs = F.log_softmax(logits.float() / temperature, -1)
    if wanted.ids is None:
        return temperature**2 * F.kl_div(logs, wanted.logs, reduction="batchmean", log_target=True)
    kept = logs.gather(-1, wanted.ids)
    student, teacher = (torch.cat((some, _rest(some)), -1) for some in (kept, wanted.logs))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum(exp(logs))) [T, 1]: what is left over of each position."""
    return (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=_LEAST).log()


class Teacher(Protocol):
    """Whose predictions are learned: a model, or files that remember what one said."""

    def predict(self, numbers: Sequence[int] | None, ids: torch.Tensor) -> Predictions:
        """Of rows `ids` [B, L], all positions but each row's last, which predicts a token that is not there.

        numbers: theirs in the text that is trained on, so that they can be recognized; None for rows of another text.
        """
        ...


class Live:
    """A model that predicts when it is asked, in its own float type, at one temperature.

    model: of the student's vocabulary; it is put into eval mode, and none of its parameters trains. temperature: what
    logits are divided by.
    """

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        self.model, self.temperature = model.eval().requires_grad_(False), temperature

    @torch.no_grad()
    def predict(self, numbers: Sequence[int] | None, ids: torch.Tensor) -> Predictions:
        """All V log-probabilities of each position; numbers do not matter."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return Predictions(F.log_softmax(logits.float() / self.temperature, -1))


class Cached:
    """A teacher whose predictions are kept in `folder`, for `rows` rows of `length` tokens.

    teacher    is asked for what is not there yet, and for rows without numbers
    identity   what the predictions depend on, beside rows, length and top: the teacher, the text ...
    top        how many of each position are kept, the largest

    Several processes may share the folder: each row has its place in the files, and counts once all of it is there; two
    that compute the same row write the same. Raises OutputError for a folder of another teacher or text, UsageError for
    one that is damaged.
    """

    def __init__(
        self, teacher: Teacher, folder: Path, *, rows: int, length: int, identity: Mapping[str, Any], top: int = TOP
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
        """The largest log-probabilities of each position, from the files; the teacher's own, all of them, of rows of
        another text, which come too seldom to be kept."""
        if numbers is None:
            return self.teacher.predict(None, ids)
        missing = [place for place, number in enumerate(numbers) if not self._done[number]]
        if missing:
            self._keep([numbers[place] for place in missing], ids[missing])
        logs, tokens = (torch.from_numpy(part[list(numbers)]).flatten(0, 1) for part in (self._logs, self._ids))
        return Predictions(logs.float().to(ids.device), tokens.long().to(ids.device))

    def _keep(self, numbers: list[int], ids: torch.Tensor) -> None:
        """Ask the teacher for rows `ids` [B, L], whose numbers in the text are `numbers`, and write down its largest
        predictions.

        A row is marked as there once its numbers are on their way to the disk: half of one is asked for again.
        """
        top = self.teacher.predict(numbers, ids).logs.topk(self.top, -1)
        shape = (len(numbers), -1, self.top)
        self._logs[numbers] = top.values.reshape(shape).half().cpu().numpy()
        self._ids[numbers] = top.indices.reshape(shape).int().cpu().numpy()
        self._logs.flush()
        self._ids.flush()
        self._done[numbers] = 1  # last: a process that is killed leaves rows that are asked for again


def _mapped(file: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """`file`, made with zeros if it is not there, as an array that is written through.

    Raises UsageError for a file of another size.
    """
    size = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(descriptor).st_size == 0:
            os.ftruncate(descriptor, size)  # sparse: pages that nothing is written to take no room on the disk
        if os.fstat(descriptor).st_size != size:
            raise UsageError(f"{file} is damaged: it does not have {size} bytes", "remove its folder")
    finally:
        os.close(descriptor)
    return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def check_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel, name: Path) -> None:
    """Raises UsageError where a teacher, read from the folder `name`, predicts over other tokens than the student."""
    ours, theirs = student.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
    if ours != theirs:
        raise UsageError(
            f"the teacher {name} predicts {theirs} tokens, the model {ours}",
            "a teacher must have the model's tokenizer and vocabulary",
        )
