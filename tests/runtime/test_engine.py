"""A named engine: everything that a loaded model computes natively runs on it, to the same bits, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LlamaFolder
from torch import nn
from transformers import PreTrainedModel

import spicerack
from spicerack import _native
from spicerack.cli import _output, cli
from spicerack.errors import UsageError
from spicerack.kernels import kernel, panels
from spicerack.kernels.kernel import Compute
from spicerack.models.families.names import KEY_VALUE_CACHES
from spicerack.nn.weight import PackedWeight
from spicerack.numerics.scheme import parse

IDS = torch.randint(5, 250, (3, 17), generator=torch.Generator().manual_seed(0))
RULES = ("model.embed_tokens=w8", "lm_head=w8", "**.0.mlp.up_proj=ternary", "**.1.mlp.up_proj=w8a8", "**.v_proj=w3")
COMPUTES: tuple[Compute | None, ...] = (None, "int8", "float")
ABSENT = next(name for name in ("neon", "avx512vbmi") if name not in panels.NAMES)


@pytest.fixture
def out(llama_folder: LlamaFolder, tmp_path: Path) -> Path:
    """q and k share an input, v has other numbers; attention's heads are 16 wide."""
    spicerack.quantize(llama_folder(), "w4g32z", output=tmp_path / "out", rules=RULES)
    return tmp_path / "out"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Which engines the native module was called with, by function."""
    indices: dict[str, set[int]] = {}

    def watch(name: str) -> None:
        original = vars(_native)[name]

        def call(index: int, *others: Any) -> Any:
            indices.setdefault(name, set()).add(index)
            return original(index, *others)

        monkeypatch.setattr(_native, name, call)

    watch("linear")
    watch("attention")
    return indices


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a prompt, then of one more token behind it."""
    prompt = model(input_ids=IDS, use_cache=True)
    name = next(name for name in KEY_VALUE_CACHES if name in prompt)
    then = model(input_ids=IDS[:, :1], **{name: prompt[name]})
    return torch.cat([prompt.logits, then.logits], 1)


def kernels_of(model: nn.Module) -> set[str]:
    return {module.choice.kernel.name for module in model.modules() if isinstance(module, PackedWeight)}


@pytest.mark.parametrize("compute", ["int8", "float"])
def test_every_engine_gives_the_same_bits(out: Path, called: dict[str, set[int]], compute: Compute) -> None:
    expected = logits(spicerack.load(out, compute=compute))
    for index, engine in enumerate(panels.NAMES):
        called.clear()
        model = spicerack.load(out, compute=compute, engine=engine)
        assert torch.equal(logits(model), expected), engine
        assert called["attention"] == {index}
        # Of the engine with byte permutations is the kernel of ternary codes alone; the rest is the next one's.
        allowed = {0, 1} if engine == "avx512vbmi" else {index}
        assert called["linear"] <= allowed and (index in called["linear"] or compute == "float")


def test_two_models_keep_their_engines(out: Path, called: dict[str, set[int]]) -> None:
    """It is the model's, not the process's."""
    slow, usual = spicerack.load(out, engine="scalar"), spicerack.load(out)
    logits(usual)
    assert called["attention"] == {panels.engine_index()}
    called.clear()
    logits(slow)
    assert called == {"attention": {len(panels.NAMES) - 1}, "linear": {len(panels.NAMES) - 1}}
    assert slow.config._attn_implementation == "spicerack_scalar" and usual.config._attn_implementation == "spicerack"


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    spicerack.save(spicerack.quantize(net, "w8"), tmp_path / "out")
    loaded = spicerack.load(tmp_path / "out", into=net, engine="scalar")
    assert kernels_of(loaded) == {"float_scalar"}, "int8 is the default only with vector instructions for it"


@pytest.mark.parametrize("engine", panels.NAMES)
def test_the_choice_is_that_of_a_processor_whose_fastest_engine_it_is(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [
        (parse(scheme), (64, 64), torch.float32, torch.device("cpu"), compute)
        for scheme in ("w8", "w4g32z", "w8a8", "ternary", "ternarya8", "nf4")
        for compute in COMPUTES
    ]
    named = [kernel.pick(*layer, engine).kernel.name for layer in layers]
    rows = [row for row in kernel.table() if row.engine in (None, *panels.NAMES[panels.NAMES.index(engine) :])]
    monkeypatch.setattr(kernel, "table", lambda: rows)
    assert named == [kernel.pick(*layer, panels.NAMES[0]).kernel.name for layer in layers]


def test_it_says_why_faster_ones_were_passed_over() -> None:
    choice = kernel.pick(parse("w8"), (64, 64), torch.float32, torch.device("cpu"), "float", "scalar")
    for name, reason in choice.passed_over.items():
        engine = name.partition("_")[2]
        if name.startswith("float_") and engine in panels.NAMES:
            assert reason == f"computes with {engine}, and scalar was asked for"


@pytest.mark.parametrize("engine", [ABSENT, "avx", ""])
def test_what_the_processor_has_not_is_refused_by_name(
    out: Path,
    engine: str,
    llama_folder: LlamaFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = str(llama_folder("original"))

    def read(*_: object) -> None:
        raise AssertionError("it is known before anything is read")

    monkeypatch.setattr("spicerack.storage.reader.Checkpoint.read", read)
    with pytest.raises(UsageError, match=f"engine {engine}: this processor, or this build, does not have it") as raised:
        spicerack.load(out, engine=engine)
    assert raised.value.hint == f"it has {', '.join(panels.NAMES)}"
    folder = str(out)
    for command in (
        ["bench", folder, "--against", source], ["eval", folder, "--against", source], ["generate", folder, "x"],
        ["kernels", folder],
    ):  # fmt: skip
        assert _output.run(cli, [*command, "--engine", engine, "--json"]) == 2
        error = json.loads(capsys.readouterr().out)
        assert error["error"] == "UsageError" and f"engine {engine}:" in error["message"]
        assert error["hint"] == raised.value.hint


def test_engines_are_the_cpus(out: Path) -> None:
    with pytest.raises(UsageError, match="engine scalar is an instruction set of CPUs, not of meta"):
        spicerack.load(out, device="meta", engine="scalar")


def test_the_commands(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> dict[str, Any]:
        assert _output.run(cli, [*arguments, "--engine", "scalar", "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    folder, model = str(out), str(tmp_path / "model")
    listed = command("kernels", folder)
    assert listed["engine"] == "scalar"
    assert {some["kernel"] for some in listed["layers"]} == {"float_scalar", "int8_scalar"}  # w8a8 rounds either way
    text = tmp_path / "text.txt"
    text.write_text("def f(x): return x\n" * 9)
    expected = "float_scalar+int8_scalar/float32"
    assert command("eval", folder, "--against", model, "--text", str(text))["compute"] == expected
    small = ("--prefill", "8", "--decode", "2", "--repeats", "1")
    original, quantized = command("bench", folder, "--against", model, *small)["rows"]
    assert (original["compute"], quantized["compute"]) == ("torch/float32", expected)
    scalar = spicerack.load(out, engine="scalar").generate(IDS[:1], max_new_tokens=1, do_sample=False)
    assert scalar.shape == (1, IDS.shape[1] + 1)
    assert command("generate", folder, "def", "--max-new-tokens", "2")["tokens"] in (1, 2)


def test_without_a_folder_there_is_no_layer_to_choose_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert _output.run(cli, ["kernels", "--engine", "scalar", "--json"]) == 2
    assert "--engine chooses kernels for the layers of OUT" in json.loads(capsys.readouterr().out)["message"]
