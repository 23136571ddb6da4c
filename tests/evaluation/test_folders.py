"""Folders compared: encoders against other libraries' answers, and the command on both kinds of model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kernel_here
from transformers import BertConfig, BertModel, BertTokenizerFast

from spicerack import quantize
from spicerack.cli import _output, cli
from spicerack.errors import CheckpointError, TextError, UsageError
from spicerack.evaluation.encoder import POOLINGS, embed, pool
from spicerack.evaluation.evaluate import EvaluationOptions, evaluate, measure
from spicerack.evaluation.folder import common_tokenizer, pooling_of
from spicerack.evaluation.language import Comparison, paired_difference
from spicerack.evaluation.sentences import SENTENCES
from spicerack.models.bundled import encoder
from spicerack.models.kind import kind_of

LANGUAGE_KEYS = {
    "compute", "tokens", "perplexity", "perplexity_reference", "kl_mean", "kl_mean_ci95", "kl_p999", "top1_agreement",
    "kl_noise_floor",
}  # fmt: skip


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A random encoder whose words are letters."""
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    letters = [chr(c) for c in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return path


# ----------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_matches_sentence_transformers(pooling: Any, side: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 7, 5, generator=random, dtype=torch.float64)
    mask = torch.ones(4, 7, dtype=torch.int64)
    for row, length in enumerate((7, 4, 1, 6)):
        mask[row, length:] = 0
    mask = mask.flip(1) if side == "left" else mask
    theirs = Pooling(5, pooling_mode=pooling)({"token_embeddings": hidden.clone(), "attention_mask": mask})
    if (pooling, side) == ("cls", "left"):  # theirs takes the padding in front
        expected = torch.stack([hidden[row, 7 - length] for row, length in enumerate((7, 4, 1, 6))])
    else:
        expected = theirs["sentence_embedding"]
    torch.testing.assert_close(pool(hidden, mask, pooling), expected)


@pytest.mark.interop
def test_embeddings_are_those_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    from spicerack.runtime.load import load

    folder = encoder()
    tokenizer = common_tokenizer(folder, folder, False)
    texts = list(SENTENCES[:12])
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        ours = embed(load(folder), inputs["input_ids"], inputs["attention_mask"], pooling_of(folder))
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True).double()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs)
    assert float(cosine.min()) > 1 - 1e-9


def test_the_built_in_sentences_are_many_and_varied() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) >= 64
    lengths = [len(text.split()) for text in SENTENCES]
    assert min(lengths) == 1 and max(lengths) > 35
    assert sum(not text.isascii() for text in SENTENCES) >= 5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "max"}, "max"),
        ({"word_embedding_dimension": 3}, "mean"),
    ],
)
def test_pooling_is_read_in_its_old_and_new_form(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert pooling_of(tmp_path) == expected


def test_other_poolings_and_hostile_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["mean", "max"]}))
    with pytest.raises(UsageError, match=r"mean\+max"):
        pooling_of(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../../etc"}]))
    with pytest.raises(CheckpointError, match="not a folder beside it"):
        pooling_of(tmp_path)


def test_an_encoder_against_itself_and_its_quantized_copy(bert_folder: Path, tmp_path: Path) -> None:
    same = evaluate(bert_folder, against=bert_folder)
    assert same["compute"] == "torch/float32" and same["sentences"] == len(SENTENCES)
    assert same["cosine_min"] == pytest.approx(1.0, abs=1e-12) and same["spearman"] == pytest.approx(1.0, abs=1e-9)
    assert 0.99 < same["cosine_noise_floor"] < 1.0
    quantize(bert_folder, "w4g32", output=tmp_path / "out")
    quantized = evaluate(tmp_path / "out", against=bert_folder)
    assert quantized["compute"] == f"{kernel_here('w4g32')}/float32"
    assert 0.9 < quantized["cosine_min"] <= quantized["cosine_mean"] < 1.0
    assert 0.5 < quantized["spearman"] < 1.0


def test_sentences_come_from_a_file_one_a_line(bert_folder: Path, text: Path) -> None:
    text.write_text("one\ntwo\n\nthree and four\n")
    result = evaluate(bert_folder, against=bert_folder, text=text)
    assert (result["sentences"], result["text"]) == (3, "text.txt")
    text.write_text("one\ntwo\n")
    with pytest.raises(TextError, match="2 sentences are too few"):
        evaluate(bert_folder, against=bert_folder, text=text)


# ---------------------------------------------------------------------------------------------------- language models


def test_a_model_against_itself_and_its_quantized_copies(llama_folder, text: Path, tmp_path: Path) -> None:
    model = llama_folder()
    same = evaluate(model, against=model, text=text, window=64)
    assert same.keys() >= LANGUAGE_KEYS and "cosine_mean" not in same
    assert same["kl_mean"] == 0.0 and same["top1_agreement"] == 1.0
    assert same["perplexity"] == same["perplexity_reference"] and same["kl_noise_floor"] > 0
    assert (same["windows"], same["tokens"]) == (14, 14 * 63)
    evaluations = {}
    options = EvaluationOptions(text=text, window=64)
    for scheme in ("w8", "w3g32"):
        quantize(model, scheme, output=tmp_path / scheme)
        evaluations[scheme] = measure(tmp_path / scheme, against=model, options=options)
    w8, w3 = (evaluations[scheme].as_dict() for scheme in ("w8", "w3g32"))
    assert w8["compute"] == f"{kernel_here('w8')}/float32"
    assert 0 < w8["kl_mean"] < w3["kl_mean"]
    assert w3["kl_mean_ci95"][0] < w3["kl_mean"] < w3["kl_mean_ci95"][1]
    figures = [evaluations[scheme].figures for scheme in ("w3g32", "w8")]
    assert all(isinstance(f, Comparison) for f in figures)
    assert paired_difference(*figures).lo > 0


def test_a_folder_runs_in_the_type_it_ships_in(llama_folder, text: Path) -> None:
    model = llama_folder(dtype=torch.bfloat16)
    result = evaluate(model, against=model, text=text, window=64)
    assert result["compute"] == "torch/bfloat16"
    assert result["kl_mean"] == pytest.approx(result["kl_noise_floor"], rel=1e-6), "bfloat16 against its own float32"


def test_the_text_beside_the_model_is_the_default(llama_folder, text: Path) -> None:
    model = llama_folder()
    with pytest.raises(UsageError, match="no text to evaluate on"):
        evaluate(model, against=model)
    shutil.copy(text, model / "heldout.txt")
    assert evaluate(model, against=model, window=64)["text"] == "heldout.txt"


def test_what_cannot_be_compared_is_refused(llama_folder, bert_folder: Path, text: Path, tmp_path: Path) -> None:
    model = llama_folder()
    with pytest.raises(UsageError, match=r"is a bert, and .* a llama"):
        evaluate(bert_folder, against=model, text=text)
    with pytest.raises(UsageError, match="--window 129: the model has 128 positions"):
        evaluate(model, against=model, text=text, window=129)
    with pytest.raises(TextError, match="less than one window"):
        evaluate(model, against=model, text=text, max_tokens=100)
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate(tmp_path / "none", against=model, text=text)
    with pytest.raises(UsageError, match="encoder-decoder"):
        kind_of({"is_encoder_decoder": True}, tmp_path)


def test_unknown_tokens_are_said(bert_folder: Path, text: Path) -> None:
    text.write_text("今日は\nいい天気\nですね and so on\n")
    with pytest.warns(UserWarning, match=r"\d+\.\d% of the text's tokens are unknown"):
        result = evaluate(bert_folder, against=bert_folder, text=text)
    assert result["unknown_tokens"] > 0.01


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_one_object(llama_folder, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(llama_folder())
    arguments = ["eval", model, "--against", model, "--text", str(text), "--window", "64", "--max-tokens", "200"]
    assert _output.run(cli, [*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= LANGUAGE_KEYS and result["tokens"] == 3 * 63
    assert _output.run(cli, arguments) == 0
    assert "Of 1000 next-token choices, 1000 are the same; perplexity is unchanged" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_command_on_an_encoder(bert_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _output.run(cli, ["eval", str(bert_folder), "--against", str(bert_folder)]) == 0
    assert "the worst by 0.0 degrees" in " ".join(capsys.readouterr().out.split())


def test_the_command_names_a_bad_text(llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(llama_folder())
    (tmp_path / "empty.txt").touch()
    code = _output.run(cli, ["eval", model, "--against", model, "--text", str(tmp_path / "empty.txt"), "--json"])
    assert code == 2
    assert json.loads(capsys.readouterr().out)["error"] == "TextError"
