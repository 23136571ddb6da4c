"""The bench: turns, medians, bytes; and the command on both kinds of model. No test asserts a speed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kernel_here
from transformers import PreTrainedModel

from spicerack import quantize
from spicerack.cli import _output, cli
from spicerack.cli import bench as command_module
from spicerack.errors import UsageError
from spicerack.evaluation import bench as module
from spicerack.evaluation.bench import BenchOptions, bench, bytes_on_disk, resident_bytes
from spicerack.evaluation.opening import Opening, open_in_turns
from spicerack.evaluation.timing import Benchmark, Speed, Timing
from spicerack.evaluation.turns import EncoderTurn, take_turns
from spicerack.models.bundled import encoder
from spicerack.runtime.load import load

SMALL: dict[str, Any] = {"prefill": 16, "decode": 3, "repeats": 2}


def test_models_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []

    def turn(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            calls.append(name)
            return {"x": float(len(calls))}

        return run

    shares: list[float] = []
    samples = take_turns({"a": turn("a"), "b": turn("b")}, 2, shares.append)
    assert "".join(calls) == "ababab"
    assert samples == {"a": [{"x": 3.0}, {"x": 5.0}], "b": [{"x": 4.0}, {"x": 6.0}]}
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_shared_storages_count_once_and_views_as_the_whole() -> None:
    model = torch.nn.Module()
    model.a = torch.nn.Linear(10, 20, bias=False)
    model.b = torch.nn.Linear(10, 20, bias=False)
    model.b.weight = model.a.weight
    whole = torch.zeros(1000, dtype=torch.int8)
    model.register_buffer("view", whole[:5])
    assert resident_bytes(model) == 10 * 20 * 4 + 1000


def test_a_language_model_beside_its_quantized_copy(llama_folder, tmp_path: Path) -> None:
    model, out = llama_folder(dtype=torch.bfloat16), tmp_path / "out"
    quantize(model, "w4g32", output=out)
    before = torch.get_num_threads()
    result = bench(out, against=model, options=BenchOptions(threads=1, float32=True, **SMALL))
    assert torch.get_num_threads() == before
    assert [timing.name for timing in result.models] == ["original", "quantized", "original, float32"]
    original, quantized, full = result.models
    assert (original, quantized) == (result.original, result.quantized)
    assert [timing.compute for timing in result.models] == [
        "torch/bfloat16",
        f"{kernel_here('w4g32')}/bfloat16",
        "torch/float32",
    ]
    for timing in result.models:
        assert list(timing.speeds) == ["prefill_tokens_per_s", "decode_tokens_per_s"]
        assert 0 < timing.opening.load < timing.opening.first
        assert all(0 < speed.least <= speed.median <= speed.most for speed in timing.speeds.values())
    medians = [timing.speeds["decode_tokens_per_s"].median for timing in result.models]
    assert result.speedup == medians[1] / medians[0]
    assert original.bytes_on_disk == (model / "model.safetensors").stat().st_size == bytes_on_disk(model)
    assert quantized.resident_bytes < original.resident_bytes, "weights stay packed after they were used"
    parameters = sum(p.numel() for p in load(model).parameters())
    assert original.resident_bytes == pytest.approx(2 * parameters, abs=200)  # and the rotary frequencies
    assert full.resident_bytes == pytest.approx(4 * parameters, abs=200)
    shown = result.as_dict()
    assert (shown["threads"], shown["prefill"], shown["decode"], shown["repeats"]) == (1, 16, 3, 2)
    assert shown["speedup"] == result.speedup and shown["speedup_prefill"] > 0 and "cache" not in shown
    assert shown["rows"][0]["open_s"] == original.opening.first and shown["rows"][1]["open_load_s"] > 0
    assert shown["rows"][1]["decode_tokens_per_s"] == medians[1] and "items_per_s" not in shown["rows"][1]


def test_folders_are_opened_in_turns_one_at_a_time(llama_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_folder()
    calls: list[str] = []
    dropped: list[int] = []
    monkeypatch.setattr("os.posix_fadvise", lambda *arguments: dropped.append(arguments[3]), raising=False)

    def loading(name: str) -> Callable[[], PreTrainedModel]:
        def run() -> PreTrainedModel:
            calls.append(name)
            return load(model)

        return run

    shares: list[float] = []
    openings = open_in_turns({"a": (model, loading("a")), "b": (model, loading("b"))}, shares.append, head=True)
    assert "".join(calls) == "ab" + "aabb" * 3, "cold and warm, behind a round that does not count"
    assert len(dropped) == 6 and shares[-1] == 1.0
    for opening in openings.values():
        assert 0 < opening.load < opening.first and opening.cold is not None
        assert set(opening.as_dict()) == {"open_load_s", "open_s", "open_cold_s"}


def test_a_sharded_folder_is_counted_whole(llama_folder) -> None:
    model = llama_folder(max_shard_size="50KB")
    shards = list(model.glob("*.safetensors"))
    assert len(shards) > 2
    assert bytes_on_disk(model) == sum(path.stat().st_size for path in shards)


def test_what_does_not_fit_is_refused(llama_folder) -> None:
    model = llama_folder()
    with pytest.raises(UsageError, match="100 prompt tokens and 64 new ones do not fit into the model's 128 positions"):
        bench(model, against=model, options=BenchOptions(prefill=100))
    assert module._prefill(load(model), None, 64) == 64


@pytest.mark.slow
def test_an_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(encoder())
    assert _output.run(cli, ["bench", folder, "--against", folder, "--batch", "2", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    assert result["speedup"] == rows[1]["items_per_s"] / rows[0]["items_per_s"]
    assert rows[0]["resident_bytes"] == pytest.approx(90.9e6, rel=0.01)


def test_the_command(llama_folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = str(llama_folder())
    arguments = ["bench", model, "--against", model, "--prefill", "16", "--decode", "2", "--repeats", "1"]
    assert _output.run(cli, arguments) == 0
    shown = capsys.readouterr().out
    labels = ("on disk", "in memory", "opens in", "prompt tokens/s", "new tokens/s", "2 new ones; median of 1 turn; ")
    assert all(label in shown for label in labels) and re.search(r"\b(1 thread|([2-9]|\d\d+) threads), cpu", shown)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("speeds", "kernel", "said"),
    [
        ((100, 50), "reference/float32", "takes 2.00 times as long, because its weights are unpacked"),
        ((100, 50), "vnni/float32", "takes 2.00 times as long."),
        ((100, 99), "reference/float32", "as fast as the original, within the spread"),
        ((100, 250), "vnni/float32", "2.50 times as fast"),
    ],
)
def test_what_is_said_of_the_speed(speeds: tuple[float, float], kernel: str, said: str) -> None:
    models = tuple(
        Timing(name, compute, {"items_per_s": Speed(v, v - 2, v + 2)}, size, size, None, Opening(1, 2, None))
        for name, size, compute, v in (
            ("original", 400, "torch/float32", speeds[0]),
            ("quantized", 100, kernel, speeds[1]),
        )
    )
    sentence = command_module._meaning(Benchmark(models, EncoderTurn(1, 1), None, 1, 1, "cpu"))
    assert said in sentence and "4.00 times smaller" in sentence
