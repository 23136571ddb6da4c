"""The demo: two real models through the whole way, INT8 and INT4, ending in one honest table per model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spicerack.evaluation.bench import bench
from spicerack.evaluation.encoder import embed
from spicerack.evaluation.evaluate import evaluate
from spicerack.evaluation.folder import pooling
from spicerack.evaluation.sentences import SENTENCES
from spicerack.models import bundled
from spicerack.quantization.run import quantize
from spicerack.runtime.generate import generate
from spicerack.runtime.load import load
from spicerack.storage import ledger
from spicerack.text.tokenizer import read_tokenizer

PROMPT = 'def read_csv(path):\n    """'
QUESTION = "How can I get back into my account?"
NEW_TOKENS = 16
EVALUATED_TOKENS = 30_000


@dataclass(frozen=True, slots=True)
class Row:
    """One way to quantize a model: label, scheme, rules."""

    label: str
    scheme: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of the demo: what it is, where it is, and the ways to quantize it."""

    title: str
    folder: Path
    decoder: bool
    rows: tuple[Row, ...]


def subjects() -> tuple[Subject, ...]:
    """The demo's models. Raises CheckpointError if one is not installed."""
    embeddings = ("model.embed_tokens=w8",)
    words = ("embeddings.word_embeddings=w8",)
    return (
        Subject(
            "all-MiniLM-L6-v2, a sentence encoder",
            bundled.encoder(),
            False,
            (
                Row("w8", "w8"),
                Row("w4g32z", "w4g32z"),
                Row("w8 + emb. w8", "w8", words),
                Row("w4g32z + emb. w8", "w4g32z", words),
            ),
        ),
        Subject(
            "stdlib-lm, a small language model of Python's standard library",
            bundled.language_model(),
            True,
            (
                Row("w8", "w8"),
                Row("w4g128", "w4g128"),
                Row("w4g32z", "w4g32z"),
                Row("w4g32z + emb. w8", "w4g32z", embeddings),
            ),
        ),
    )


def run(subject: Subject, output: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Quantize, evaluate, time and sample -> a row for the original and one for each way. Folders go to `output`.

    Keys: label, layer_bytes (of the layers that are quantized; codes, scales and zeros included), bytes_on_disk,
    resident_bytes, speeds as in `bench`, figures as in `evaluate`, sample. report: called with what is being done.
    """
    rows: list[dict[str, Any]] = []
    for row in subject.rows:
        folder = output / row.label.replace(" ", "").replace(".", "")
        report(f"{subject.folder.name}, {row.label}: quantizing")
        quantize(subject.folder, row.scheme, output=folder, rules=row.rules)
        before, after = _layer_bytes(folder)
        report(f"{subject.folder.name}, {row.label}: evaluating")
        figures = evaluate(folder, against=subject.folder, max_tokens=EVALUATED_TOKENS if subject.decoder else None)
        report(f"{subject.folder.name}, {row.label}: measuring speed")
        original, quantized = bench(folder, against=subject.folder, repeats=3)["rows"]
        report(f"{subject.folder.name}, {row.label}: sampling")
        if not rows:
            known = {"perplexity": figures["perplexity_reference"]} if subject.decoder else {}
            rows.append({**original, **known, "label": "original", "layer_bytes": before})
            rows[0]["sample"] = _sample(subject, subject.folder)
        rows.append({**quantized, **figures, "label": row.label, "layer_bytes": after})
        rows[-1]["sample"] = _sample(subject, folder)
    return rows


def _layer_bytes(folder: Path) -> tuple[int, int]:
    """Bytes before and after of the linear layers that are quantized; embeddings count in the folder's size only."""
    written = ledger.read(folder)
    assert written is not None, "quantized just now"
    layers = [e for e in written.entries if e.action == "quantize" and "embed" not in e.layer_type]
    return sum(e.bytes_before for e in layers), sum(e.bytes_after for e in layers)


def _sample(subject: Subject, folder: Path) -> str:
    """What a person would look at: a continuation, or the sentence nearest to a question."""
    if subject.decoder:
        return generate(folder, PROMPT, max_new_tokens=NEW_TOKENS).text
    model = load(folder)
    tokenizer = read_tokenizer(folder, model.config)
    inputs = tokenizer([QUESTION, *SENTENCES], padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        vectors = embed(model, inputs["input_ids"], inputs["attention_mask"], pooling(folder))
    question, *others = torch.nn.functional.normalize(vectors)
    scores = torch.stack(others) @ question
    return f"{SENTENCES[int(scores.argmax())]} ({float(scores.max()):.3f})"
