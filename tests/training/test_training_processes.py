"""Runs of training that are killed, and runs by several processes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LlamaFolder

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file, letters = tmp_path / "text.txt", random.Random(0)
    words = ["alpha beta", "gamma delta", "epsilon zeta", "one two three"]
    file.write_text(" ".join(letters.choice(words) for _ in range(2000)))
    return file


def command(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    words = ["train", source, "-o", out, "--scheme", "w4g32", "--data", text, "--length", "64", "--steps", "12",
             "--batch", "8", "--micro-batch", "2", "--lr", "1e-3", "--save-every", "4",
             "--eval-every", "6"]  # fmt: skip
    return ["-m", "spicerack", *map(str, words), *more]


def done(words: list[str]) -> dict[str, float]:
    result = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr
    shown: dict[str, float] = json.loads(result.stdout)
    return shown


def same(one: Path, two: Path) -> None:
    for file in ("model.safetensors", "training.json", "spicerack.json", "config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


@pytest.mark.slow
def test_killed_and_started_again(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, and the result is the same bytes."""
    source = llama_folder()
    done([sys.executable, *command(source, tmp_path / "whole", text)])
    process = subprocess.Popen([sys.executable, *command(source, tmp_path / "out", text)], stderr=subprocess.DEVNULL)
    work = tmp_path / "out.training"
    deadline = time.time() + 200
    while not list(work.glob("checkpoint-*/complete")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert done([sys.executable, *command(source, tmp_path / "out", text)])["resumed_at"] in (4, 8, 12)
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """Data-parallel or sharded: as one process but for the order of sums; and killed and continued, the same bytes."""
    source = llama_folder()
    alone = done([sys.executable, *command(source, tmp_path / "alone", text)])
    assert alone["loss_trained"] < alone["loss_rounded"] - 0.5
    for name, more in (("ddp", []), ("fsdp", ["--fsdp"])):
        both = done([*LAUNCH, *command(source, tmp_path / name, text, *more)])
        assert both["loss_trained"] == pytest.approx(alone["loss_trained"], abs=1e-3)
        assert both["loss_shipped"] == pytest.approx(both["loss_trained"], abs=0.02)

    process = subprocess.Popen([*LAUNCH, *command(source, tmp_path / "out", text, "--fsdp")], stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not list((tmp_path / "out.training").glob("checkpoint-*/complete")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    subprocess.run(["pkill", "-9", "-f", f"{tmp_path / 'out'} "], check=False)  # torchrun's have groups of their own
    process.kill()
    process.wait()
    assert done([*LAUNCH, *command(source, tmp_path / "out", text, "--fsdp")])["resumed_at"] in (4, 8, 12)
    same(tmp_path / "out", tmp_path / "fsdp")
