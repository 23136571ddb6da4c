"""Generating: the same tokens as transformers, streamed and counted; clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import spicerack
from spicerack.cli import _output, cli
from spicerack.errors import CheckpointError, UsageError
from spicerack.runtime.generate import GenerateOptions, generate


def expected(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_greedy_text_is_the_models(llama_folder) -> None:
    folder, pieces = llama_folder(), list[str]()
    result = generate(folder, "def f(", GenerateOptions(max_new_tokens=10), write=pieces.append)
    assert result.text == expected(folder, "def f(", 10) and result.prompt == "def f("
    assert "".join(pieces) == result.text + "\n"
    assert 1 <= result.tokens <= 10 and result.tokens_per_s > 0


@pytest.mark.parametrize("scheme", ["w4g32", "w2g32h"])
def test_quantized_folders_of_both_formats_generate(llama_folder, tmp_path: Path, scheme: str) -> None:
    spicerack.quantize(llama_folder(), scheme, output=tmp_path / "out")
    assert generate(tmp_path / "out", "def f(", GenerateOptions(max_new_tokens=4)).tokens >= 1


def test_sampling_depends_on_the_seed_only(llama_folder) -> None:
    folder = llama_folder()
    options = (GenerateOptions(temperature=1.0, seed=seed, max_new_tokens=16) for seed in (1, 1, 2))
    a, b, c = (generate(folder, "x", some).text for some in options)
    assert a == b != c


def test_a_chat_template_is_used_unless_raw(llama_folder) -> None:
    folder = llama_folder()
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    chat, raw = GenerateOptions(max_new_tokens=8), GenerateOptions(max_new_tokens=8, raw=True)
    assert generate(folder, "hi", chat).text == generate(folder, "<hi>", raw).text
    assert generate(folder, "hi", raw).text == expected(folder, "hi", 8)


def test_the_command_streams_text_or_prints_one_object(llama_folder) -> None:
    folder = llama_folder()
    text = expected(folder, "def f(", 6)
    args = ["generate", str(folder), "def f(", "--max-new-tokens", "6"]
    assert CliRunner().invoke(cli, args).stdout == text + "\n"
    record = json.loads(CliRunner().invoke(cli, [*args, "--json"]).stdout)
    assert record.keys() == {"prompt", "text", "tokens", "tokens_per_s"} and record["text"] == text


def test_what_cannot_generate_is_said(llama_folder, tmp_path: Path, capsys) -> None:
    folder = llama_folder()
    with pytest.raises(UsageError, match="no tokens"):
        generate(folder, "")
    encoder = tmp_path / "encoder"
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, vocab_size=300)).save_pretrained(encoder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, encoder)
    with pytest.raises(UsageError, match="BertModel does not generate text"):
        generate(encoder, "x")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        generate(folder, "x")
    assert _output.run(cli, ["generate", str(folder), "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [
    {"seed": -1}, {"seed": 2**32}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -1.0},
    {"max_new_tokens": 0}, {"top_p": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0},
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is"):
        GenerateOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '{"model": null}', '{"added_tokens": [], "model": {"type": "x"}}']
)
def test_a_tokenizer_that_is_none_is_named(llama_folder, content: str) -> None:
    folder = llama_folder()
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"has no tokenizer: \w"):
        generate(folder, "x")
