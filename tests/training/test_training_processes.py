"""Runs of training that are killed, and runs by several processes."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from conftest import LlamaFolder

from spicerack.cli import _output, cli


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file, letters = tmp_path / "text.txt", random.Random(0)
    words = ["alpha beta", "gamma delta", "epsilon zeta", "one two three"]
    file.write_text(" ".join(letters.choice(words) for _ in range(2000)))
    return file


def command(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    words = ["train", source, "-o", out, "--scheme", "w4g32", "--data", text, "--length", "64", "--steps", "12",
             "--batch", "8", "--micro-batch", "2", "--lr", "1e-3", "--save-every", "4",
             "--eval-every", "6", "--json"]  # fmt: skip
    return [*map(str, words), *more]


def report(out: Path) -> dict[str, Any]:
    """What a run says of itself in its folder."""
    shown: dict[str, Any] = json.loads((out / "training.json").read_text())
    return shown


def kill_at_the_first_checkpoint(out: Path, started: list[processes.Started]) -> None:
    """kill -9 of all, in the middle."""
    deadline = time.time() + 200
    while not list(out.with_name(f"{out.name}.training").glob("checkpoint-*/complete")):
        assert time.time() < deadline
        assert all(process.alive for process in started)
        time.sleep(0.002)
    for process in started:
        process.send(signal.SIGKILL)
    for process in started:
        process.wait()
    assert not out.exists()


def same(one: Path, two: Path) -> None:
    for file in ("model.safetensors", "training.json", "spicerack.json", "config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


@pytest.mark.slow
def test_killed_and_started_again(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 in the middle, and the result is the same bytes."""
    source, whole, out = llama_folder(), tmp_path / "whole", tmp_path / "out"
    assert _output.run(cli, command(source, whole, text)) == 0
    kill_at_the_first_checkpoint(out, [processes.Started(processes.COMMAND, command(source, out, text), tmp_path)])
    capsys.readouterr()
    assert _output.run(cli, command(source, out, text)) == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] in (4, 8, 12)
    same(out, whole)


@pytest.mark.slow
def test_two_processes(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """Data-parallel or sharded: as one process but for the order of sums; and killed and continued, the same bytes."""
    source, out = llama_folder(), tmp_path / "out"
    assert _output.run(cli, command(source, tmp_path / "alone", text)) == 0
    alone = report(tmp_path / "alone")
    assert alone["loss_trained"] < alone["loss_rounded"] - 0.5
    ddp, fsdp = command(source, tmp_path / "ddp", text), command(source, tmp_path / "fsdp", text, "--fsdp")
    processes.by_torchrun([ddp, fsdp], tmp_path)
    for name in ("ddp", "fsdp"):
        both = report(tmp_path / name)
        assert both["loss_trained"] == pytest.approx(alone["loss_trained"], abs=1e-3)
        assert both["loss_shipped"] == pytest.approx(both["loss_trained"], abs=0.02)

    killed = command(source, out, text, "--fsdp")
    kill_at_the_first_checkpoint(out, processes.pair(processes.COMMAND, killed, tmp_path))
    first, second = (process.wait() for process in processes.pair(processes.COMMAND, killed, tmp_path))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(first.stdout)["resumed_at"] in (4, 8, 12)
    same(out, tmp_path / "fsdp")
