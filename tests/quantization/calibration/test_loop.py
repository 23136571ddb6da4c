"""The calibrated loop: its statistics by brute force, its results in the model, and a run that is killed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import families
import processes
import pytest
import torch
from calibrations import Watching, made, saved, text
from conftest import STDLIB_LM, LlamaFolder
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import spicerack
from spicerack.algorithms import method
from spicerack.algorithms.solvers import blockap, signround
from spicerack.cli import _output, cli
from spicerack.errors import ActivationError, OutputError, RecipeError, UsageError
from spicerack.evaluation import language
from spicerack.nn.linear import QConv1D, QLinear
from spicerack.numerics.scheme import parse
from spicerack.quantization import memory
from spicerack.quantization.calibration import loop
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import Recipe, decided
from spicerack.quantization.run import execute
from spicerack.quantization.watch import Finished
from spicerack.text import calibration
from spicerack.text.calibration import Calibration
from spicerack.text.windows import windows

pytestmark = pytest.mark.slow


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir() if p.name != "run.json")
    assert names == sorted(p.name for p in b.iterdir() if p.name != "run.json")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def inputs_of(model: PreTrainedModel, names: list[str], given: Calibration) -> dict[str, torch.Tensor]:
    """What reaches these layers in one forward over everything, without padding."""
    inputs: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: inputs.__setitem__(name, x[0].reshape(-1, x[0].shape[-1]))
        )
    mask = torch.ones(given.ids.shape, dtype=torch.bool) if given.mask is None else given.mask
    with torch.no_grad():
        model(input_ids=given.ids, attention_mask=mask.long())
    return {name: x[mask.reshape(-1)].double() for name, x in inputs.items()}


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("bert", True), ("gpt2", False), ("qwen3", False)])
def test_statistics_are_those_of_what_flows_behind_quantized_layers(
    family: str, padded: bool, tmp_path: Path, grams: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float scales, the result itself is the model in which each layer saw what it was solved for."""
    monkeypatch.setattr(memory, "TOKENS", 100)  # several chunks
    source, given = saved(family, tmp_path / "float"), text(padded=padded)
    events: list[Finished] = []
    job = prepare(source, decided(Recipe(parse("w4g16")), True))
    execute(job, tmp_path / "out", calibration=given, watch=Watching(finished=events.append))
    exact = spicerack.load(source).eval()
    small = spicerack.load(tmp_path / "out", compute="float").eval()
    small.set_attn_implementation("sdpa")
    names = [name for name, module in small.named_modules() if isinstance(module, QLinear | QConv1D)]
    inside = [name for name in names if ".0." in name or ".1." in name]
    now, then = inputs_of(small, inside, given), inputs_of(exact, inside, given)
    expected = {name: (x.t() @ x / len(x), (then[name] - x).t() @ x / len(x)) for name, x in now.items()}
    assert len(grams) == len(inside) and [e.count for e in events] == [2, 2]
    for gram, pull, w in grams:
        assert any(
            want.shape == gram.shape and torch.allclose(gram, want, rtol=1e-4, atol=1e-5)
            and torch.allclose(pull, w @ moved, rtol=1e-3, atol=1e-4)
            for want, moved in expected.values()
        )  # fmt: skip


def test_padding_never_counts(tmp_path: Path) -> None:
    source, given = saved("bert", tmp_path / "float"), text(padded=True)
    assert given.mask is not None
    other = made(torch.where(given.mask, given.ids, 5), given.mask)
    for name, some in (("a", given), ("b", other)):
        spicerack.quantize(source, "w4g16", output=tmp_path / name, calibration=some)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral", "gemma3-text", "qwen3", "opt", "phi3"])
def test_families_get_nearer_to_the_float_model(family: str, tmp_path: Path) -> None:
    source, given = saved(family, tmp_path / "float"), text(count=60)
    exact = spicerack.load(source, dtype=torch.float32).eval()
    errors = []
    for name, some in (("rtn", None), ("gptq", given)):
        spicerack.quantize(source, "w3g16", output=tmp_path / name, method=name, calibration=some)
        small = spicerack.load(tmp_path / name, compute="float", dtype=torch.float32).eval()
        with torch.no_grad():
            difference = small(input_ids=given.ids)[0] - exact(input_ids=given.ids)[0]
        errors.append(float(difference.square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_layers_that_only_some_of_the_text_reaches(
    tmp_path: Path, grams: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts are: the last chunk, a single sequence, takes another way through the block."""

    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(mlp.up_proj(x) if len(x) == 1 else mlp.gate_proj(x))  # type: ignore[no-any-return]

    monkeypatch.setattr(memory, "TOKENS", 4 * 24)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    source, reports = saved("llama", tmp_path / "float"), []
    job = prepare(source, decided(Recipe(parse("w4g16")), True))
    execute(job, tmp_path / "out", calibration=text(count=13), watch=Watching(finished=reports.append))
    assert len(grams) == 14 and all(bool(gram.any()) and pull is not None for gram, pull, _ in grams)
    assert not any(finished.events for finished in reports)


@pytest.mark.parametrize(("scheme", "block"), [("w4g16", 0), ("w4g16", 1), ("w4g16a8s", 0)])
def test_a_killed_run_continues_to_the_same_bytes(scheme: str, block: int, tmp_path: Path) -> None:
    source, given = saved("llama", tmp_path / "float"), text()
    job = prepare(source, decided(Recipe(parse(scheme)), True))
    execute(job, tmp_path / "whole", calibration=given)

    class Killed(BaseException):
        pass

    def kill(finished: Finished) -> None:
        if finished.number == block:
            raise Killed

    with pytest.raises(Killed):
        execute(job, tmp_path / "out", calibration=given, watch=Watching(finished=kill))
    assert not (tmp_path / "out").exists()
    rest: list[int] = []
    result = execute(job, tmp_path / "out", calibration=given, watch=Watching(finished=lambda f: rest.append(f.number)))
    assert rest == [1][block:] and result.resumed and same_files(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "blocks").exists()


def test_killed_between_states_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, given = saved("llama", tmp_path / "float"), text()
    job = prepare(source, decided(Recipe(parse("w4g16")), True))
    execute(job, tmp_path / "whole", calibration=given)
    with monkeypatch.context() as broken:
        broken.setattr(loop, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            execute(job, tmp_path / "out", calibration=given)
    execute(job, tmp_path / "out", calibration=given)
    assert same_files(tmp_path / "out", tmp_path / "whole")


def test_other_text_does_not_continue(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    job = prepare(source, decided(Recipe(parse("w4g16")), True))

    def stop(_: Finished) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job, tmp_path / "out", calibration=text(), watch=Watching(finished=stop))
    with pytest.raises(OutputError, match="another calibration"):
        execute(job, tmp_path / "out", calibration=text(count=13))


def test_the_ledger_tells_text_method_and_events(tmp_path: Path) -> None:
    source, given = saved("llama", tmp_path / "float"), text(count=1, length=8)
    spicerack.quantize(source, "w4g16", output=tmp_path / "out", calibration=given, rules=["lm_head=w8"])
    ledger = json.loads((tmp_path / "out" / "spicerack.json").read_text())
    assert ledger["identity"]["calibration"] == {
        "text": given.sha256,
        "tokens": given.fingerprint,
        "chunk": 1,
    }
    assert ledger["identity"]["recipe"]["method"] == "gptq"
    events = {entry["tensor"]: entry["events"] for entry in ledger["tensors"]}
    assert all(isinstance(value, list) for value in events.values())


def test_nan_in_a_block_is_named(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ActivationError, match=r"model\.layers\.1\.self_attn\.q_proj, chunk 0: token \[0\], column 3: activation nan"
    ):
        spicerack.quantize(source, "w4g16", output=tmp_path / "out", calibration=text())


def test_what_needs_text_and_what_takes_none(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    with pytest.raises(RecipeError, match="gptq needs calibration text"):
        spicerack.quantize(source, "w4g16", output=tmp_path / "out", method="gptq")
    for method_ in ("gptq", "hqq", "hadamard"):
        with pytest.raises(UsageError, match="in memory"):
            spicerack.quantize(families.build("llama"), "w4g16", method=method_)
    with pytest.raises(RecipeError, match="unknown method"):
        spicerack.quantize(source, "w4g16", output=tmp_path / "out", method="gtpq")


def test_from_the_command_line(llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_folder()
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": f"line {i} of a text, and more of it"}) + "\n" for i in range(99)))
    arguments = [
        "quantize",
        "--no-check",
        source,
        "-o",
        tmp_path / "out",
        "--scheme",
        "w4g32",
        "--calib",
        lines,
        "--length",
        "64",
    ]
    assert _output.run(cli, [*map(str, arguments), "--samples", "8"]) == 0
    printed = capsys.readouterr()
    assert "8 sequences of up to 64 tokens" in printed.out + printed.err
    assert "model.layers.1: 7 layers, 4.50 bits, output off by" in printed.out + printed.err
    own = [
        "quantize",
        "--no-check",
        source,
        "-o",
        tmp_path / "own",
        "--scheme",
        "w4g32",
        "--calib",
        "none",
        "--length",
        "16",
    ]
    assert _output.run(cli, [*map(str, own), "--samples", "4"]) == 0
    assert "text that the model wrote, seed 0, 4 sequences of up to 16 tokens" in "".join(capsys.readouterr())
    assert (
        _output.run(cli, ["quantize", str(source), "-o", str(tmp_path / "b"), "--scheme", "w4", "--method", "gptq"])
        == 2
    )
    assert "needs calibration text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--samples", "8"], "--samples is about calibration text"),
        (["--seed", "0"], "--seed is about calibration text"),
        (["--calib", "none", "--length", "4096"], "the model has 128 positions"),
        (["--calib", "no-such-file.txt"], "does not exist"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], says: str, llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(llama_folder()), "-o", str(tmp_path / "out"), "--scheme", "w4", *options]
    assert _output.run(cli, command) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out.partial").exists()


def test_auto_wins_over_the_recipe_file(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w4\nmethod: gptq\n")
    command = ["quantize", "--no-check", llama_folder(), "-o", tmp_path / "out", "--recipe", recipe, "--method", "auto"]
    assert _output.run(cli, list(map(str, command))) == 0


def test_evaluating_on_the_calibration_text_is_warned_about(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    source, lines, other = llama_folder(), tmp_path / "text.txt", tmp_path / "other.txt"
    lines.write_text("".join(f"line {i} of a text, and more of it\n" for i in range(99)))
    other.write_text("".join(f"another line, number {i}\n" for i in range(99)))
    arguments = [
        "quantize",
        "--no-check",
        source,
        "-o",
        tmp_path / "out",
        "--scheme",
        "w8",
        "--calib",
        lines,
        "--samples",
        "2",
    ]
    assert _output.run(cli, [*map(str, arguments), "--length", "32"]) == 0
    with pytest.warns(UserWarning, match=r"text\.txt is what .*out was calibrated with"):
        spicerack.evaluate(tmp_path / "out", against=source, text=lines, max_tokens=128, window=32)
    spicerack.evaluate(tmp_path / "out", against=source, text=other, max_tokens=128, window=32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("chain", ["signround", "blockap", "awq+blockap"])
def test_learned_codes_in_the_loop(chain: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signround, "STEPS", 30)
    monkeypatch.setattr(blockap, "STEPS", 30)
    source, given = saved(family, tmp_path / "float"), text(count=20, padded=family == "bert")
    errors_of: dict[str, list[float]] = {"rtn": [], chain: []}
    for name, errors in errors_of.items():
        job = prepare(source, decided(dataclasses.replace(Recipe(parse("w2g16")), method=method.parse(name)), True))
        execute(
            job,
            tmp_path / name,
            calibration=given,
            watch=Watching(finished=lambda f, errors=errors: errors.append(f.error)),
        )
    assert all(a < b for a, b in zip(errors_of[chain], errors_of["rtn"], strict=True))
    assert not same_files(tmp_path / "rtn", tmp_path / chain)


@pytest.mark.slow
def test_a_real_model_loses_less(tmp_path: Path) -> None:
    """The project's language model at 3 bits, on text that it was not calibrated with."""
    tokenizer = AutoTokenizer.from_pretrained(STDLIB_LM)
    given = calibration.read(STDLIB_LM / "calibration.txt", tokenizer, samples=24, length=256, seed=0)
    reference = spicerack.load(STDLIB_LM, dtype=torch.float32)
    losses = []
    for name, some in (("rtn", None), ("gptq", given)):
        spicerack.quantize(STDLIB_LM, "w3g64", output=tmp_path / name, method=name, calibration=some)
        small = spicerack.load(tmp_path / name, compute="float", dtype=torch.float32)
        predicted = windows(STDLIB_LM / "heldout.txt", tokenizer, 256, 4096)
        losses.append(float(language.compare(reference, small, predicted).kl.mean()))
    assert losses[1] < 0.6 * losses[0]


_FULL = """
import resource, sys
from pathlib import Path
from calibrations import Watching, text
from spicerack.errors import OutputError
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import decided
from spicerack.quantization.run import execute
from spicerack.quantization.recipe import Recipe
from spicerack.numerics.scheme import parse

job = prepare(sys.argv[1], decided(Recipe(parse("w4g16")), True))

def fill(_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # no file may grow beyond that

try:
    execute(job, Path(sys.argv[2]), calibration=text(), watch=Watching(finished=fill))
except OutputError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_no_block(tmp_path: Path) -> None:
    """The kernel refuses to write more, as on a full disk, once the first block is finished."""
    source, given = saved("llama", tmp_path / "float"), text()
    done = processes.run(_FULL, [source, tmp_path / "out"], tmp_path)
    assert "cannot be written" in done.stdout and "finished blocks are kept" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.partial" / "blocks").glob("block-*"))) == 1
    job = prepare(source, decided(Recipe(parse("w4g16")), True))
    rest: list[int] = []
    execute(job, tmp_path / "out", calibration=given, watch=Watching(finished=lambda f: rest.append(f.number)))
    execute(job, tmp_path / "whole", calibration=given)
    assert rest == [1] and same_files(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_two_runs_at_once_are_refused_by_name(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    said: list[str] = []

    def again(finished: Finished) -> None:
        if finished.number == 0:
            done = processes.run(_FULL, [source, tmp_path / "out"], tmp_path)
            said.append(done.stdout)

    job = prepare(source, decided(Recipe(parse("w4g16")), True))
    execute(job, tmp_path / "out", calibration=text(), watch=Watching(finished=again))
    assert len(said) == 1 and f"out.partial is being written by process {os.getpid()}" in said[0]


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved("llama", tmp_path / "float")
    (tmp_path / "text.txt").write_text("some words of it " * 200)
    arguments = ["quantize", str(source), "-o", str(tmp_path / "out"), "--scheme", "w4g16"]
    assert _output.run(cli, [*arguments, "--calib", str(tmp_path / "text.txt")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
