"""What is shown while a folder is quantized: something at every moment, and a time left that is one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from calibrations import text
from rich.console import Console

import spicerack
from spicerack.algorithms.solvers import signround
from spicerack.quantization import bar
from spicerack.quantization.bar import Clock, duration
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import decided, of
from spicerack.quantization.run import execute
from spicerack.quantization.watch import Finished, Watch, Working


def finished(number: int, count: int, seconds: float) -> Finished:
    return Finished("block", number, count, 7, 4.1, 0.1, 0.05, seconds, 1 << 30, ())


def test_the_time_left_is_that_of_the_blocks_that_are_left() -> None:
    clock = Clock(100.0)
    assert clock.left(Working(0, 10, "solving", 0.05), 103.0) is None  # too early to tell
    assert clock.left(Working(0, 10, "solving", 0.5), 130.0) == pytest.approx(570)  # 60 s a block, 30 of 600 are over
    assert clock.finished(finished(0, 10, 60.0), 160.0) == pytest.approx(540)
    assert clock.left(Working(1, 10, "solving", 0.0), 170.0) == pytest.approx(530)
    assert clock.finished(finished(9, 10, 40.0), 700.0) == 0


@pytest.mark.parametrize(("seconds", "told"), [(41.2, "41 s"), (720, "12 min"), (12_000, "3.3 h")])
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


class Noting(Watch):
    def __init__(self) -> None:
        self.moments: list[Working] = []

    def working(self, at: Working) -> None:
        self.moments.append(at)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "signround"])
def test_every_part_of_a_block_is_told(
    llama_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """In order, with shares that only grow inside a block; each layer is named, and each step of a learner counted."""
    monkeypatch.setattr(signround, "STEPS", 3)
    model, watch, given = llama_folder(), Noting(), text(4, 16)
    job = prepare(model, decided(of("w4g32").with_choices(None, method, None), True), with_text=True)
    execute(job, tmp_path / "out", calibration=given, watch=watch)
    assert {at.number for at in watch.moments} == {0, 1} and {at.count for at in watch.moments} == {2}
    for number in (0, 1):
        mine = [at for at in watch.moments if at.number == number]
        shares = [at.share for at in mine]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] < 1
        told = [at.doing for at in mine]
        assert sum(doing.startswith("solving ") for doing in told) == 7
        assert "solving mlp.down_proj, 7 of 7" in told and any(doing.startswith("statistics for ") for doing in told)
        assert any(doing.startswith("awq: factors of ") for doing in told) == ("awq" in method)
        assert ("learning, step 3 of 3" in told) == (method == "signround")


def test_python_can_show_the_bar(llama_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    place = bar.columns
    terminal = Console(file=drawn, force_terminal=True, width=80)
    monkeypatch.setattr(bar, "columns", lambda _console: place(terminal))
    arguments = {"method": "gptq", "calibration": text(4, 16), "progress": True}
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out", **arguments)
    assert "block 2 of 2" in drawn.getvalue() and "left" in drawn.getvalue()
