"""Calibration text: what is read of it, which part is chosen, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import spicerack
from spicerack import calibration
from spicerack.errors import TextError

MODEL = Path(__file__).parents[1] / "assets" / "stdlib-lm"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    return made


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerBase:
    from spicerack.demo import encoder

    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(encoder())
    return made


def text_of(lines: int) -> str:
    return "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(lines))


def test_a_file_is_packed_without_gaps(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text_of(200))
    found = calibration.read(file, tokenizer, decoder=True, samples=1000, length=50)
    ids = tokenizer(text_of(200), add_special_tokens=False).input_ids
    if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
    assert found.mask is None and torch.equal(found.ids, torch.tensor(ids[: len(ids) // 50 * 50]).reshape(-1, 50))


def test_the_seed_decides_and_every_window_has_the_same_chance(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text_of(60))
    everything = calibration.read(file, tokenizer, decoder=True, samples=1000, length=50)
    counts: Counter[str] = Counter()
    for seed in range(300):
        some = calibration.read(file, tokenizer, decoder=True, samples=4, length=50, seed=seed)
        places = [int((everything.ids == row).all(1).nonzero()[0]) for row in some.ids]
        assert places == sorted(places) and len(set(places)) == 4
        counts.update(map(str, places))
    again = calibration.read(file, tokenizer, decoder=True, samples=4, length=50, seed=299)
    assert torch.equal(again.ids, some.ids) and again.sha256 == some.sha256
    expected = 300 * 4 / len(everything.ids)
    assert len(counts) == len(everything.ids) and all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())


def test_json_lines_are_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text_of(i + 3)}) + "\n" for i in range(5)))
    found = calibration.read(file, tokenizer, decoder=True, samples=99, length=20)
    ends = int((found.ids == tokenizer.eos_token_id).sum()) if tokenizer.eos_token_id is not None else 4
    assert ends >= 4
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / "a.jsonl")
    (folder / "image.png").write_bytes(b"\0\1")
    assert torch.equal(calibration.read(folder, tokenizer, decoder=True, samples=99, length=20).ids, found.ids)


def test_chats_are_written_out_by_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": text_of(9)}, {"role": "assistant", "content": text_of(5)}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(TextError, match="no chat template"):
        calibration.read(file, tokenizer, decoder=True, samples=1, length=20)
    talking: Any = AutoTokenizer.from_pretrained(MODEL)
    talking.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    found = calibration.read(file, talking, decoder=True, samples=99, length=20)
    assert int((found.ids == talking.eos_token_id).sum()) == 1, "the template's; the last one is cut off"
    assert talking.decode(found.ids[0], skip_special_tokens=True).startswith("[user] def function_0")


def test_encoders_get_padded_lines(tmp_path: Path, bert: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.txt"
    file.write_text("A short line.\n\nA line that is a good deal longer than the first one was.\nThree.\n")
    found = calibration.read(file, bert, decoder=False, samples=9, length=12)
    assert found.ids.shape == (3, 12) and found.mask is not None
    assert found.mask.sum(1).tolist() == [len(bert("A short line.").input_ids), 12, len(bert("Three.").input_ids)]
    assert (found.ids[:, 0] == bert.cls_token_id).all() and (found.ids[~found.mask] == bert.pad_token_id).all()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"def f", "less than one sequence of 20 tokens"),
        ("a.txt", b"a " * 500, "different tokens"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2 is not JSON"),
        ("a.jsonl", b'{"words": "a"}\n', 'a.jsonl:1 has neither "text" nor "messages"'),
        ("a.jsonl", b"[" * 100_000 + b"\n", ":1 is not JSON"),
    ],
)
def test_what_is_refused(
    name: str, content: bytes, says: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=says):
        calibration.read(tmp_path / name, tokenizer, decoder=True, length=20)


def test_nothing_there(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TextError, match="holds no file"):
        calibration.read(tmp_path, tokenizer, decoder=True)
    with pytest.raises(TextError, match="does not exist"):
        calibration.read(tmp_path / "none.txt", tokenizer, decoder=True)


def test_a_language_that_the_tokenizer_does_not_cover(tmp_path: Path, bert: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.txt"
    signs = "\U00012000\U00012001 \U00012002 \U00012003\U00012004 "  # cuneiform
    file.write_text((signs * 9 + "\n") * 9)
    with pytest.raises(TextError, match=r"unknown|different tokens"):
        calibration.read(file, bert, decoder=False, length=64)
    file.write_text("".join(f"The word number {i} of a language is {signs}\n" for i in range(9)))
    found = calibration.read(file, bert, decoder=False, length=64)
    assert 0.01 < found.unknown < 0.5 and "does not know" in found.notes[0]


def test_a_model_writes_by_its_own_probabilities(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that always says the same: after even first tokens, tokens come as often as it says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = calibration.written_by(model, tokenizer, samples=40, length=200, seed=1)
    assert found.ids.shape == (40, 200) and found.mask is None
    counts = torch.bincount(found.ids[:, 2:].flatten() // 512, minlength=8).float()
    expected = 40 * 198 / 8
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    firsts = found.ids[:, 0 if calibration.evaluation_text.start_token(tokenizer) is None else 1]
    assert len(firsts.unique()) > 35 and not set(firsts.tolist()) & set(tokenizer.all_special_ids)


def test_what_a_model_writes_depends_on_seed_and_number_alone(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spicerack.load(MODEL, dtype=torch.float32)
    whole = calibration.written_by(model, tokenizer, samples=5, length=24)
    monkeypatch.setattr(calibration, "_AT_ONCE", 2)
    assert torch.equal(calibration.written_by(model, tokenizer, samples=5, length=24).ids, whole.ids)
    assert not torch.equal(calibration.written_by(model, tokenizer, samples=5, length=24, seed=1).ids, whole.ids)
