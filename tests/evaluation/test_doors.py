"""What is asked before an evaluation, a benchmark or a text: folders, devices, kinds of model, and files of text."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import LlamaFolder, byte_tokenizer
from transformers import PreTrainedModel

import spicerack
from spicerack.cli import _output, cli
from spicerack.errors import TextError, UsageError
from spicerack.evaluation.bench import BenchOptions, bench
from spicerack.evaluation.evaluate import EvaluationOptions, measure
from spicerack.runtime.generate import GenerateOptions, generate

SENTENCE = "The quick brown fox jumps over the lazy dog"
LARGE: dict[str, Any] = {"vocab_size": 257}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def lines(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({key: some}) for some in texts))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(f"{SENTENCE}.\n" * 12)
    return path


# ---- text ------------------------------------------------------------------------------------------------------------


def test_json_lines_are_read_as_the_text_in_them(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """One document is the text of a plain file, character for character; its quotes and escapes are no part of it."""
    folder = llama_folder()
    content = f'"{SENTENCE}" \u00e9\n' * 12
    text.write_text(content)
    whole = lines(tmp_path / "whole.jsonl", [content])
    plain, same = (measure(folder, against=folder, options=EvaluationOptions(text=file)) for file in (text, whole))
    assert plain.figures.as_dict() == same.figures.as_dict()
    spread = EvaluationOptions(text=lines(tmp_path / "spread.jsonl", content.splitlines()), window=32)
    figures = measure(folder, against=folder, options=spread).figures
    # between documents stands the end token, in place of the line's end
    assert figures.as_dict()["tokens"] == (len(content.encode()) - 1) // 32 * 31


def test_chats_and_folders_of_text_are_read(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    folder, texts = llama_folder(), tmp_path / "texts"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    texts.mkdir()
    chats = [{"messages": [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": None}]}] * 20
    (texts / "a.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (texts / "b.txt").write_text(SENTENCE * 9)
    result = measure(folder, against=folder, options=EvaluationOptions(text=texts, window=32)).as_dict()
    # <words><> of each chat, and an end token between two documents
    assert result["windows"] == (20 * (len(SENTENCE) + 4) + 20 + 9 * len(SENTENCE)) // 32


def test_the_calibration_text_is_known_again(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    folder, tokenizer = llama_folder(), byte_tokenizer()
    chat = lines(tmp_path / "text.jsonl", [f"{SENTENCE} {i}" for i in range(20)])
    for number, source in enumerate((text, chat)):
        given = spicerack.read_calibration(source, tokenizer, samples=2, length=16, seed=0)
        spicerack.quantize(folder, "w8", output=tmp_path / str(number), method="rtn", calibration=given)
        with pytest.warns(UserWarning, match="was calibrated with: use another text"):
            measure(tmp_path / str(number), against=folder, options=EvaluationOptions(text=source, window=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(tmp_path / "0", against=folder, options=EvaluationOptions(text=chat, window=16))
        with pytest.raises(TextError, match="does not exist"):
            measure(folder, against=folder, options=EvaluationOptions(text=tmp_path / "nothing.txt"))


def test_home_is_home(llama_folder: LlamaFolder, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(text.parent))
    folder = llama_folder()
    assert spicerack.evaluate("~/model", against="~/model", text="~/text.txt")["tokens"] > 0
    assert spicerack.read_calibration("~/text.txt", byte_tokenizer(), samples=1, length=16, seed=0).ids.shape == (1, 16)
    assert generate("~/model", "x", GenerateOptions(max_new_tokens=1)).tokens == 1 and folder.exists()


def test_half_an_emoji_is_read_and_said(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    broken = lines(tmp_path / "broken.jsonl", [f"{SENTENCE} \ud83d {i}" for i in range(9)])
    given = spicerack.read_calibration(broken, byte_tokenizer(), samples=2, length=16, seed=0)
    assert "9 halves of characters (lone surrogates) were read as U+FFFD" in given.notes
    folder = llama_folder()
    assert measure(folder, against=folder, options=EvaluationOptions(text=broken, window=16)).as_dict()["windows"]
    with pytest.raises(TextError, match="the prompt is no valid text"):
        generate(folder, "half \udcff")


# ---- folders and devices ---------------------------------------------------------------------------------------------


def test_the_reference_is_the_float_model(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    folder, out, other = llama_folder(), tmp_path / "out", tmp_path / "other"
    for output in (out, other):
        spicerack.quantize(folder, "w8", output=output)
    for command in ("eval", "bench"):
        run = CliRunner().invoke(cli, [command, str(folder), "--against", str(out)])
        assert isinstance(run.exception, UsageError) and "is quantized itself" in run.exception.message
        assert run.exception.hint == f"spicerack {command} {out} --against {folder}"
    with pytest.raises(UsageError, match="other is compared with float models") as caught:
        spicerack.evaluate(other, against=out, text=text)
    assert "float model" in caught.value.hint


@pytest.mark.parametrize("device", ["cuda:99", "kitchen", "meta"])
def test_devices_are_refused_by_name(device: str, llama_folder: LlamaFolder, text: Path) -> None:
    folder = llama_folder()
    calls = (
        lambda: spicerack.load(folder, device=device),
        lambda: spicerack.evaluate(folder, against=folder, text=text, device=device),
        lambda: bench(folder, against=folder, options=BenchOptions(device=device)),
        lambda: generate(folder, "x", GenerateOptions(device=device)),
    )
    for call in calls:
        with pytest.raises(UsageError, match=f"--device {device}: torch cannot compute there: ."):
            call()


# ---- kinds of model --------------------------------------------------------------------------------------------------


def test_what_is_no_model_of_text_is_refused_and_not_proposed(tmp_path: Path, capsys: Any) -> None:
    folder, out = saved(families.build("vit"), tmp_path / "vit"), tmp_path / "out"
    assert _output.run(cli, ["quantize", str(folder), "-o", str(out), "--scheme", "w8"]) == 0
    assert "spicerack eval" not in capsys.readouterr().out
    for call in (spicerack.evaluate, bench):
        with pytest.raises(UsageError, match="reads pictures, not text"):
            call(out, against=folder)
    with pytest.raises(UsageError, match="reads pictures, not text"):
        generate(out, "x")


def test_two_towers_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    folder = saved(families.build("clip"), tmp_path / "clip")
    for call in (spicerack.evaluate, bench):
        with pytest.raises(UsageError, match="compares pictures with text"):
            call(folder, against=folder)


def test_whisper_is_given_sound(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WhisperForConditionalGeneration, which reads sound, not text"):
        generate(saved(families.build("whisper"), tmp_path / "whisper"), "hello")


def test_a_model_that_has_no_bfloat16_has_no_noise_floor(text: Path, tmp_path: Path, capsys: Any) -> None:
    config = transformers.DebertaConfig(**families.SMALL | LARGE, relative_attention=True, pos_att_type=["p2c", "c2p"])
    folder = saved(transformers.DebertaModel(config), tmp_path / "deberta")
    with pytest.warns(UserWarning, match="there is no noise floor: the model does not run in bfloat16: ."):
        result = spicerack.evaluate(folder, against=folder, text=text)
    assert result["cosine_noise_floor"] is None and result["cosine_mean"] == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert _output.run(cli, ["eval", str(folder), "--against", str(folder), "--text", str(text)]) == 0
    shown = capsys.readouterr()
    assert "bfloat16 turns it" not in shown.out and "there is no noise floor" in shown.err


def test_layers_that_text_does_not_reach_are_told(text: Path, tmp_path: Path) -> None:
    part = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=part | LARGE | {"model_type": "llama", "max_position_embeddings": 64}, image_token_index=256,
        vision_config=part | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
    )  # fmt: skip
    folder = saved(transformers.LlavaForConditionalGeneration(config), tmp_path / "llava")
    rules = ["vision_tower.**=w8", "multi_modal_projector.**=w8"]
    spicerack.quantize(folder, "w8", output=tmp_path / "out", rules=rules)
    with pytest.warns(UserWarning, match=r"text does not run \d+ of \d+ quantized layers \(.*vision_tower.*projector"):
        spicerack.evaluate(tmp_path / "out", against=folder, text=text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spicerack.evaluate(folder, against=folder, text=text)


# ---- ids and positions -----------------------------------------------------------------------------------------------


def test_robertas_end_is_met_nowhere(tmp_path: Path, text: Path) -> None:
    text.write_text("\n".join(f"{SENTENCE} {i}" * 4 for i in range(20)))
    config = transformers.RobertaConfig(**families.SMALL | LARGE, pad_token_id=1)
    folder, out = saved(transformers.RobertaModel(config), tmp_path / "roberta"), tmp_path / "out"
    spicerack.quantize(folder, "w8", output=out)
    assert spicerack.evaluate(out, against=folder, text=text)["tokens"] == 20 * 62
    assert bench(out, against=folder, options=BenchOptions(repeats=1, batch=1)).work.length == 62  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="--window 63: the model has 62 positions"):
        spicerack.evaluate(out, against=folder, text=text, window=63)
    words = [
        "quantize",
        str(folder),
        "-o",
        str(tmp_path / "gptq"),
        "--scheme",
        "w8",
        "--calib",
        str(text),
        "--samples",
        "2",
    ]
    assert _output.run(cli, words) == 0
    assert _output.run(cli, [*words, "--length", "63"]) == 2


def test_ids_that_the_model_has_not(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    folder = llama_folder(vocab_size=50, bos_token_id=1, eos_token_id=2)
    given = spicerack.read_calibration(text, byte_tokenizer(), samples=2, length=16, seed=0)
    calls = (
        lambda: generate(folder, "xyz"),
        lambda: spicerack.evaluate(folder, against=folder, text=text),
        lambda: spicerack.quantize(folder, "w8", output=tmp_path / "out", method="gptq", calibration=given),
    )
    for call in calls:
        with pytest.raises(UsageError, match=r"makes token \d+, but the model's vocabulary has 50 entries"):
            call()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_table_of_positions_is_not_generated_beyond(tmp_path: Path) -> None:
    config = transformers.GPT2Config(**families.GPT | LARGE, bos_token_id=256, eos_token_id=None)
    folder = saved(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")
    assert generate(folder, "x" * 60).tokens == 4, "as many as there is room for"
    with pytest.raises(UsageError, match="a prompt of 60 tokens and 5 new ones do not fit into 64 positions"):
        generate(folder, "x" * 60, GenerateOptions(max_new_tokens=5))
    with pytest.raises(UsageError, match="a prompt of 64 tokens and 64 new ones"):
        generate(folder, "x" * 64)


def test_an_encoder_without_a_token_to_pad_with(text: Path, tmp_path: Path) -> None:
    """What is masked is not looked at: the same as one sentence at a time."""
    text.write_text("\n".join(SENTENCE[:n] for n in (5, 9, 30, 40)))
    config = transformers.BertConfig(**families.SMALL | LARGE)
    folder = saved(transformers.BertModel(config), tmp_path / "bert")
    shutil.copytree(folder, tmp_path / "other")
    with torch.no_grad():
        other = transformers.BertModel.from_pretrained(tmp_path / "other")
        other.encoder.layer[0].output.dense.weight.mul_(9)
        other.save_pretrained(tmp_path / "other")
    together = spicerack.evaluate(tmp_path / "other", against=folder, text=text)
    alone = []
    for sentence in text.read_text().splitlines():
        text.write_text("\n".join([sentence] * 3))
        alone.append(spicerack.evaluate(tmp_path / "other", against=folder, text=text)["cosine_mean"])
    assert together["cosine_mean"] == pytest.approx(sum(alone) / 4, abs=1e-6) and together["cosine_mean"] < 0.9999
    assert together["tokens"] == sum(len(SENTENCE[:n].strip()) for n in (5, 9, 30, 40))


def test_a_model_without_memory_of_earlier_tokens(tmp_path: Path) -> None:
    config = transformers.OpenAIGPTConfig(**families.GPT | LARGE)
    folder = saved(transformers.OpenAIGPTLMHeadModel(config), tmp_path / "gpt")
    with pytest.raises(UsageError, match="OpenAIGPTLMHeadModel keeps nothing between tokens"):
        bench(folder, against=folder, options=BenchOptions(repeats=1, prefill=8, decode=2))
    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=257)
    folder = saved(transformers.MambaForCausalLM(mamba), tmp_path / "mamba")
    assert bench(folder, against=folder, options=BenchOptions(repeats=1, prefill=8, decode=2)).speedup > 0


def test_a_cache_of_another_kind_is_not_quantized(tmp_path: Path) -> None:
    config = transformers.xLSTMConfig(hidden_size=64, num_heads=2, num_hidden_layers=1, vocab_size=257)
    folder = saved(transformers.xLSTMForCausalLM(config), tmp_path / "xlstm")
    with pytest.raises(UsageError, match="keeps a xLSTMCache, not keys and values alone"):
        spicerack.load(folder, cache=8)


# ---- two folders of one model ----------------------------------------------------------------------------------------

OTHERS: list[tuple[dict[str, Any], str | None]] = [
    ({"hidden_size": 32}, "has hidden states of 32, and .* 64"),
    ({"vocab_size": 300}, "has a vocabulary of 300, and .* 257"),
    ({"num_hidden_layers": 3}, "has 3 blocks, and .* 2"),
    ({"model_type": "mistral"}, "is a mistral, and .* a llama"),
    ({"num_local_experts": 4}, None),
]
"""What another model says in its config.json -> what is said of it; None: nothing, as only one of them says it."""


@pytest.mark.parametrize(("other", "said"), OTHERS)
@pytest.mark.parametrize("quantized", [False, True])
def test_models_of_two_architectures_are_not_compared(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path, other: dict[str, Any], said: str | None, quantized: bool
) -> None:
    """By all ways in, before a weight is read: the folder has no other weights than those of its own model."""
    source, out = llama_folder(**LARGE), tmp_path / "out"
    if quantized:
        spicerack.quantize(source, "nf4", output=out)  # in the container, whose config is nested
    else:
        shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    inner = config.get("config", config)
    inner.update(other)
    (out / "config.json").write_text(json.dumps(config))
    commands = [["eval", "--text", str(text)], ["bench", "--decode", "1", "--repeats", "1"]]
    if said is None:
        assert CliRunner().invoke(cli, [*commands[0], str(out), "--against", str(source)]).exit_code == 0
        return
    for command in commands:
        with pytest.raises(UsageError, match=said):
            CliRunner().invoke(cli, [*command, str(out), "--against", str(source)], catch_exceptions=False)
    with pytest.raises(UsageError, match=said):
        measure(out, against=source, options=EvaluationOptions(text=text))
    with pytest.raises(UsageError, match=said):
        bench(out, against=source)
