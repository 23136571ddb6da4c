"""Two processes quantize together: the same bytes each time, and hardly a code apart from one process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LlamaFolder
from folders import codes

import spicerack
from spicerack.machine.ranks import ALONE, Ranks


def command(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    words = ["quantize", source, "-o", out, "--scheme", "w4g32", "--calib", text, "--length", "64", "--samples", "320"]
    return ["-m", "spicerack", *map(str, words), *more]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three chunks of 8,192 tokens."""
    letters = random.Random(0)
    file = tmp_path / "text.txt"
    file.write_text("".join(letters.choice("abcdefghij klmnop\n") for _ in range(24_000)))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), [("awq+gptq", "w4g32a8s"), ("signround", "w4g32"), ("blockap", "w4g32")])
def test_torchrun(method: str, scheme: str, llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    source = llama_folder()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outs = [tmp_path / name for name in ("a", "b", "alone")]
    for out, launcher in zip(outs, (launch, launch, [sys.executable]), strict=True):
        done = subprocess.run(
            [*launcher, *command(source, out, text, "--method", method, "--scheme", scheme)],
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bits a quantized weight") == 1  # only one of them speaks
    names = {p.name for p in outs[0].iterdir()} - {"run.json"}
    assert names == {p.name for p in outs[1].iterdir()} - {"run.json"}
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    together, alone = codes(outs[0]), codes(outs[2])
    apart = sum(int((together[name] != alone[name]).sum()) for name in alone)
    if "gptq" in method:  # the others' steps go by signs of gradients or nearly so, and part at the first that is small
        assert apart <= 1e-4 * sum(one.numel() for one in alone.values())
    spicerack.load(outs[0])


def test_costs_are_shared() -> None:
    costs = {"a": 3.0, "b": 9.0, "c": 4.0, "d": 2.0}
    found = Ranks(0, 2).shares(costs)
    assert found == {"b": 0, "c": 1, "a": 1, "d": 1}
    assert set(ALONE.shares(costs).values()) == {0}


@pytest.mark.slow
def test_ctrl_c_finishes_the_block(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """The first interrupt stops behind the present block; the same command then continues to the same bytes."""
    source = llama_folder(num_hidden_layers=6)
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([sys.executable, *command(source, whole, text)], capture_output=True, check=True)
    process = subprocess.Popen(
        [sys.executable, *command(source, out, text)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    blocks = tmp_path / "out.partial" / "blocks"
    while process.poll() is None and not (blocks / "block-00000.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 130, printed
    assert "stopping behind this block" in printed
    done = len(list(blocks.glob("block-*.safetensors")))
    assert 1 <= done < 6
    assert printed.count("output off by") == done
    again = subprocess.run([sys.executable, *command(source, out, text)], capture_output=True, text=True, check=True)
    assert again.stdout.count("output off by") + again.stderr.count("output off by") == 6 - done
    for file in whole.iterdir():
        if file.name != "run.json":
            assert file.read_bytes() == (out / file.name).read_bytes(), file.name
