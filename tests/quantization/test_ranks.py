"""Two processes quantize together: the same bytes each time, and hardly a code apart from one process."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import processes
import pytest
from conftest import LlamaFolder
from folders import codes

import spicerack
from spicerack.algorithms.solvers import blockap, signround
from spicerack.cli import _output, cli
from spicerack.machine.ranks import ALONE, Ranks


def command(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    words = [
        "quantize",
        source,
        "--no-check",
        "-o",
        out,
        "--scheme",
        "w4g32",
        "--calib",
        text,
        "--length",
        "64",
        "--samples",
        "320",
    ]
    return [*map(str, words), *more]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three chunks of 8,192 tokens."""
    letters = random.Random(0)
    file = tmp_path / "text.txt"
    file.write_text("".join(letters.choice("abcdefghij klmnop\n") for _ in range(24_000)))
    return file


@pytest.mark.slow
def test_torchrun(
    llama_folder: LlamaFolder,
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = llama_folder()
    monkeypatch.setattr(signround, "STEPS", processes.STEPS)
    monkeypatch.setattr(blockap, "STEPS", processes.STEPS)
    methods = {"awq+gptq": "w4g32a8s", "signround": "w4g32", "blockap": "w4g32"}

    def commands(out: str) -> list[list[str]]:
        return [command(source, tmp_path / f"{out}-{method}", text, "--method", method, "--scheme", scheme)
                for method, scheme in methods.items()]  # fmt: skip

    printed = processes.by_torchrun([*commands("a"), *commands("b")], tmp_path)
    assert printed.count("bits a quantized weight") == 2 * len(methods)  # only one of them speaks
    for words in commands("alone"):
        assert _output.run(cli, words) == 0, capfd.readouterr().err
    for method in methods:
        outs = [tmp_path / f"{name}-{method}" for name in ("a", "b", "alone")]
        names = {p.name for p in outs[0].iterdir()} - {"run.json"}
        assert names == {p.name for p in outs[1].iterdir()} - {"run.json"}
        for name in names:
            assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), (method, name)
        together, alone = codes(outs[0]), codes(outs[2])
        apart = sum(int((together[name] != alone[name]).sum()) for name in alone)
        # The others' steps go by signs of gradients or nearly so, and part at the first that is small. Of GPTQ's codes
        # none was apart for 12 of 13 models whose sums were taken in another order, and .7 % where a choice fell the
        # other way; with half the text it was 30 %.
        if "gptq" in method:
            assert apart <= 0.05 * sum(one.numel() for one in alone.values())
        spicerack.load(outs[0])


def test_costs_are_shared() -> None:
    costs = {"a": 3.0, "b": 9.0, "c": 4.0, "d": 2.0}
    shares = Ranks(0, 2).shares(costs)
    assert shares == {"b": 0, "c": 1, "a": 1, "d": 1}
    assert set(ALONE.shares(costs).values()) == {0}


@pytest.mark.slow
def test_ctrl_c_finishes_the_block(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first interrupt stops behind the present block; the same command then continues to the same bytes."""
    source = llama_folder(num_hidden_layers=6)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _output.run(cli, command(source, whole, text)) == 0
    process = processes.Started(processes.COMMAND, command(source, out, text), tmp_path, {"COLUMNS": "200"})
    blocks = tmp_path / "out.partial" / "blocks"
    while process.alive and not (blocks / "block-00000.safetensors").exists():
        time.sleep(0.01)
    process.send(signal.SIGINT)
    ended = process.wait()
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 130, printed
    assert "stopping behind this block" in printed
    done = len(list(blocks.glob("block-*.safetensors")))
    assert 1 <= done < 6
    assert printed.count("output off by") == done
    capfd.readouterr()
    assert _output.run(cli, command(source, out, text)) == 0
    assert sum(part.count("output off by") for part in capfd.readouterr()) == 6 - done
    for file in whole.iterdir():
        if file.name != "run.json":
            assert file.read_bytes() == (out / file.name).read_bytes(), file.name
