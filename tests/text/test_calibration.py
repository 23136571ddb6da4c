"""Calibration text: packed and padded as models expect, chosen evenly by seed, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, starting_tokenizer
from scipy.stats import chisquare
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spicerack.errors import TextError
from spicerack.models.bundled import encoder
from spicerack.text import calibration
from spicerack.text.calibration import Calibration, divided, read

STORY = "Once upon a time there was a brave mouse who could quantize anything.\nIt packed sixteen spices.\n"
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
MESSAGES = [{"role": "user", "content": "What is dill?"}, {"role": "assistant", "content": "A herb."}]


@pytest.fixture(scope="module")
def minilm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(encoder())


@pytest.fixture
def stdlib(stdlib_lm: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stdlib_lm)


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def jsonl(path: Path, *records: dict[str, Any]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def take(source: str | Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Calibration:
    return read(source, tokenizer, **{"samples": 4, "length": 16, "seed": 0} | changes)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


# ---- decoders -------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_sequences_without_gaps(tmp_path: Path, stdlib: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "story.txt", STORY * 40)
    given = take(path, stdlib, samples=1000)
    ids = plain(stdlib, STORY * 40)
    assert given.ids.dtype == torch.int64 and given.mask is None
    assert given.ids.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert given.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert given.source == str(path) and given.unknown == 0
    assert any(f"only {len(ids) // 16} of the 1,000 sequences" in note for note in given.notes)


def test_documents_are_joined_by_the_end_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = jsonl(tmp_path / "a.jsonl", {"text": "abcdefg"}, {"text": "hijk"}, {"text": "lmnopqrst"})
    given = take(path, tokenizer, length=11)
    assert "".join(tokenizer.batch_decode(given.ids)) == "abcdefg<|end|>hijk<|end|>lmnopqrst"
    assert given.sha256 == hashlib.sha256(b"abcdefg\0hijk\0lmnopqrst").hexdigest()


def test_a_start_token_begins_every_sequence_and_document(tmp_path: Path) -> None:
    tokenizer = starting_tokenizer()
    path = jsonl(tmp_path / "a.jsonl", {"text": "abcdefg"}, {"text": "hijk"}, {"text": "lmnopq"}, {"text": "rstuvw"})
    given = take(path, tokenizer, length=8)
    assert tokenizer.batch_decode(given.ids) == ["<s>abcdefg", "<s></s><s>hijk</s>", "<s>lmnopq</s>"]


def test_special_tokens_spelled_in_text_are_text_and_in_chats_are_meant(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    text = take(jsonl(tmp_path / "a.jsonl", {"text": "say <|end|> or leave"}), tokenizer)
    assert end not in text.ids
    tokenizer.chat_template = CHAT
    chat = take(jsonl(tmp_path / "b.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES}), tokenizer, length=25)
    rendered = "<|user|>What is dill?<|end|><|assistant|>A herb.<|end|>"
    expected = tokenizer(rendered * 2).input_ids  # the template ends a chat, no second end is put there
    assert chat.ids.flatten().tolist() == expected[: len(expected) // 25 * 25]
    assert chat.sha256 == hashlib.sha256(f"{rendered}\0{rendered}".encode()).hexdigest()


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second file")
    jsonl(tmp_path / "a.jsonl", {"text": "first file"})
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "c.txt", "third file, long")
    write(tmp_path / "image.png", "not read")
    tokenizer = byte_tokenizer()
    given = take(tmp_path, tokenizer, length=13)
    assert "".join(tokenizer.batch_decode(given.ids)) == "first file<|end|>second file<|end|>third file, long"


def test_lines_of_json_longer_than_a_piece_are_whole(tmp_path: Path) -> None:
    words = " ".join(str(i) for i in range(40_000))
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": words}, {"text": "\u2028 separators are no line ends"})
    path.write_text(path.read_text() + "\n\n" + json.dumps({"text": "last, without a line end"}))
    given = take(path, byte_tokenizer())
    whole = "\0".join(["a", words, "\u2028 separators are no line ends", "last, without a line end"])
    assert given.sha256 == hashlib.sha256(whole.encode()).hexdigest()


def test_the_choice_is_even_and_by_seed() -> None:
    assert divided("abc", 5, 0, 2) == (list("abc"), [])
    drawn = [divided(range(12), 5, seed, 0)[0] for seed in range(2000)]
    assert all(len(set(items)) == 5 and items == sorted(items) for items in drawn)
    counts = Counter(item for items in drawn for item in items)
    assert chisquare([counts[i] for i in range(12)]).pvalue > 1e-3
    pairs = Counter((a, b) for items in drawn for a in items for b in items if a < b)
    assert chisquare(list(pairs.values())).pvalue > 1e-3 and len(pairs) == 66


def test_seeds_choose_sequences_of_the_whole_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "a.txt", "".join(f"{i:07d}\n" for i in range(3000)))
    a, again, b = (take(path, tokenizer, samples=40, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.ids, again.ids) and not torch.equal(a.ids, b.ids) and a.sha256 == b.sha256
    starts = [int(text[:7]) for text in tokenizer.batch_decode(a.ids)]
    assert starts == sorted(starts) and starts[0] < 500 and starts[-1] > 2500


@pytest.mark.slow
def test_of_a_large_text_a_part_spread_over_it_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "a.txt", "".join(f"{i:07d}\n" for i in range(200_000)))
    monkeypatch.setattr(calibration, "LEAST_BYTES", 1 << 18)
    given, again, other = (take(path, tokenizer, samples=20, seed=seed) for seed in (1, 1, 2))
    assert any("spread over all" in note and "16.38%" in note for note in given.notes)
    assert torch.equal(given.ids, again.ids) and given.sha256 != other.sha256
    numbers = [int(n) for text in tokenizer.batch_decode(given.ids) for n in re.findall(r"\n(\d{7})\n", text)]
    assert numbers == sorted(numbers) and len(numbers) > 5
    assert min(numbers) < 50_000 and max(numbers) > 150_000
    monkeypatch.setattr(calibration, "BYTES_A_TOKEN", 2)
    assert tokenizer.eos_token_id in take(path, tokenizer, samples=80, length=4096).ids, "what is left out is a border"
    jsonl(path.with_suffix(".jsonl"), {"text": path.read_text()})  # one enormous document
    assert len(take(path.with_suffix(".jsonl"), tokenizer, samples=20).ids) == 20


# ---- encoders -------------------------------------------------------------------------------------------------------


def test_an_encoder_reads_each_line_with_its_special_tokens(tmp_path: Path, minilm: PreTrainedTokenizerBase) -> None:
    lines = ["A short line.", "", "Another line, which is a good deal longer than that.", "The third has eight words."]
    given = take(write(tmp_path / "a.txt", "\n".join(lines)), minilm, length=32, kind="encoder")
    right = minilm([line for line in lines if line], padding=True, return_tensors="pt")
    assert torch.equal(given.ids, right["input_ids"])
    assert given.mask is not None and torch.equal(given.mask, right["attention_mask"].bool())
    assert any("only 3 of the 4" in note for note in given.notes)


def test_an_encoders_long_documents_are_cut_and_it_says_so(tmp_path: Path, minilm: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": STORY * 2000}, {"text": "one two three"})
    given = take(path, minilm, length=12, kind="encoder")
    assert given.mask is not None and given.mask.sum(1).tolist() == [12, 5]
    assert given.ids[0, -1] == minilm.sep_token_id and given.ids[0, 0] == minilm.cls_token_id
    assert any(note.startswith("1 document fills all 12") for note in given.notes)


# ---- datasets -------------------------------------------------------------------------------------------------------


def test_a_dataset_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"owner/text is no file here.*`datasets`") as caught:
        take("owner/text", byte_tokenizer())
    assert "pip install datasets" in caught.value.hint
    write(tmp_path / "rows.parquet", "PAR1")
    with pytest.raises(TextError, match="holds tables"):
        take(tmp_path, byte_tokenizer())
    with pytest.raises(TextError, match=r"texts/none\.txt does not exist"):
        take("texts/none.txt", byte_tokenizer())


def test_a_datasets_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the library, and that an endless dataset ends."""
    asked: list[Any] = []

    class Rows:
        def shuffle(self, *, seed: int, buffer_size: int) -> Any:
            asked.append(seed)
            return ({"text": f"row {i} of the table"} for i in range(5000))

    def load_dataset(*names: Any, **how: Any) -> Rows:
        asked.extend([names, how])
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(calibration, "LEAST_BYTES", 1000)
    given = take("owner/text:en", byte_tokenizer(), seed=5)
    assert asked == [("owner/text", "en"), {"split": "train", "streaming": True}, 5]
    read_rows = next(n for n in range(10**9) if sum(len(f"row {i} of the table") for i in range(n)) >= 4 * 16 * 32)
    assert any(f"first {read_rows} documents" in note for note in given.notes)


def test_tables_are_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tables").mkdir()
    rows = [f"row {i} of the table, with words" for i in range(50)]
    parquet.write_table(arrow.table({"text": rows}), tmp_path / "tables" / "a.parquet")
    tokenizer = byte_tokenizer()
    given = take(tmp_path / "tables", tokenizer, samples=10_000, length=8)
    text = "".join(tokenizer.batch_decode(given.ids)).split("<|end|>")
    assert set(text[:-1]) <= set(rows) and len(set(text[:-1])) >= 49 and text[:49] != rows[:49]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"nine char", "has 9 tokens, and one sequence needs 16"),
        ("blank.jsonl", b"\n\n", "has 0 tokens"),
        ("binary.txt", b"\x7fELF\x02\x01\x00\x00" * 20, "is not text: it has a zero byte"),
        ("latin.txt", "déjà vu ".encode("latin-1") * 20, "is not UTF-8"),
        ("same.txt", b"spam spam " * 99, "has only 5 different tokens: 'a', 'm', 'p', 's', ' '"),
        ("broken.jsonl", b'{"text": "fine"}\n\n{"text": "cut off\n', "line 3 is not JSON"),
        ("list.jsonl", b'["text"]\n', "line 1 is list, not an object"),
        ("other.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', 'line 2 has neither "text" nor "messages"'),
        ("number.jsonl", b'{"text": 5}\n', "line 1 has neither"),
        ("chat.jsonl", b'{"messages": [{"role": "user"}]}\n', 'line 1 has "messages" that are no chat'),
        ("chats.jsonl", b'{"messages": []}\n', 'line 1 has "messages" that are no chat'),
        ("deep.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("array.json", b'[{"text": "x"}]', "is JSON, not text"),
        ("table.csv", b"text,label\nsome words,1\n" * 99, "is a table, not text"),
        ("TABLE.CSV", b"text,label\nsome words,1\n" * 99, "is a table, not text"),
        ("table.tsv", b"text\tlabel\nsome words\t1\n" * 99, "is a table, not text"),
        ("table.parquet", b"PAR1" * 99, "is a table, not text"),
        ("table.arrow", b"ARROW1" * 99, "is a table, not text"),
        ("lines.ndjson", b'{"text": "fine"}\n' * 99, "is JSON lines under another name"),
        ("lines.txt", b'{"text": "fine and long enough"}\n' * 99, "holds JSON lines, and its name says text"),
        ("LINES.JSONL", b'{"text": 5}\n', "line 1 has neither"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_bad_text_is_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        take(path, byte_tokenizer())
    assert name in caught.value.message and caught.value.hint


def test_chats_need_a_template_that_takes_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"messages": MESSAGES})
    with pytest.raises(TextError, match="line 2 is a chat, but the tokenizer has no chat template"):
        take(path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match=r"line 2.*refuses it: roles must alternate"):
        take(path, tokenizer)


def test_a_folder_without_text_and_a_senseless_size_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "x" * 99)
    with pytest.raises(TextError, match=r"has no \.txt or \.jsonl file"):
        take(tmp_path, byte_tokenizer())
    write(tmp_path / "table.csv", "text,label\n")
    with pytest.raises(TextError, match=r"has no \.txt or \.jsonl file: table\.csv is a table, not text"):
        take(tmp_path, byte_tokenizer())
    for changes in ({"samples": 0}, {"length": 1}):
        with pytest.raises(TextError, match="no calibration"):
            take(tmp_path, byte_tokenizer(), **changes)


def test_an_encoder_needs_some_text(tmp_path: Path, minilm: PreTrainedTokenizerBase) -> None:
    for name, content in (("a.txt", "\n \n"), ("a.jsonl", '{"text": " "}\n')):
        with pytest.raises(TextError, match=r"only blank lines|has no text"):
            take(write(tmp_path / name, content), minilm, kind="encoder")
    with pytest.raises(TextError, match="only 1 different tokens: 'hello'"):
        take(write(tmp_path / "same.txt", "hello\n" * 50), minilm, kind="encoder")


def test_a_foreign_language_is_noted_or_refused(tmp_path: Path, minilm: PreTrainedTokenizerBase) -> None:
    """Amharic, which this tokenizer has no letter of: one unknown token a word."""
    foreign = write(tmp_path / "foreign.txt", "ሰላም ለዓለም\n" * 20)
    for kind in ("encoder", "decoder"):
        with pytest.raises(TextError, match="does not know 100% of the tokens"):
            take(foreign, minilm, kind=kind, length=8)
    words = "zero one two three four five six seven eight"
    mixed = take(write(tmp_path / "mixed.txt", f"{words} ሰላም\n" * 3), minilm, kind="encoder")
    assert mixed.unknown == 0.1
    assert any("does not know 10.0%" in note for note in mixed.notes)
    assert any("only 1 of the 3 sequences differ" in note for note in mixed.notes)


def test_an_end_token_that_is_also_the_unknown_one_is_not_unknown(tmp_path: Path) -> None:
    """GPT-2's."""
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"{i} mouse"} for i in range(10)))
    assert take(path, tokenizer, samples=100, length=8).unknown == 0
