"""The calibrated loop on a device: one that is not there shows where each tensor lies, and that none are mixed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from calibrations import Watching
from conftest import LlamaFolder
from pretending import DEVICE, Pretending, There

import spicerack
from spicerack.algorithms import method
from spicerack.algorithms.solvers import blockap, signround
from spicerack.algorithms.transforms import awq, smoothquant
from spicerack.cli import cli
from spicerack.errors import OutputError, UsageError
from spicerack.machine import devices
from spicerack.machine.ranks import join
from spicerack.numerics import qtensor, rounding
from spicerack.numerics.scheme import parse
from spicerack.quantization import preflight
from spicerack.quantization.calibration import inputs, loop
from spicerack.quantization.job import Job, prepare
from spicerack.quantization.recipe import Recipe, decided
from spicerack.quantization.run import execute
from spicerack.quantization.stream import Means
from spicerack.quantization.watch import Finished
from spicerack.text.calibration import Calibration


def text(padded: bool = False) -> Calibration:
    ids = torch.randint(3, 99, (12, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(12, 24, dtype=torch.bool)
    mask[1, 9:] = mask[4, 3:] = False
    return Calibration(ids, mask if padded else None, "of no text", 0.0, "made up")


def job(family: str, scheme: str, chain: str, folder: Path) -> Job:
    families.build(family).save_pretrained(folder)
    return prepare(folder, decided(Recipe(parse(scheme), method=method.parse(chain)), True))


CASES = [
    ("llama", "w4g16", "gptq"),
    ("llama", "w4t", "awq+gptq"),
    ("llama", "w4g16z", "hqq"),
    ("llama", "w8a8s", "smoothquant"),
    ("bert", "w8a8", "smoothquant+gptq"),
    ("gpt2", "mxfp4", "awq+gptq"),
    ("gpt_neo", "w4g16", "rtn"),  # has a buffer in its blocks
    ("mixtral", "w4g8", "gptq"),
    ("qwen3", "w3g16", "hadamard+signround"),
    ("llama", "w2g16z", "blockap"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "scheme", "chain"), CASES)
def test_blocks_compute_on_the_device(
    family: str, scheme: str, chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And find what the CPU finds, but for roundings: the values are the CPU's, not where they lie in memory."""
    monkeypatch.setattr(inputs, "FEW", 4)  # experts with fewer tokens than that a column are shown others
    monkeypatch.setattr(signround, "STEPS", 5)
    monkeypatch.setattr(blockap, "STEPS", 5)
    monkeypatch.setattr(awq, "EXPONENTS", (0.25, 0.5))
    monkeypatch.setattr(smoothquant, "STRENGTHS", (0.3, 0.5))
    here: list[Finished] = []
    there: list[Finished] = []
    work, given = job(family, scheme, chain, tmp_path / "float"), text(padded=family == "bert")
    execute(work, tmp_path / "cpu", calibration=given, means=Means(threads=1), watch=Watching(finished=here.append))
    with Pretending() as pretending:
        execute(
            work,
            tmp_path / "there",
            calibration=given,
            means=Means(device=DEVICE, threads=1),
            watch=Watching(finished=there.append),
        )
    for one, other in zip(here, there, strict=True):
        assert (other.error, other.rounded) == pytest.approx((one.error, one.rounded), rel=0.02)
        assert other.events == one.events
    sums = [sum(pretending.seen[name, where] for name in ("mm", "addmm", "bmm")) for where in (False, True)]
    assert sums[0] < sums[1] / 4, (
        "the CPU only has the model around its blocks, and these twice on the tokens of the trial"
    )
    for name in ("linalg_cholesky_ex", "linalg_solve_triangular", "_linalg_solve_ex"):
        assert not pretending.seen[name, False]
        assert bool(pretending.seen[name, True]) == (not {"gptq", "signround", "blockap"}.isdisjoint(chain.split("+")))


def test_operands_that_lie_apart_are_refused_there() -> None:
    with Pretending():
        x = qtensor.moved({"x": [torch.ones(2)]}, DEVICE)["x"][0]
        assert isinstance(x, There) and x.device == DEVICE
        with pytest.raises(RuntimeError, match="operands on"):
            x + torch.ones(2)
        assert qtensor.moved(x + torch.tensor(1.0), devices.CPU).tolist() == [2, 2]


def test_quantized_tensors_move_whole() -> None:
    q = rounding.to_nearest(torch.randn(4, 32), parse("w8a8s"))
    q = dataclasses.replace(q, input_scale=torch.ones(1))
    with Pretending():
        there = qtensor.moved(q, DEVICE)
        parts = [there.codes, there.scale, there.input_scale]
        assert all(isinstance(part, There) for part in parts)
        assert torch.equal(qtensor.moved(there, devices.CPU).codes, q.codes)


# ---- refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:99", "meta", "kitchen", "xla"])
def test_a_device_that_torch_cannot_use(name: str, llama_folder: LlamaFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--device {name}: torch cannot compute there: ."):
        devices.find(name)
    with pytest.raises(UsageError, match=f"--device {name}"):
        spicerack.quantize(llama_folder(), "w8", output=tmp_path / "out", calibration=text(), device=name)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_where_a_device_would_do_nothing(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device cuda: without calibration text"):
        spicerack.quantize(llama_folder(), "w8", output=tmp_path / "out", device="cuda")
    with pytest.raises(UsageError, match="device cuda: a module is rounded"):
        spicerack.quantize(torch.nn.Linear(8, 8), "w8", device="cuda")  # type: ignore[call-overload]
    words = ["quantize", str(llama_folder()), "-o", str(tmp_path / "out"), "--scheme", "w8", "--device", "cuda"]
    with pytest.raises(UsageError, match="--device is about calibration text"):
        cli(words, standalone_mode=False)


def test_another_device_does_not_continue(tmp_path: Path) -> None:
    work = job("llama", "w4g16", "rtn", tmp_path / "float")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(work, tmp_path / "out", calibration=text(), watch=Watching(finished=stop))
    with Pretending(), pytest.raises(OutputError, match="another device"):
        execute(work, tmp_path / "out", calibration=text(), means=Means(device=DEVICE))


def test_memory_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "_keep_exact", full)
    with pytest.raises(UsageError, match=r"--device cpu: its memory is full; 0\.\d GB were planned"):
        execute(job("llama", "w4g16", "rtn", tmp_path / "float"), tmp_path / "out", calibration=text())


# ---- several processes -----------------------------------------------------------------------------------------------


def test_each_process_has_a_gpu_of_its_own() -> None:
    assert [devices.of_rank("cuda", local) for local in range(2)] == ["cuda:0", "cuda:1"]
    assert devices.of_rank("cpu", 1) == "cpu"
    for name in ("cuda:1", "xpu"):
        with pytest.raises(UsageError, match=f"--device {name}: processes of torchrun"):
            devices.of_rank(name, 0)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")])
def test_sums_on_gpus_go_by_nccl(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: asked.append(name))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert join(torch.device(device)).count == 2 and asked == [backend]


def test_the_command_says_where(llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_folder()
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 99)
    words = ["quantize", source, "-o", tmp_path / "out", "--scheme", "w4g16", "--calib", tmp_path / "text.txt"]
    with Pretending():
        cli([*map(str, words), "--length", "16", "--device", "lazy:0", "--dry-run"], standalone_mode=False)
    assert re.search(r"device lazy:0, [\d.]+ .B of its memory at most", capsys.readouterr().out)


def test_the_first_blocks_are_tried_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "FEWEST", 2)
    monkeypatch.setattr(preflight, "BLOCKS", 1)
    devices: list[torch.device] = []
    real = loop.run

    def run(*args: Any, device: torch.device, **more: Any) -> Any:
        devices.append(device)
        return real(*args, device=device, **more)

    monkeypatch.setattr(loop, "run", run)
    with Pretending():
        work = job("llama", "w4g16", "rtn", tmp_path / "float")
        execute(work, tmp_path / "out", calibration=text(), means=Means(device=DEVICE))
    assert len(devices) >= 2 and set(devices) == {DEVICE}  # tried, timed where the text is long, and run
