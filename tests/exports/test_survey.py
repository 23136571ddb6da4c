"""What `formats` says is true: what it calls exact is exported, of as many bytes; what it does not, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from ggufs import byte_pieces
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.cli import _output, cli
from spicerack.cli.formats import short
from spicerack.errors import SpicerackError
from spicerack.exports.survey import Survey
from spicerack.storage import engine as engines

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose layers every engine has kernels for: multiples of 256 inputs, of 64 outputs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("float") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_pieces().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(floating: Path) -> Make:
    def make(scheme: str, *rules: str) -> Path:
        output = floating.parent / "-".join([scheme, *(rule.replace("*", "") for rule in rules)])
        if not output.exists():
            spicerack.quantize(floating, scheme, rules=rules, output=output)
        return output

    return make


def verdicts(survey: Survey) -> dict[tuple[str, str], str]:
    return {(line.engine, line.to): line.verdict for line in survey.lines}


@pytest.mark.slow
@pytest.mark.parametrize("rules", [("w4g32",), ("w4g32z",), ("w8g32", "lm_head=w8g32"), ("q6_k",), ("nf4",),
                                   ("w4g64", "**.q_proj=w8g64")])  # fmt: skip
def test_what_is_exact_is_exported_and_what_is_not_is_refused(
    quantized: Make, tmp_path: Path, rules: tuple[str, ...]
) -> None:
    source = quantized(*rules)
    survey = spicerack.formats(source)
    known = {(line.engine, line.to): line for line in survey.lines}
    assert set(known) == {(engine.name, way.to) for engine in engines.every() for way in engine.reads}
    written: dict[tuple[str, int | None], bool] = {}
    for (name, to), line in known.items():
        way = engines.find(name).reading(to, "llama")
        if not way.written:
            assert (line.verdict, line.nbytes) == ("not at all", None)
            assert "does not write" in line.reasons[0]
            continue
        output = tmp_path / f"{name}-{to}" / ("model.gguf" if to == "gguf" else "model")
        if line.verdict != "exact":
            assert line.reasons
            with pytest.raises(SpicerackError):
                spicerack.export(source, to=to, for_=name, output=output)
            assert not output.exists()
        elif (to, line.nbytes) not in written:
            result = spicerack.export(source, to=to, for_=name, output=output)
            assert (result.nbytes, result.rounded) == (line.nbytes, ())
            written[to, line.nbytes] = True
    assert "exact" in {line.verdict for line in survey.lines} or rules == ("nf4",)


def test_verdicts_of_four_bits(quantized: Make) -> None:
    one = verdicts(spicerack.formats(quantized("w4g32")))
    assert {key for key, verdict in one.items() if verdict == "exact"} == {
        ("llama.cpp", "gguf"), ("mlx", "mlx"), ("onnxruntime", "gptq"), ("onnxruntime", "awq"),
        ("transformers", "compressed-tensors"), ("transformers", "gptq"), ("transformers", "awq"),
        ("transformers", "gguf"), ("vllm", "compressed-tensors"), ("vllm", "gptq"), ("vllm", "awq"),
    }  # fmt: skip
    assert one["transformers", "bitnet"] == "another scheme"
    as_is = {(line.engine, line.to) for line in spicerack.formats(quantized("w4g32")).lines if line.as_is}
    assert as_is == {("transformers", "compressed-tensors"), ("vllm", "compressed-tensors")}


def test_ties_are_told(quantized: Make) -> None:
    survey = spicerack.formats(quantized("w4g64", "**.q_proj=w8g64"))
    lines = {(line.engine, line.to): line for line in survey.lines}
    assert lines["vllm", "compressed-tensors"].verdict == "another scheme"
    assert "makes one matrix of q_proj, k_proj, v_proj, which are w4g64 and w8g64" in " ".join(
        lines["vllm", "compressed-tensors"].reasons
    )
    assert lines["transformers", "compressed-tensors"].verdict == "exact"


def test_families_that_an_engine_has_not(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                        num_attention_heads=2)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    survey = spicerack.formats(tmp_path / "bert")
    mlx = next(choice for choice in survey.choices if choice.engine == "mlx")
    assert mlx.reason == "mlx does not read the family 'bert' as mlx"
    assert (mlx.schemes, mlx.partly) == ((), ())


@pytest.mark.slow
def test_schemes_that_are_listed_for_a_float_model_are_taken_by_quantize(floating: Path, tmp_path: Path) -> None:
    from spicerack.quantization import recipe
    from spicerack.quantization.job import prepare

    survey = spicerack.formats(floating)
    assert survey.lines == ()
    whole = {choice.engine: choice for choice in reversed(survey.choices)}  # the recommended files of each
    for name, choice in whole.items():
        assert choice.schemes, name
        for scheme in choice.schemes[:: max(len(choice.schemes) // 4, 1)]:
            asked = recipe.of(scheme).with_choices(None, None, None, None, name)
            job = prepare(floating, recipe.decided(asked, False))
            assert sum(action.fate == "quantize" for action in job.actions) == 7
    assert {"w4g128", "w8", "w8a8", "w4g32z"} <= set(whole["vllm"].schemes)
    assert not {"w3g64", "w8g32z", "w2g32h", "nf4"} & set(whole["vllm"].schemes)
    assert {"q4_k", "w4g32", "iq4_nl", "ternaryg256"} <= set(whole["llama.cpp"].schemes)


def test_the_command_in_a_pipe_and_as_json(quantized: Make, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(quantized("w4g32"))
    assert _output.run(cli, ["formats", source]) == 0
    told = capsys.readouterr().out
    assert f"spicerack export {source} --to gguf --for llama.cpp -o model.gguf" in told
    assert "spicerack does not write onnx yet" in told
    assert _output.run(cli, ["formats", source, "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["quantized"] is True
    line = next(one for one in parsed["formats"] if (one["engine"], one["to"]) == ("llama.cpp", "gguf"))
    assert (line["verdict"], type(line["bytes"])) == ("exact", int)
    assert _output.run(cli, ["formats", source + "-no", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "CheckpointError"


def test_names_that_are_alike_are_one() -> None:
    assert short(["w4", "w8", "w4g32", "w8g32", "w4g64", "w8g64", "w4g32z", "q4_k"]) == (
        "w{4,8}, w{4,8}g{32,64}, w4g32z, q4_k"
    )
