"""`--for ENGINE`: what it does not compute is refused before a weight is read, and what it has in float stays so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ggufs import folder as family

import spicerack
from spicerack.errors import CheckpointError, RecipeError, SchemeError, ShapeError, UsageError
from spicerack.quantization import recipe
from spicerack.quantization.job import Job, prepare

Folders = Callable[..., Path]


def job(model: Path, engine: str, scheme: str, *rules: str, fit: bool = False) -> Job:
    asked = recipe.of(scheme, rules).with_choices(None, None, None, fit, engine)
    return prepare(model, recipe.decided(asked, False))


def schemes(made: Job) -> dict[str, str]:
    return {a.info.name.removesuffix(".weight"): a.stored.scheme.name for a in made.actions if a.stored is not None}


@pytest.fixture
def model(llama_folder: Folders) -> Path:
    return llama_folder(hidden_size=256, intermediate_size=320, num_attention_heads=4, num_key_value_heads=4)


def test_ties_are_refused_with_rules_to_paste(model: Path) -> None:
    with pytest.raises(
        SchemeError, match=r"makes one matrix of q_proj, k_proj, v_proj, which are w4g64 and w8.*"
    ) as caught:
        job(model, "vllm", "w4g64", "**.q_proj=w8", "**.{gate_proj,up_proj,down_proj}=skip")
    assert "--set 'model.layers.*.self_attn.{k_proj,v_proj}=w8'" in caught.value.hint
    made = job(model, "vllm", "w4g64", "**.{q,k,v}_proj=w8".replace("{q,k,v}_proj", "{q_proj,k_proj,v_proj}"),
               "**.down_proj=skip")  # fmt: skip
    assert schemes(made)["model.layers.0.self_attn.k_proj"] == "w8"


def test_what_an_engine_has_in_float_stays_float_and_is_told(model: Path) -> None:
    made = job(model, "vllm", "w4g64")
    assert "model.layers.0.mlp.down_proj" not in schemes(made)  # rows of 320: no multiple of Marlin's 128
    why = next(a.why for a in made.actions if a.info.name == "model.layers.0.mlp.down_proj.weight")
    assert why == "vllm computes no [256, 320] weights, only multiples of 64 rows and 128 columns"
    assert any("stay in float" in note and "multiples of 64 rows" in note for note in made.notes)
    with pytest.raises(RecipeError, match=r"rule lm_head=w8: .* stays in float: .*quantized"):
        job(model, "vllm", "w4g64", "lm_head=w8")


def test_rows_that_are_no_whole_blocks(model: Path) -> None:
    with pytest.raises(ShapeError, match=r"down_proj: no type of GGUF holds q4_k; Q4_K: rows of 320.*w5g32 fits") as no:
        job(model, "llama.cpp", "q4_k")
    assert "--fit-groups" in no.value.hint and "down_proj=w5g32" in no.value.hint
    assert schemes(job(model, "llama.cpp", "q4_k", fit=True))["model.layers.0.mlp.down_proj"] == "w5g32"


def test_schemes_that_an_engine_has_not(model: Path) -> None:
    with pytest.raises(SchemeError, match=r"mlx has no levels of nf4: w4g64 fits") as caught:
        job(model, "mlx", "nf4")
    assert "usual there: w4g64" in caught.value.hint
    with pytest.raises(UsageError, match="no engine is known as 'tensorrt'"):
        job(model, "tensorrt", "w4")


def test_how_the_folder_gets_there_is_told(model: Path) -> None:
    assert "vllm reads the folder as it is" in job(model, "vllm", "w4g64").notes
    notes = " ".join(job(model, "mlx", "w4g64").notes)
    assert "spicerack export OUT --to mlx --for mlx -o OUT-mlx" in notes
    notes = " ".join(job(model, "vllm", "w3g64").notes)
    assert "vllm has w3g64 as w4g64, the same numbers" in notes and "--for vllm" in notes
    assert "spicerack does not write onnx yet" in " ".join(job(model, "onnxruntime", "w4g64").notes)


def test_models_that_an_engine_has_not(llama_folder: Folders) -> None:
    with pytest.raises(UsageError, match="mlx does not read the family 'bert'"):
        job(family("bert"), "mlx", "w4")
    folder = llama_folder()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        job(folder, "llama.cpp", "w8g32", fit=True)


def test_a_recipe_s_file_and_python_say_the_same(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: w4g64\nfor: vllm\nrules:\n- '**.down_proj': skip\n")
    read = recipe.read(path)
    assert (read.for_, read.as_dict()["for"]) == ("vllm", "vllm")
    told = spicerack.quantize(model, "w4g64", rules=["**.down_proj=skip"], for_="vLLM", output=tmp_path / "out")
    assert told["format"] == "compressed_tensors"
    path.write_text("scheme: w4\nfor: nobody\n")
    with pytest.raises(UsageError, match="nobody"):
        recipe.read(path)
    with pytest.raises(UsageError, match="engines read folders"):
        spicerack.quantize(torch.nn.Linear(8, 8), "w4", for_="vllm")


def test_without_an_engine_nothing_changes(model: Path) -> None:
    assert "for" not in recipe.of("w4g64").as_dict()
    assert len(schemes(prepare(model, recipe.decided(recipe.of("w4g64"), False)))) == 7 * 2
