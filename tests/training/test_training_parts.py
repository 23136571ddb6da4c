"""What a run of training is made of: its text, schedules and losses, against closed forms."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from scipy.stats import chisquare
from torch.distributions import Categorical, kl_divergence

from spicerack.errors import OutputError, TextError, UsageError
from spicerack.machine.ranks import ALONE, Ranks, launched
from spicerack.training.distillation import Cached, Predictions, divergence
from spicerack.training.schedule import decay, rate
from spicerack.training.settings import Settings, arguments
from spicerack.training.text import Order, Subset, pack, split

LENGTH = 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    letters = random.Random(0)
    file.write_text("".join(letters.choice("abcdefghijklmnop ") for _ in range(1000)))
    return file


# ---- text ------------------------------------------------------------------------------------------------------------


def test_rows_are_the_text(text: Path, tmp_path: Path) -> None:
    rows = pack(text, byte_tokenizer(), tmp_path / "rows.bin", length=LENGTH, most=1000)
    ids = byte_tokenizer()(text.read_text(), add_special_tokens=False).input_ids
    assert rows.tokens.flatten().tolist() == ids[: len(ids) // LENGTH * LENGTH]
    assert rows.ids([2, 0]).tolist() == [ids[16:24], ids[:8]]


def test_what_was_packed_is_taken_as_it_is(text: Path, tmp_path: Path) -> None:
    before = pack(text, byte_tokenizer(), tmp_path / "rows.bin", length=LENGTH, most=20)
    text.unlink()
    after = pack(text, byte_tokenizer(), tmp_path / "rows.bin", length=LENGTH, most=20)
    assert torch.equal(before.tokens, after.tokens)
    assert before.sha256 == after.sha256


def test_of_many_rows_each_is_as_likely(text: Path, tmp_path: Path) -> None:
    """20 of 125, spread evenly."""
    ids = byte_tokenizer()(text.read_text(), add_special_tokens=False).input_ids
    place = {tuple(ids[i : i + LENGTH]): i // LENGTH for i in range(0, 1000, LENGTH)}
    rows = pack(text, byte_tokenizer(), tmp_path / "rows.bin", length=LENGTH, most=20)
    numbers = [place[tuple(row)] for row in rows.tokens.tolist()]
    assert len(set(numbers)) == 20
    assert chisquare([sum(low <= at < low + 25 for at in numbers) for low in range(0, 125, 25)]).pvalue > 0.01


def test_each_time_through_the_text_every_row_comes_once(text: Path, tmp_path: Path) -> None:
    rows = pack(text, byte_tokenizer(), tmp_path / "rows.bin", length=LENGTH, most=1000)
    numbers, held = split(len(rows), 5)
    order = Order(Subset(rows, numbers), 250, seed=3)
    drawn = [order[i][0] for i in range(len(order))]
    assert not set(drawn) & set(held.tolist())
    assert Counter(drawn[:120]) == Counter(drawn[120:240]) == Counter(numbers.tolist())
    assert drawn[:120] != drawn[120:240]
    assert [order[i][0] for i in (200, 7, 130)] == [drawn[i] for i in (200, 7, 130)]  # from anywhere
    assert torch.equal(order[7][1], rows.ids([drawn[7]])[0])


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(TextError, match="has 3 tokens, and one sequence needs 8"):
        pack(tmp_path / "short.txt", byte_tokenizer(), tmp_path / "rows.bin", length=LENGTH, most=2)


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_rates() -> None:
    assert [rate("cosine", step, 100, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate("cosine", 52, 100, 4) == pytest.approx(0.5)
    assert rate("cosine", 28, 100, 4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert rate("linear", 75, 100, 0) == 0.25
    assert rate("constant", 99, 100, 10) == 1
    assert rate("two-stage", 49, 100, 0) == 0.51
    assert rate("two-stage", 50, 100, 0) == pytest.approx(0.5 * 2 / 3)
    assert (decay("two-stage", 49, 100), decay("two-stage", 50, 100), decay("cosine", 99, 100)) == (1, 0, 1)


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"lr": 0.0}, {"lr": math.nan}, {"embedding_lr": 0.0}, {"scale_lr": -1.0},
    {"kl": 1.5}, {"schedule": "steep"}, {"micro_batch": 0},
    {"weight_decay": -1.0}, {"dtype": "int8"}, {"length": 1}, {"seed": -1}, {"seed": 2**32},
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]


def test_batches_are_cut_evenly() -> None:
    assert Settings(batch=16, micro_batch=2).micro(2) == 2
    assert Settings(batch=16).micro(4) == 4
    with pytest.raises(UsageError, match="16 rows is not 3 processes"):
        Settings(batch=16).micro(3)


def test_processes_are_counted_as_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == ALONE and launched().first
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == Ranks(1, 2) and not launched().first
    with pytest.raises(UsageError, match="several processes"):
        arguments(Settings(fsdp=True), Path("out.training"), 1)


# ---- distillation ----------------------------------------------------------------------------------------------------


class Fixed:
    """Predicts by table, and counts how often it is asked."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table = 3 * torch.randn((rows, LENGTH - 1, vocabulary), generator=generator)
        self.asked = 0

    def predict(self, numbers: Sequence[int] | None, ids: torch.Tensor) -> Predictions:
        assert numbers is not None
        self.asked += len(numbers)
        return Predictions(self.table[list(numbers)].flatten(0, 1).log_softmax(-1))


@pytest.fixture
def student() -> torch.Tensor:
    return (2 * torch.randn((2 * (LENGTH - 1), 30), generator=torch.Generator().manual_seed(2))).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(student: torch.Tensor, temperature: float) -> None:
    teacher = Fixed(2, 30).table.flatten(0, 1)
    wanted = Predictions((teacher / temperature).log_softmax(-1))
    loss = divergence(student, wanted, temperature)
    p, q = (Categorical(logits=logits / temperature) for logits in (teacher, student.detach()))
    assert loss.item() == pytest.approx((temperature**2 * kl_divergence(p, q).mean()).item(), rel=1e-5)
    loss.backward()
    closed = temperature * (q.probs - p.probs) / len(student)  # of t^2 KL
    assert torch.allclose(student.grad, closed, atol=1e-6)  # type: ignore[arg-type]


def test_kept_predictions(student: torch.Tensor, tmp_path: Path) -> None:
    """All that matters is kept: never more than the whole divergence, and most of it; asked for once."""
    teacher = Fixed(4, 30)
    ids = torch.zeros((2, LENGTH), dtype=torch.long)
    whole = divergence(student, teacher.predict([3, 1], ids), 1.0).item()
    kept = {}
    for top in (4, 29):
        caches = [
            Cached(teacher, tmp_path / str(top), rows=4, length=LENGTH, identity={"teacher": "t"}, top=top)
            for _ in range(2)
        ]
        teacher.asked = 0
        first = divergence(student, caches[0].predict([3, 1], ids), 1.0)
        again = divergence(student, caches[1].predict([3, 1], ids), 1.0)
        assert teacher.asked == 2
        assert first.item() == again.item()
        caches[1].predict([3, 0], ids)
        assert teacher.asked == 3
        kept[top] = first.item()
    assert kept[4] < whole
    assert kept[4] > 0.7 * whole
    assert kept[29] == pytest.approx(whole, rel=3e-3)  # float16, and one outcome left over: all are told apart


def test_predictions_of_others_are_refused(tmp_path: Path) -> None:
    def cached(teacher: str) -> Cached:
        return Cached(Fixed(4, 30), tmp_path, rows=4, length=LENGTH, identity={"teacher": teacher}, top=4)

    cached("one")
    with pytest.raises(OutputError, match="another teacher"):
        cached("two")
    (tmp_path / "logs.bin").write_bytes(b"\0" * 10)
    with pytest.raises(UsageError, match="damaged"):
        cached("one")
